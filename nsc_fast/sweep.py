"""A grid over a data-free method's parameters: every point merged in one process, scored, the best kept.

The base model is loaded once and the canonical factors are computed once. A point's score comes from a
command of the user, or without labels from the null-space ratio on the recipe's unlabeled data.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from . import methods
from .batches import Batch, token_batch, without_labels
from .coefficients import block_of
from .data import check_data, read_data
from .errors import MergeError, RecipeError
from .loss import NSCLoss
from .merge import Prepared, prepare_recipe
from .parameters import Strict
from .recipe import BaseSpec, Recipe
from .result import MergeResult
from .targets import select_targets
from .verify import applied

__all__ = ["GRIDS", "Point", "Sweep", "label_free", "parse_grid", "sweep"]

Grid = Mapping[str, Sequence[Any]]


def _tenths(last: float) -> tuple[float, ...]:
    return tuple(n / 10 for n in range(1, round(10 * last) + 1))


# The grids that the methods' own papers and repositories search.
GRIDS: dict[str, Grid] = {
    "task_arithmetic": {"scaling": _tenths(1.0)},
    "ties": {"scaling": _tenths(1.0)},
    "dare": {"scaling": _tenths(1.0)},
    "dare_ties": {"scaling": _tenths(1.0)},
    "knots_ties": {"scaling": _tenths(1.0)},
    "knots_dare_ties": {"scaling": _tenths(1.0)},
    "core_space": {"scaling": (0.1, 0.3, 0.5, 0.7, 0.9)},
    "tsv": {"scaling": _tenths(3.0)},
    "iso_c": {"scaling": _tenths(3.0)},
    "iso_cts": {"scaling": _tenths(3.0)},
    "linear": {"scaling": _tenths(1.0)},
}

ARGUMENT = "NSC_FAST_ADAPTER"


@dataclass(frozen=True)
class Point:
    """One point of the grid.

    Attributes:
        values: of the parameters in the grid.
        score: by the command, or the mean null-space ratio.
        parts: null-space ratio of every task, if that is the score.
        seconds: of merge and score.
    """

    values: Mapping[str, Any]
    score: float
    parts: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Sweep:
    """What :func:`sweep` found.

    Attributes:
        method: its name.
        score: how points were scored.
        higher_is_better: otherwise lower.
        points: in the order of the grid.
        best: index of the best point; the first of equals.
        result: the merge of the best point.
    """

    method: str
    score: str
    higher_is_better: bool
    points: tuple[Point, ...]
    best: int
    result: MergeResult

    def save(self, out: str | os.PathLike[str], recipe: Recipe, *, overwrite: bool = False) -> None:
        """Writes the best merge as an adapter, with ``nsc_fast/sweep.json`` beside it."""
        _write(self.result, recipe, out, overwrite=overwrite)
        file = Path(out) / "nsc_fast" / "sweep.json"
        file.write_text(json.dumps(self.table(), indent=2) + "\n", encoding="utf-8")

    def table(self) -> dict[str, Any]:
        """All of it but the merge, as JSON holds it."""
        return {
            "method": self.method,
            "score": self.score,
            "higher_is_better": self.higher_is_better,
            "best": self.best,
            "points": [asdict(point) for point in self.points],
        }


def parse_grid(settings: Iterable[str]) -> dict[str, list[Any]]:
    """``["scaling=0.1,0.2", "trim=exact"]`` as a grid.

    Raises:
        RecipeError: no ``KEY=VALUES``, a missing value, or a key that is given twice.
    """
    grid: dict[str, list[Any]] = {}
    for setting in settings:
        key, equals, values = setting.partition("=")
        parts = [part.strip() for part in values.split(",")]
        if not equals or not all(parts):
            raise RecipeError(f"--grid {setting!r}: write KEY=VALUE,VALUE,...")
        if key in grid:
            raise RecipeError(f"--grid {key!r} is given twice; write all its values after one KEY=")
        grid[key] = [yaml.safe_load(part) for part in parts]
    return grid


def sweep(
    recipe: Recipe,
    grid: Grid | None = None,
    *,
    command: str | None = None,
    device: str | torch.device = "cpu",
    impl: str = "auto",
    on_stage: Callable[[str], None] = lambda _: None,
    on_point: Callable[[Point], None] = lambda _: None,
) -> Sweep:
    """Merges and scores every point of a grid.

    Args:
        recipe: names a data-free method. Its data serve the label-free score, and no merge.
        grid: parameter -> values, or ``weight.TASK`` -> values. Default: :data:`GRIDS` of the method.
        command: of a shell; gets the folder of a candidate as its last argument and in ``NSC_FAST_ADAPTER``,
            and prints a number, the higher the better, in its last line. Default: the label-free score.
        device: of the base model.
        impl: of the label-free score: "auto", "triton" or "torch".
        on_stage: told what is being done.
        on_point: called after each point.

    Raises:
        RecipeError: unknown parameters or values that the method does not take, before anything is loaded.
        MergeError: a method that needs data, missing data, or a command that fails or prints no number.
    """
    method = methods.get(recipe.merge_method)
    points = _points(recipe, method, GRIDS.get(method.name) if grid is None else grid)
    specs = [spec for spec in recipe.adapters if spec.data is not None]
    if command is None:
        if missing := [spec.name for spec in recipe.adapters if spec.data is None]:
            raise MergeError(
                f"adapter {missing[0]!r} has no data, which the label-free score needs; give it some, or "
                "score with a command"
            )
        for spec in specs:
            check_data(spec.name, spec.data, recipe.seed)
    bare = [spec.model_copy(update={"data": None}) for spec in recipe.adapters]
    data_free = recipe.model_copy(update={"adapters": tuple(bare)})
    prepared, model = prepare_recipe(data_free, device=device, impl=impl, on_stage=on_stage)
    if command is None:
        on_stage("reading data")
        base = BaseSpec(**prepared.recipe["base_model"])
        data, _ = read_data(recipe, base, prepared.common["task_type"])
        score = label_free(prepared, model, data, impl=impl)
        sign, told = -1.0, "mean null-space ratio"
    else:
        score = _commanded(command, recipe)
        sign, told = 1.0, command
    scored: list[Point] = []
    best: tuple[float, int, MergeResult] | None = None
    for number, (values, parameters, weights) in enumerate(points):
        on_stage(f"point {number + 1} of {len(points)}: {_told(values)}")
        start = time.perf_counter()
        result = prepared.run(method, parameters, weights)
        value, parts = score(values, result)
        point = Point(values, value, parts, round(time.perf_counter() - start, 3))
        scored.append(point)
        on_point(point)
        if best is None or sign * value > best[0]:
            best = sign * value, number, result
    return Sweep(method.name, told, sign > 0, tuple(scored), best[1], best[2])


def _points(
    recipe: Recipe, method: methods.Method, grid: Grid | None
) -> list[tuple[dict[str, Any], Strict, dict[str, float]]]:
    """Values, parameters and weights of every point, all of them valid."""
    if method.needs_data:
        raise MergeError(
            f"method {method.name!r} finds its coefficients by itself, with data; sweep searches the "
            "parameters of data-free methods such as 'task_arithmetic'"
        )
    if not grid:
        raise RecipeError(f"method {method.name!r} has no grid of its own; give --grid KEY=VALUE,VALUE,...")
    weights = [f"weight.{spec.name}" for spec in recipe.adapters]
    known = [*method.parameters.model_fields, *weights]
    for key in grid:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise RecipeError(f"method {method.name!r} has no parameter {key!r} to sweep; {hint}")
    out = []
    for chosen in itertools.product(*grid.values()):
        values = dict(zip(grid, chosen, strict=True))
        own = {key: value for key, value in values.items() if key not in weights}
        parameters = recipe.model_copy(update={"parameters": {**recipe.parameters, **own}})
        given = {key.partition(".")[2]: _number(key, values[key]) for key in weights if key in values}
        out.append((values, parameters.method_parameters(), given))
    return out


def _number(key: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"--grid {key}: {value!r} is not a number") from error


def _told(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


Score = Callable[[Mapping[str, Any], MergeResult], tuple[float, dict[str, float]]]


def label_free(
    prepared: Prepared, model: nn.Module, data: Mapping[str, Iterable[Batch]], *, impl: str = "auto"
) -> Score:
    """Mean null-space ratio of the tasks' own activations under a merge, over the default target modules.

    These are those of method "nsc": the adapted modules of the last quarter of the blocks, or all where the
    adapted modules stand in no blocks. Every task counts the same, and within a task every token.
    """
    downs = {
        task: {module: factors.down for module, factors in own.items()}
        for task, own in prepared.inputs.factors.items()
    }
    order = [name for name, _ in model.named_modules()]
    adapted = [name for name in order if any(name in own for own in downs.values())]
    blocks = any(block_of(module) is not None for module in adapted)
    targets = select_targets(adapted, layers="last_quarter" if blocks else "all", all_modules=order)
    inside = {task: {m: a for m, a in own.items() if m in targets} for task, own in downs.items()}
    if lacking := [task for task, own in inside.items() if not own]:
        raise MergeError(f"task {lacking[0]!r} adapts none of the {len(targets)} target modules")
    loss = NSCLoss(inside, impl=impl).to(next(model.parameters()).device)
    batches = {task: [without_labels(batch) for batch in own] for task, own in data.items()}

    @torch.no_grad()
    def score(values: Mapping[str, Any], result: MergeResult) -> tuple[float, dict[str, float]]:
        parts = {}
        with applied(model, result.updates):
            for task, own in batches.items():
                parts[task] = _task_ratio(loss, model, task, own)
                if not math.isfinite(parts[task]):
                    raise MergeError(
                        f"the null-space ratio of task {task!r} at {_told(values)} is not a number; load the "
                        "base model in float32"
                    )
        return sum(parts.values()) / len(parts), parts

    return score


def _task_ratio(loss: NSCLoss, model: nn.Module, task: str, batches: Iterable[Batch]) -> float:
    device = next(model.parameters()).device
    total = tokens = 0.0
    for batch in batches:
        moved = {key: value.to(device) for key, value in batch.items()}
        masks = token_batch(moved, 0, device)
        # A decoder without inputs of its own is given those of the encoder.
        mask, decoder_mask = masks.mask, masks.decoder_mask if masks.decoder else masks.mask
        with loss.watch(model, task, mask, decoder_mask=decoder_mask) as seen:
            model(**moved)
        weight = float(next(iter(moved.values())).shape[0] if mask is None else mask.sum())
        total, tokens = total + weight * float(seen.loss.detach()), tokens + weight
    return total / tokens


def _commanded(command: str, recipe: Recipe) -> Score:
    """The number that a command prints for the folder of a candidate."""

    def score(values: Mapping[str, Any], result: MergeResult) -> tuple[float, dict[str, float]]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "candidate"
            _write(result, recipe, folder)
            quoted = subprocess.list2cmdline([str(folder)]) if os.name == "nt" else shlex.quote(str(folder))
            done = subprocess.run(
                f"{command} {quoted}",
                shell=True,
                env={**os.environ, ARGUMENT: str(folder)},
                capture_output=True,
                text=True,
            )
        if done.returncode != 0:
            last = " | ".join(done.stderr.strip().splitlines()[-3:]) or "it wrote no message"
            raise MergeError(
                f"the score command failed at {_told(values)} with exit code {done.returncode}: {last}"
            )
        return _last_number(done.stdout, values), {}

    return score


def _last_number(output: str, values: Mapping[str, Any]) -> float:
    lines = output.strip().splitlines()
    try:
        value = float(lines[-1])
    except (IndexError, ValueError) as error:
        told = f"its last line is {lines[-1]!r}" if lines else "it printed nothing"
        raise MergeError(
            f"the score command printed no number at {_told(values)}: {told}; the last line must be the score"
        ) from error
    if not math.isfinite(value):
        raise MergeError(f"the score command printed {value} at {_told(values)}; a score is a finite number")
    return value


def _write(
    result: MergeResult, recipe: Recipe, out: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    dtype = getattr(torch, recipe.output.dtype)
    result.save_pretrained(out, max_rank=recipe.output.max_rank, dtype=dtype, overwrite=overwrite)
