"""The null-space ratio against performance: during training, per module, per sample, and over merges.

    python -m bench.quality.phenomenon --suite text --out FOLDER [--method NAME] [--rows N]

Writes ``FOLDER/phenomenon-SUITE.json`` and an SVG of the same name (matplotlib). The questions:

* training: does a task's ratio on held-out rows fall while its score rises? (rank correlation over steps)
* modules: where does it fall, against the ratio of a random subspace of the same rank?
* samples: do test rows with a lower ratio have a lower loss, with the task's own adapter and in a merge?
* merges: does a task's ratio follow its score when only the coefficient of task arithmetic changes?

The ratio is the mean over the target modules of the mean over the tokens. Losses are those of training.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsc_fast import NSCLoss
from nsc_fast.demo.evaluate import applied
from nsc_fast.factors import LowRankUpdate
from nsc_fast.parameters import Scope
from nsc_fast.targets import block_of, select_targets

from . import suites
from .command import cache_folder, ended, parsed
from .run import provenance
from .train import adapter_folder
from .workshop import Configuration, Workshop, parse

__all__ = ["draw", "main", "merges", "panels", "pearson", "samples", "spearman", "training"]

COEFFICIENTS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
SWEEP_ROWS = 200


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlation; None where one of them does not vary."""
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    scale = a.norm() * b.norm()
    return round(float((a * b).sum() / scale), 4) if scale > 0 else None


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation, ties with their mean rank; None where one does not vary."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: Sequence[float]) -> list[float]:
    _, inverse, counts = torch.tensor(values, dtype=torch.float64).unique(
        return_inverse=True, return_counts=True
    )
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse].tolist()


def training(shop: Workshop, cache: Path) -> dict[str, Any]:
    """Task -> score and ratios against the step, as recorded in training, with their rank correlations."""
    out = {}
    for name, task in shop.tasks.items():
        folder = adapter_folder(cache, task, shop.adapter_seed)
        record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        curve = record["curve"]
        scores = [probe["held_out"] for probe in curve]
        modules = curve[0]["ratio_per_module"]
        out[name] = {
            "steps": [probe["step"] for probe in curve],
            "loss": [probe["loss"] for probe in curve],
            "score": scores,
            "ratio": [probe["ratio"] for probe in curve],
            "ratio_per_block": [probe["ratio_per_block"] for probe in curve],
            "random_subspace_ratio": record["random_subspace_ratio"],
            "spearman_score_ratio": spearman(scores, [probe["ratio"] for probe in curve]),
            "modules": {
                m: {
                    "first": curve[0]["ratio_per_module"][m],
                    "last": curve[-1]["ratio_per_module"][m],
                    "spearman_score_ratio": spearman(scores, [p["ratio_per_module"][m] for p in curve]),
                }
                for m in modules
            },
        }
    return out


class _Ratios:
    """The null-space ratio of every task's own adapter at the target modules."""

    def __init__(self, shop: Workshop) -> None:
        scope = Scope(**shop.base.target_scope)
        every = [name for name, _ in shop.model.named_modules()]
        downs = {}
        for task, adapter in shop.adapters.items():
            order = [m for m in every if m in adapter.modules]
            chosen = select_targets(order, layers=scope.layers, names=scope.filter, all_modules=every)
            downs[task] = {m: adapter.modules[m].down for m in chosen}
        self.loss = NSCLoss(downs)

    @torch.inference_mode()
    def batch(self, shop: Workshop, name: str, inputs: dict[str, Tensor]) -> tuple[float, Tensor]:
        """Mean ratio of one batch and the outputs of the task's head."""
        mask = inputs.get("attention_mask")
        mask = mask if mask is not None and mask.ndim == 2 else None
        with self.loss.watch(shop.model, name, mask=mask) as seen:
            outputs = shop.base.predict(shop.tasks[name], shop.model, shop.heads[name], inputs)
        return float(seen.loss), outputs


def samples(shop: Workshop, merged: Mapping[str, LowRankUpdate], rows: int, seed: int) -> dict[str, Any]:
    """Task -> "single" and "merged" -> correlations of a test row's ratio with its loss and correctness."""
    ratios = _Ratios(shop)
    out: dict[str, Any] = {}
    for name, task in shop.tasks.items():
        examples = shop.base.examples(task, "test", rows, seed)
        batches = list(shop.base.batches(task, examples, 1, None))
        out[name] = {}
        for label, updates in (("single", shop.adapters[name].canonical()), ("merged", merged)):
            omega, losses, right = [], [], []
            with applied(shop.model, updates):
                for inputs, target in batches:
                    ratio, outputs = ratios.batch(shop, name, inputs)
                    omega.append(ratio)
                    losses.append(float(shop.base.loss(task, outputs, target)))
                    if task.kind == "classification":
                        right.append(float(outputs.argmax(-1) == target))
            out[name][label] = {
                "rows": len(batches),
                "ratio_mean": sum(omega) / len(omega),
                "spearman_ratio_loss": spearman(omega, losses),
                "pearson_ratio_correct": pearson(omega, right) if right else None,
                "ratio": [round(v, 5) for v in omega],
                "loss": [round(v, 5) for v in losses],
            }
    return out


