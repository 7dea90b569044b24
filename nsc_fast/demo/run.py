"""The main job on real input: four adapters in, one merged adapter out, and what it can do.

``run`` compares the frozen base, each adapter alone, task arithmetic at several coefficients, null-space
compression with the paper's settings, and the automatic choice, on rows that none of them was trained on.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from nsc_fast.adapters import Adapter, read_adapter
from nsc_fast.demo.encoder import BASE_MODEL, encoder_folder, load_encoder
from nsc_fast.demo.evaluate import TestSet, applied, evaluate, load_head, test_set
from nsc_fast.demo.table import FINE_TUNED, score_table, share_table, verdict
from nsc_fast.demo.tasks import TASKS, Task, batches, collate, encode
from nsc_fast.errors import MergeError
from nsc_fast.factors import LowRankUpdate
from nsc_fast.merge import merge_adapters
from nsc_fast.result import MergeResult
from nsc_fast.signal import signal_lines
from nsc_fast.verify import verify_output

__all__ = ["AUTO", "BASE", "COEFFICIENTS", "NSC", "Calibration", "DemoResult", "run"]

COEFFICIENTS = (0.3, 0.4, 0.5)
"""Of task arithmetic, beside 1/K."""

USUAL = (0.3, 0.4)
"""Those of them that are published as defaults."""

PAPER = {"steps": 100, "learning_rate": 1e-3, "init": 0.4}
"""The paper's settings for models of this size; the targets are the last quarter of the blocks."""

BASE = "base, no adapter"
NSC = "NSC"
AUTO = "auto"
AUTO_STEPS, AUTO_RATE = 30, 2e-2
"""Of the optimisation inside ``auto``: fewer and larger steps than its defaults, which take minutes."""
BATCH = {NSC: 4, AUTO: 8}
"""Unlabeled rows of a task in a step. These, ``AUTO_STEPS`` and ``TEST_ROWS`` bound the demo's time."""
TEST_ROWS = 160
SEED = 0


@dataclass
class DemoResult:
    """What a run of the demo found.

    Attributes:
        scores: method -> task -> score, in the order of the tables.
        seconds: stage -> time.
        nsc: what null-space compression returned.
        merged: what ``auto`` returned, which is the merge that is written.
        output: folder of the merged adapter, if one was written.
    """

    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    nsc: MergeResult | None = None
    merged: MergeResult | None = None
    output: Path | None = None


class Calibration:
    """Unlabeled batches of a task, always in the same order.

    The i-th batch of every task holds rows of the same length rank, and the order is shuffled alike for
    all tasks: where the i-th batches of all tasks go through the model together, little is spent on
    padding. Not a list, because the order of a list is shuffled anew for each task.
    """

    def __init__(self, task: Task, tokenizer: Any, batch: int, *, rows: int | None = None) -> None:
        examples = encode(task, tokenizer, task.rows("unlabeled")[:rows])
        chosen = list(batches([len(e["input_ids"]) for e in examples], batch))
        random.Random(SEED).shuffle(chosen)
        self.rows = len(examples)
        self._batches = [collate([examples[i] for i in index]) for index in chosen]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self._batches)


def run(
    out: Path | None = None,
    *,
    console: Console | None = None,
    test_rows: int | None = TEST_ROWS,
    steps: int | None = None,
) -> DemoResult:
    """Runs the demo and prints its tables.

    Args:
        out: writes the merged adapter there, with the heads of the tasks under ``heads/``. Must not
            exist, or be an empty folder.
        console: where to print; default: the terminal.
        test_rows: uses only so many test rows per task; None: all.
        steps: of null-space compression and of ``auto``; default: the paper's and
            ``AUTO_STEPS``.

    Returns:
        All scores and times, and the merge.

    Raises:
        MissingBaseModel: the package with the base model is not installed.
        MergeError: ``out`` is there already, or what was written does not pass its checks.
    """
    console = console or Console()
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MergeError(f"{out} exists already; choose another folder, or remove it first")
    result = DemoResult()
    clock = _clock(result.seconds)

    with clock("loading"), console.status("loading base model, adapters and rows"):
        encoder = load_encoder()
        adapters = {task.name: read_adapter(task.adapter, name=task.name) for task in TASKS}
        tests = [
            test_set(task, load_head(task), encoder.tokenizer, task.rows("test")[:test_rows])
            for task in TASKS
        ]
        data = {
            name: {task.name: Calibration(task, encoder.tokenizer, batch) for task in TASKS}
            for name, batch in BATCH.items()
        }
    console.print(
        f"{BASE_MODEL}: {len(TASKS)} adapters, {data[AUTO][TASKS[0].name].rows} unlabeled rows and "
        f"{tests[0].rows} test rows per task"
    )

    with clock("evaluation"):
        _known_methods(result, encoder.model, adapters, tests, console)
    merges = {}
    for name in (NSC, AUTO):
        with clock(f"{name} merge"):
            merges[name] = _merge(encoder.model, adapters, data[name], name, steps, console)
        with clock("evaluation"):
            result.scores[name] = _score(encoder.model, merges[name].updates, tests, name, console)
    result.nsc, result.merged = merges[NSC], merges[AUTO]
    if out is not None:
        with clock("writing and checks"), console.status("writing"):
            result.output = _write(out, result.merged, encoder.model, adapters)
    _report(console, result, tests)
    return result


