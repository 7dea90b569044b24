"""Trains the adapters of a suite: one LoRA adapter and one head per task, with the measurements on the way.

    python -m bench.quality.train --suite text [--task NAME ...] [--cache DIR] [--steps N] [--seed S]

Writes ``DIR/BASE/TASK/seedS/``: PEFT's two files, ``head.safetensors`` and ``training.json``, which holds
loss, score on held-out rows and null-space ratio of every module against the step, and is written last. A
task that has it is skipped; a run that was ended continues from its last checkpoint, with the same result
as one that was not; several runs may share the tasks of a suite. Neither base nor adapter uses dropout.

The adapters stay outside the repository: some of the data may not be redistributed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor, nn

from nsc_fast import NSCLoss
from nsc_fast.errors import MergeError
from nsc_fast.parameters import Scope
from nsc_fast.targets import block_of, select_targets

from . import suites
from .base import Base, Task
from .command import cache_folder, ended, parsed

__all__ = ["adapter_folder", "evaluate", "is_trained", "main", "train"]

WARMUP = 0.06
CLIP = 1.0
WEIGHT_DECAY = 0.01
PROBES = 9
CHECKPOINT_EVERY = 100
EVALUATION_BATCH = 64
_RECORD, _STATE = "training.json", "checkpoint.pt"


def adapter_folder(cache: Path, task: Task, seed: int) -> Path:
    """Where the adapter of a task is kept."""
    return cache / task.base / task.name / f"seed{seed}"


def is_trained(folder: Path) -> bool:
    """Whether the training there has ended."""
    return (folder / _RECORD).is_file()


@dataclass
class _Run:
    """A training as it stands; everything that a checkpoint holds."""

    model: nn.Module
    head: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    step: int = 0
    epoch: int = 0
    position: int = 0
    running: float | None = None
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)

    _PLAIN = ("step", "epoch", "position", "running", "seconds", "curve")

    def save(self, path: Path, recipe: dict[str, Any]) -> None:
        """Writes the state, first beside, then in place: a reader never sees half of it."""
        state = {name: getattr(self, name) for name in self._PLAIN}
        state["recipe"] = recipe
        state["adapter"] = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        state["head"] = self.head.state_dict()
        state["optimizer"] = self.optimizer.state_dict()
        state["schedule"] = self.schedule.state_dict()
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, path: Path, recipe: dict[str, Any]) -> None:
        """Continues from a state.

        Raises:
            MergeError: it belongs to another recipe.
        """
        state = torch.load(path, weights_only=True)
        if state["recipe"] != recipe:
            raise MergeError(
                f"{path} belongs to a training with {state['recipe']}, not {recipe}; remove its folder, or "
                "choose another cache"
            )
        for name in self._PLAIN:
            setattr(self, name, state[name])
        with torch.no_grad():
            parameters = dict(self.model.named_parameters())
            for name, value in state["adapter"].items():
                parameters[name].copy_(value)
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def train(
    task: Task,
    base: Base,
    out: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    stop_after: int | None = None,
) -> bool:
    """Trains one adapter and its head, or goes on where an earlier run ended.

    Args:
        task: one of ``base``'s.
        base: the base model.
        out: folder of the adapter.
        seed: of the initial weights and of the order of the rows.
        steps: default: the task's own.
        stop_after: ends after this step as if the run had been killed there, for tests.

    Returns:
        Whether the training has ended.

    Raises:
        MergeError: ``out`` holds a training with other settings, or the loss is not finite.
    """
    total = steps or task.steps
    recipe = {
        "steps": total,
        "seed": seed,
        "batch": task.batch,
        "rank": base.lora.rank,
        "alpha": base.lora.alpha,
        "modules": list(base.lora.modules),
        "rate": base.lora.rate,
        "head_rate": base.lora.head_rate,
        "weight_decay": WEIGHT_DECAY,
    }
    if is_trained(out):
        _check_record(out, recipe)
        return True
    out.mkdir(parents=True, exist_ok=True)
    run = _start(task, base, seed, total)
    examples = base.examples(task, "train", None, 0)
    held_out = base.examples(task, "held_out", None, 0)
    if (out / _STATE).is_file():
        run.resume(out / _STATE, recipe)
        print(f"{task.name}: continues from step {run.step}", flush=True)
    else:
        run.curve.append(_probe(task, base, run, held_out))
    probes = {round(total * i / (PROBES - 1)) for i in range(PROBES)}
    stream = _stream(task, base, examples, run, seed)
    while run.step < total:
        _step(task, base, run, *next(stream))
        if run.step in probes:
            run.curve.append(_probe(task, base, run, held_out))
            print(task.name, _line(run.curve[-1]), f"{run.seconds:.0f} s", flush=True)
        if run.step % CHECKPOINT_EVERY == 0 and run.step < total:
            run.save(out / _STATE, recipe)
        if stop_after is not None and run.step >= stop_after:
            return False
    _save(run, out)
    record = {
        "task": task.name,
        "base": task.base,
        "metric": task.metric,
        **recipe,
        "train_rows": len(examples),
        "held_out_rows": len(held_out),
        "seconds": round(run.seconds, 1),
        "threads": torch.get_num_threads(),
        "targets": list(_targets(base, run.model)),
        "random_subspace_ratio": _random_ratios(run.model),
        "curve": run.curve,
    }
    partial = out / f"{_RECORD}.partial"
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(out / _RECORD)
    (out / _STATE).unlink(missing_ok=True)
    return True


def _check_record(out: Path, recipe: dict[str, Any]) -> None:
    record = json.loads((out / _RECORD).read_text(encoding="utf-8"))
    other = {key: record.get(key) for key in recipe if record.get(key) != recipe[key]}
    if other:
        raise MergeError(
            f"{out} holds an adapter that was trained with other settings ({other}); remove the folder, or "
            "choose another cache"
        )


def _start(task: Task, base: Base, seed: int, total: int) -> _Run:
    from peft import LoraConfig, get_peft_model

    # Adapters that people merge were trained apart. From one seed they would all start at the same A, and
    # their row spaces would overlap by about 70 % instead of r / d.
    torch.manual_seed(zlib.crc32(f"{seed} {task.name}".encode()))
    model = base.load()
    config = LoraConfig(
        r=base.lora.rank, lora_alpha=base.lora.alpha, target_modules=list(base.lora.modules), lora_dropout=0.0
    )
    model = get_peft_model(model, config).eval()
    head = base.new_head(task)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.requires_grad], "lr": base.lora.rate},
            {"params": list(head.parameters()), "lr": base.lora.head_rate},
        ],
        weight_decay=WEIGHT_DECAY,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, total))
    return _Run(model, head, optimizer, schedule)


def rate_at(step: int, steps: int) -> float:
    """Factor on the learning rate: linear warm-up, then linear decay to zero."""
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, max(0.0, (steps - step) / (steps - warmup)))


def _stream(task: Task, base: Base, examples: Sequence[Any], run: _Run, seed: int) -> Iterator[tuple]:
    """Endless batches, from where the run stands; keeps epoch and position in it."""
    while True:
        skipped = run.position
        for number, batch in enumerate(
            base.batches(task, examples, task.batch, seed=1_000_003 * seed + run.epoch)
        ):
            if number < skipped:
                continue
            run.position = number + 1
            yield batch
        run.epoch, run.position = run.epoch + 1, 0


def _step(task: Task, base: Base, run: _Run, inputs: dict[str, Tensor], targets: Any) -> None:
    started = time.perf_counter()
    loss = base.loss(task, base.predict(task, run.model, run.head, inputs), targets)
    value = loss.item()
    if not math.isfinite(value):
        raise MergeError(f"task {task.name!r}: the loss is {value} at step {run.step + 1}; lower the rate")
    run.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for g in run.optimizer.param_groups for p in g["params"]], CLIP)
    run.optimizer.step()
    run.schedule.step()
    run.step += 1
    run.running = value if run.running is None else 0.95 * run.running + 0.05 * value
    run.seconds += time.perf_counter() - started


@torch.inference_mode()
def evaluate(
    task: Task,
    base: Base,
    model: nn.Module,
    head: nn.Module,
    batches: Sequence[tuple[dict[str, Tensor], Any]],
) -> float:
    """Score on batches with targets."""
    outputs = [base.predict(task, model, head, inputs) for inputs, _ in batches]
    return base.score(task, outputs, [targets for _, targets in batches])


def _probe(task: Task, base: Base, run: _Run, rows: Sequence[Any]) -> dict[str, Any]:
    """Score and null-space ratios on held-out rows, with the adapter as it stands.

    The ratio of a module is the mean over the tokens; padding counts where the attention mask has another
    form than ``(B, S)``.
    """
    ratio = NSCLoss.from_peft_model(run.model)
    sums: dict[str, float] = {}
    outputs, targets, tokens = [], [], 0
    with torch.inference_mode():
        for inputs, target in base.batches(task, rows, EVALUATION_BATCH, None):
            mask = inputs.get("attention_mask")
            mask = mask if mask is not None and mask.ndim == 2 else None
            with ratio.watch(run.model, ratio.tasks[0], mask=mask) as seen:
                outputs.append(base.predict(task, run.model, run.head, inputs))
            count = _weight(inputs) if mask is None else int(mask.sum())
            tokens += count
            targets.append(target)
            for name, mean in seen.breakdown.items():
                sums[name] = sums.get(name, 0.0) + count * float(mean)
        score = base.score(task, outputs, targets)
    ratios = {name: total / tokens for name, total in sums.items()}
    chosen = _targets(base, run.model)
    blocks: dict[int, list[float]] = {}
    for name, value in ratios.items():
        if (block := block_of(name)) is not None:
            blocks.setdefault(block[1], []).append(value)
    return {
        "step": run.step,
        "loss": None if run.running is None else round(run.running, 5),
        "held_out": round(score, 5),
        "ratio": round(sum(ratios[m] for m in chosen) / len(chosen), 5),
        "ratio_per_block": [round(sum(v) / len(v), 5) for _, v in sorted(blocks.items())],
        "ratio_per_module": {name: round(value, 5) for name, value in ratios.items()},
    }


def _weight(inputs: dict[str, Tensor]) -> int:
    """Tokens of a batch without a plain mask; rows, where the tokens of all rows are equally many."""
    first = inputs.get("input_ids", next(iter(inputs.values())))
    return first.numel() if "input_ids" in inputs else len(first)


def _targets(base: Base, model: nn.Module) -> tuple[str, ...]:
    """Target modules of the merge: paths in the base model."""
    scope = Scope(**base.target_scope)
    prefix = "base_model.model."
    adapted = [n.removeprefix(prefix) for n, m in model.named_modules() if hasattr(m, "lora_A")]
    return select_targets(adapted, layers=scope.layers, names=scope.filter)


def _random_ratios(model: nn.Module) -> dict[str, float]:
    """Width -> ratio that a random subspace of the adapter's rank has in the mean."""
    layers = [m.lora_A["default"].weight for m in model.modules() if hasattr(m, "lora_A")]
    return {str(w): round(math.sqrt(1 - r / w), 5) for r, w in {tuple(a.shape) for a in layers}}


def _line(probe: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in probe.items() if key != "ratio_per_module"})


def _save(run: _Run, out: Path) -> None:
    """PEFT's two files and ``head.safetensors``, in float32."""
    # save_embedding_layers: otherwise PEFT asks the hub about the base model's vocabulary.
    run.model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)  # an empty form
    state = {key: value.detach().contiguous() for key, value in run.head.state_dict().items()}
    save_file(state, out / "head.safetensors")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.train", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--task", action="append", default=[], help="repeatable; default: all of the suite")
    parser.add_argument("--steps", type=int, help="default: each task's own")
    parser.add_argument("--seed", type=int, default=0)
    options = parsed(parser, argv)
    chosen = suites.suite(options.suite)
    base, cache = suites.base(chosen.base), cache_folder(options.cache)
    for name in options.task or chosen.tasks:
        task = suites.task(chosen.base, name)
        out = adapter_folder(cache, task, options.seed)
        out.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(out / ".lock", blocking=False):
                train(task, base, out, seed=options.seed, steps=options.steps)
        except Timeout:
            print(f"{task.name}: another process trains it", flush=True)


if __name__ == "__main__":
    ended(main)
