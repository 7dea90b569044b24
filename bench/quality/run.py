"""Merges the adapters of a suite with many methods and scores every merge on test rows.

    python -m bench.quality.run --suite text --seeds 0 1 2 --out results.jsonl [--methods NAME ...]

A method is a name of ``nsc_fast.methods`` or ``LABEL=METHOD:{"parameter": value}``. Default: every method
that gives one model, with its published defaults; task arithmetic at 0.3, 0.4 and 1/K (which is ``uniform``);
null-space compression with the paper's settings. A method that cannot be used on a suite is recorded with
the reason.

What a seed varies: which rows of the train files the unlabeled data are and in which order they come, what
methods draw at random, and which rows of the test file are scored where there are more than ``--rows``. It
does not vary the adapters: they are those of ``--adapter-seed``. A merge without data and without random
draws is therefore the same for all seeds, and its spread is that of the test rows.

No label enters the unlabeled data: in generation tasks they are prompts with the answers that the task's own
adapter generates, not with the reference answers. The time that takes is in none of the times below.

One JSON object a line is appended to ``--out``: one with ``"kind": "run"`` (versions, machine, rows, digests
of the adapters), then one a suite, label, seed and task with the score, the task's fine-tuned score on the
same rows and their quotient. Times are CPU seconds of the process, so that other load does not count: to
prepare the adapters, to merge, to score all tasks. Peak memory is what the process grew by while the merge
was made (``VmHWM`` of Linux, reset before), so it holds activations, optimiser and intermediate matrices,
not the model and the adapters; without ``/proc`` it is null.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nsc_fast.result import environment

from . import suites
from .command import cache_folder, ended, parsed
from .workshop import UNLABELED, Configuration, Merged, Workshop, configurations, parse

__all__ = ["BASE_LABEL", "FINE_TUNED", "main", "measure", "provenance", "record"]

FINE_TUNED = "fine-tuned"
"""Label of the rows that every score is divided by: the task's own adapter alone."""

BASE_LABEL = "base"
"""Label of the frozen base model with the heads of the adapters."""


def measure(
    shop: Workshop,
    chosen: Sequence[Configuration],
    seed: int,
    write: Callable[[dict[str, Any]], None],
) -> list[str]:
    """Scores fine-tuned, base and all configurations for one seed.

    Args:
        write: called with every row of the results as soon as there is one.

    Returns:
        Labels of the configurations that failed; their rows have the status "failed" and the error.
    """
    fine_tuned: dict[str, float] = {}
    failed = []
    for label in (FINE_TUNED, BASE_LABEL):
        started = time.process_time()
        if label == FINE_TUNED:
            scores = fine_tuned = shop.fine_tuned(seed)
        else:
            scores = shop.score({}, seed, list(shop.tasks))
        seconds = {"evaluation": time.process_time() - started}
        _rows(shop, Configuration(label, label), seed, scores, fine_tuned, write, seconds=seconds)
    for one in chosen:
        reason = shop.not_applicable(one)
        if reason is not None:
            write({**_key(shop, one, seed), "status": "not applicable", "reason": reason})
            continue
        try:
            merged = shop.merge(one, seed)
            started = time.process_time()
            scores = shop.score(merged.updates, seed, list(shop.tasks))
        except Exception as error:
            # The other methods are worth their hours: the failure is a result, and the exit status tells.
            traceback.print_exc()
            failed.append(one.label)
            reason = f"{type(error).__name__}: {error}"
            write({**_key(shop, one, seed), "status": "failed", "reason": reason})
            continue
        seconds = {
            "preparation": merged.preparation,
            "optimisation": merged.optimisation,
            "evaluation": time.process_time() - started,
        }
        more = {"parameters": dict(merged.parameters), "peak_mib": merged.peak, **_course(merged)}
        _rows(shop, one, seed, scores, fine_tuned, write, seconds=seconds, **more)
    return failed