def merges(shop: Workshop, seed: int, coefficients: Sequence[float]) -> dict[str, Any]:
    """Task -> ratio and score at every coefficient of task arithmetic, with their rank correlation."""
    ratios = _Ratios(shop)
    out: dict[str, Any] = {
        name: {"coefficients": list(coefficients), "score": [], "ratio": []} for name in shop.tasks
    }
    for coefficient in coefficients:
        one = Configuration("", "task_arithmetic", {"scaling": coefficient})
        with applied(shop.model, shop.merge(one, seed).updates):
            for name, task in shop.tasks.items():
                examples = shop.base.examples(task, "test", SWEEP_ROWS, seed)
                seen = [
                    (*ratios.batch(shop, name, inputs), target, len(next(iter(inputs.values()))))
                    for inputs, target in shop.base.batches(task, examples, 32, None)
                ]
                total = sum(count for *_, count in seen)
                out[name]["ratio"].append(sum(r * count for r, _, _, count in seen) / total)
                score = shop.base.score(task, [o for _, o, _, _ in seen], [t for _, _, t, _ in seen])
                out[name]["score"].append(score)
    for own in out.values():
        own["spearman_score_ratio"] = spearman(own["score"], own["ratio"])
    return out


@contextmanager
def panels(target: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[list[Any]]:
    """Yields the axes of a figure, row by row, and then writes it as SVG; the size is in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    try:
        yield list(axes.flat)
        figure.tight_layout()
        figure.savefig(target)
    finally:
        plt.close(figure)


def draw(content: Mapping[str, Any], target: Path) -> None:
    """Four panels, one question each, as SVG."""
    with panels(target, 2, 2, (10, 7.5)) as (a, b, c, d):
        for number, (task, own) in enumerate(content["training"].items()):
            color = f"C{number}"
            a.plot(own["ratio"], own["score"], marker="o", markersize=3, color=color, label=task)
            b.plot(own["ratio_per_block"][-1], marker="o", markersize=3, color=color)
            b.plot(own["ratio_per_block"][0], linestyle=":", linewidth=0.8, color=color)
            merged = content["merges"][task]
            best = max(merged["score"])
            if best > 0:
                d.plot(
                    merged["ratio"],
                    [s / best for s in merged["score"]],
                    marker="o",
                    markersize=3,
                    color=color,
                )
        tasks = list(content["samples"])
        for shift, label, color in ((-0.2, "single", "#4878a8"), (0.2, "merged", "#a87848")):
            values = [content["samples"][t][label]["spearman_ratio_loss"] for t in tasks]
            places = [i + shift for i in range(len(tasks))]
            c.bar(places, [math.nan if v is None else v for v in values], 0.4, color=color, label=label)
        a.set(title="training", xlabel="ratio of the target modules", ylabel="score on held-out rows")
        b.set(title="blocks: after training (line), before (dots)", xlabel="block", ylabel="ratio")
        c.set(title="test rows: ratio against loss", ylabel="rank correlation")
        c.set_xticks(range(len(tasks)), tasks, rotation=30)
        c.axhline(0, color="black", linewidth=0.8)
        d.set(
            title="task arithmetic 0.1 to 1",
            xlabel="ratio of the target modules",
            ylabel="score / best of them",
        )
        a.legend(fontsize=7)
        c.legend(fontsize=7)


def blocks(content: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Task -> kind of module -> how far the ratio fell, in the mean over the blocks."""
    out: dict[str, dict[str, float]] = {}
    for task, own in content["training"].items():
        falls: dict[str, list[float]] = {}
        for module, values in own["modules"].items():
            stack = block_of(module)
            kind = module if stack is None else module.split(f".{stack[1]}.", 1)[1]
            falls.setdefault(kind, []).append(values["first"] - values["last"])
        out[task] = {kind: round(sum(v) / len(v), 5) for kind, v in falls.items()}
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="bench.quality.phenomenon", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--method", default="nsc", help="of the merge, as in bench.quality.run")
    parser.add_argument("--rows", type=int, default=200, help="test rows per task that are looked at singly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapter-seed", type=int, default=0)
    options = parsed(parser, argv)
    chosen, cache = suites.suite(options.suite), cache_folder(options.cache)
    shop = Workshop(chosen, cache, adapter_seed=options.adapter_seed, rows=options.rows)
    configuration = parse(options.method, shop.base)[0]
    merged = shop.merge(configuration, options.seed)
    content: dict[str, Any] = {
        "provenance": provenance(shop),
        "merge": {"label": configuration.label, "parameters": dict(merged.parameters)},
        "training": training(shop, cache),
    }
    content["fall_per_module"] = blocks(content)
    content["samples"] = samples(shop, merged.updates, options.rows, options.seed)
    content["merges"] = merges(shop, options.seed, COEFFICIENTS)
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / f"phenomenon-{chosen.name}.json"
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draw(content, target.with_suffix(".svg"))
    for name in shop.tasks:
        own = content["samples"][name]
        print(
            f"{name}: training {content['training'][name]['spearman_score_ratio']}, "
            f"rows alone {own['single']['spearman_ratio_loss']}, "
            f"merged {own['merged']['spearman_ratio_loss']}, "
            f"merges {content['merges'][name]['spearman_score_ratio']} (rank correlations)"
        )


if __name__ == "__main__":
    ended(main)