def _known_methods(
    result: DemoResult,
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    tests: Sequence[TestSet],
    console: Console,
) -> None:
    """Scores of all that needs no data: fine-tuned, base, task arithmetic."""
    result.scores[FINE_TUNED] = {}
    with _bar(console, FINE_TUNED, sum(test.rows for test in tests)) as advance:
        for test in tests:
            with applied(model, adapters[test.task.name].canonical()):
                result.scores[FINE_TUNED] |= evaluate(model, [test], progress=advance)
    result.scores[BASE] = _score(model, {}, tests, BASE, console)
    for coefficient in sorted({*COEFFICIENTS, 1 / len(adapters)}):
        name = _label(coefficient, len(adapters))
        merged = merge_adapters(None, adapters, method="task_arithmetic", parameters={"scaling": coefficient})
        result.scores[name] = _score(model, merged.updates, tests, name, console)


def _label(coefficient: float, tasks: int) -> str:
    if coefficient == 1 / tasks:
        return f"uniform (1/K = {coefficient:g})"
    return f"task arithmetic {coefficient:g}"


def _score(
    model: nn.Module,
    updates: Mapping[str, LowRankUpdate],
    tests: Sequence[TestSet],
    label: str,
    console: Console,
) -> dict[str, float]:
    with _bar(console, label, sum(test.rows for test in tests)) as advance:
        with applied(model, updates):
            return evaluate(model, tests, progress=advance)


def _merge(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    data: Mapping[str, Calibration],
    name: str,
    steps: int | None,
    console: Console,
) -> MergeResult:
    """The merge by null-space compression or by ``auto``, with a bar over its optimisation steps."""
    if name == NSC:
        steps = PAPER["steps"] if steps is None else steps
        parameters = {**PAPER, "steps": steps}
    else:
        steps = AUTO_STEPS if steps is None else steps
        parameters = {"anchored_steps": steps, "anchored_rate": AUTO_RATE, "signal_rows": 0}
    with _bar(console, f"{name}, optimising", steps) as advance:
        return merge_adapters(
            model,
            adapters,
            data,
            method=name.lower(),
            parameters=parameters,
            seed=SEED,
            on_step=lambda record: advance(1),
        )


def _write(out: Path, merged: MergeResult, model: nn.Module, adapters: Mapping[str, Adapter]) -> Path:
    """Writes the merge with the heads beside it, which are no part of it, and checks what was written."""
    heads = {task.name: dict(load_head(task).state_dict()) for task in TASKS}
    report = replace(merged, heads=heads).save_pretrained(out)
    failed = [
        f"{check.name}: {check.value:.2g} (limit {check.limit:.2g}), {check.detail}"
        for check in verify_output(out, merged.updates, model, adapters=adapters)
        if not check.passed
    ]
    if failed:
        raise MergeError(f"the adapter in {out} does not pass its checks: {'; '.join(failed)}")
    return report.path


def _report(console: Console, result: DemoResult, tests: Sequence[TestSet]) -> None:
    tasks = [test.task for test in tests]
    others = [name for name in result.scores if name not in (FINE_TUNED, BASE, AUTO)]
    console.print(score_table(result.scores, tasks))
    console.print(share_table(result.scores, tasks))
    usual = [_label(coefficient, len(tasks)) for coefficient in USUAL]
    rows = min(test.rows for test in tests)
    console.print(verdict(result.scores, AUTO, others, usual=usual, rows=rows))
    history = result.nsc.history
    console.print(
        f"Null-space ratio, {len(history)} steps: "
        + ", ".join(f"{t} {history[0].ratios[t]:.3f} to {r:.3f}" for t, r in history[-1].ratios.items())
    )
    if result.nsc.signal is not None:
        for line in signal_lines(result.nsc.signal):
            console.print(f"  {line}", highlight=False)
    for notice in (*result.nsc.notices, *result.merged.notices):
        console.print(f"Note: {notice}", highlight=False)
    spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result.seconds.items())
    console.print(f"Time: {spent}.")
    if result.output is not None:
        console.print(f"Merged adapter: {result.output}", soft_wrap=True)
        command = f"nsc-fast verify {result.output} --base-model {encoder_folder()}"
        console.print(f"Checked: weights, reload through PEFT. Again with: {command}", soft_wrap=True)


def _clock(seconds: dict[str, float]) -> Callable[[str], AbstractContextManager[None]]:
    """A context that adds the time spent in it to ``seconds[stage]``."""

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    return stage


@contextmanager
def _bar(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar, gone when done; yields what advances it. In a log file, only a line."""
    if not console.is_interactive:
        console.print(f"... {label}")
        yield lambda done: None
        return
    columns = TextColumn("{task.description:<20}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        shown = progress.add_task(label, total=total)
        yield lambda done: progress.advance(shown, done)