def _course(merged: Merged) -> dict[str, Any]:
    """What a method said, and the ends of its optimisation."""
    if not merged.history:
        return {"notices": list(merged.notices)}
    first, last = merged.history[0], merged.history[-1]
    return {
        "notices": list(merged.notices),
        "loss_first": first.loss,
        "loss_last": last.loss,
        "steps": len(merged.history),
    }


def _key(shop: Workshop, chosen: Configuration, seed: int) -> dict[str, Any]:
    return {
        "kind": "score",
        "suite": shop.suite.name,
        "base": shop.base.name,
        "label": chosen.label,
        "method": chosen.method,
        "parameters": dict(chosen.parameters),
        "seed": seed,
    }


def _rows(
    shop: Workshop,
    chosen: Configuration,
    seed: int,
    scores: Mapping[str, float],
    fine_tuned: Mapping[str, float],
    write: Callable[[dict[str, Any]], None],
    *,
    seconds: Mapping[str, float],
    **more: Any,
) -> None:
    for name, score in scores.items():
        write(
            {
                **_key(shop, chosen, seed),
                **more,
                "status": "ok",
                "task": name,
                "metric": shop.tasks[name].metric,
                "score": score,
                "fine_tuned": fine_tuned[name],
                "normalised": score / fine_tuned[name],
                "majority": shop.majority(name, seed),
                "test_rows": len(shop.base.examples(shop.tasks[name], "test", shop.rows, seed)),
                "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
            }
        )
    mean = sum(scores[n] / fine_tuned[n] for n in scores) / len(scores)
    told = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
    print(
        f"seed {seed} {chosen.label}: {100 * mean:.1f} % ({told}) {sum(seconds.values()):.0f} s", flush=True
    )


def provenance(shop: Workshop) -> dict[str, Any]:
    """What a result depends on beside the seed."""
    return {
        "kind": "run",
        "suite": shop.suite.name,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        **environment(),
        "revision": _revision(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "adapter_seed": shop.adapter_seed,
        "adapters": {name: adapter.digest for name, adapter in shop.adapters.items()},
        "rows": shop.rows,
        "unlabeled_rows": UNLABELED,
        "unlabeled_batch": shop.batch,
        "unlabeled_answered_by_adapter": [n for n, t in shop.tasks.items() if t.kind == "generation"],
        "memory": "growth of the resident set while merging (VmHWM after a reset), MiB",
    }


def _revision() -> str | None:
    """The revision of the checkout, with a plus for changed files; None outside one."""
    where = Path(__file__).resolve().parent
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=where,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def record(
    target: Path,
    shop: Workshop,
    chosen: Sequence[Configuration],
    seeds: Sequence[int],
    more: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: {},
) -> int:
    """Appends the provenance and the results of all seeds to a file of JSON lines.

    Args:
        more: fields that a row gets besides.

    Returns:
        Exit status: 1 where a configuration failed, which is told.
    """
    run = uuid.uuid4().hex[:8]
    target.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    with target.open("a", encoding="utf-8") as lines:

        def write(row: dict[str, Any]) -> None:
            lines.write(json.dumps({"run": run, **row, **more(row)}) + "\n")
            lines.flush()

        write(provenance(shop))
        for seed in seeds:
            failed += measure(shop, chosen, seed, write)
    if failed:
        print(f"failed: {', '.join(dict.fromkeys(failed))}", file=sys.stderr)
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.run", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=[], help="names, or LABEL=METHOD:JSON; default: all")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; appended to")
    parser.add_argument("--rows", type=int, default=500, help="test rows per task, 0 for all")
    parser.add_argument("--adapter-seed", type=int, default=0)
    options = parsed(parser, argv)
    chosen = suites.suite(options.suite)
    base = suites.base(chosen.base)
    wanted = [c for text in options.methods for c in parse(text, base)] or configurations(base)
    shop = Workshop(
        chosen, cache_folder(options.cache), adapter_seed=options.adapter_seed, rows=options.rows or None
    )
    return record(options.out, shop, wanted, options.seeds)


if __name__ == "__main__":
    ended(main)
