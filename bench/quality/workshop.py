"""A suite with everything that merging and scoring need, and the configurations that are compared on it."""

from __future__ import annotations

import ctypes
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nsc_fast import methods
from nsc_fast.adapters import Adapter, read_adapter
from nsc_fast.demo.evaluate import applied
from nsc_fast.demo.run import PAPER
from nsc_fast.errors import MergeError
from nsc_fast.factors import LowRankUpdate
from nsc_fast.merge import check_needs, prepare
from nsc_fast.methods import MergeInputs
from nsc_fast.parameters import Strict
from nsc_fast.result import MergeResult

from . import suites
from .base import Base, Suite, Task
from .train import EVALUATION_BATCH, adapter_folder, evaluate, is_trained

__all__ = [
    "LANGUAGE",
    "UNLABELED",
    "UNLABELED_BATCH",
    "Configuration",
    "Merged",
    "Workshop",
    "configurations",
    "defaults",
    "parse",
]

UNLABELED = 800
"""Unlabeled rows per task: none comes twice within the paper's 100 steps of 8 rows.

In generation tasks the task's own adapter answers them first, once per seed, which takes one or several
minutes.
"""

UNLABELED_BATCH = 8

LANGUAGE = {"steps": 500, "learning_rate": 3e-4, "init": 0.4}
"""The paper's settings of null-space compression for language models; ``PAPER`` are those for others."""


@dataclass(frozen=True)
class Configuration:
    """One row of the tables.

    Attributes:
        label: name of the row.
        method: of ``nsc_fast.methods``.
        parameters: of the method, beside its defaults.
    """

    label: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


def configurations(base: Base) -> list[Configuration]:
    """The default ones for a base model."""
    out = []
    for name in methods.names():
        if not methods.get(name).one_model:
            continue
        if name == "task_arithmetic":
            out += [Configuration(f"{name} {value}", name, {"scaling": value}) for value in (0.3, 0.4)]
        elif name == "uniform":
            out.append(Configuration("uniform (1/K)", name))
        else:
            out.append(Configuration(name, name, defaults(name, base)))
    return out


def defaults(method: str, base: Base) -> dict[str, Any]:
    """Settings of a method for a base model: target modules, and what the paper chose for its kind."""
    parameters: dict[str, Any] = {}
    if method == "nsc":
        parameters.update(LANGUAGE if base.name == "smollm2" else PAPER)
    if "scope" in methods.get(method).parameters.model_fields:
        parameters["scope"] = base.target_scope
    return parameters


def parse(text: str, base: Base) -> list[Configuration]:
    """``NAME``, or ``LABEL=METHOD:JSON`` whose parameters go over the defaults of the method here.

    Raises:
        MergeError: unreadable, or an unknown method.
    """
    label, separator, rest = text.partition("=")
    if not separator:
        methods.get(text)
        return [c for c in configurations(base) if c.method == text]
    method, _, parameters = rest.partition(":")
    methods.get(method)
    try:
        own = json.loads(parameters or "{}")
    except json.JSONDecodeError as error:
        raise MergeError(f"--methods {text!r}: the parameters are not JSON ({error})") from error
    return [Configuration(label, method, {**defaults(method, base), **own})]


@dataclass(frozen=True)
class Merged:
    """A merge with what it cost: CPU seconds of its two parts, MiB that the process grew by at most."""

    updates: Mapping[str, LowRankUpdate]
    parameters: Mapping[str, Any]
    preparation: float
    optimisation: float
    peak: float | None
    history: Sequence[Any] = ()
    notices: tuple[str, ...] = ()


class Workshop:
    """A suite's model, adapters, heads and encoded rows, loaded once for many merges.

    Args:
        chosen: the suite.
        cache: folder of the adapters.
        adapter_seed: which training of them.
        rows: test rows per task at most; None for all.
        batch: unlabeled rows of a task in one batch.

    Raises:
        MergeError: an adapter is missing; says how to train it.
    """

    def __init__(
        self,
        chosen: Suite,
        cache: Path,
        *,
        adapter_seed: int = 0,
        rows: int | None = 500,
        batch: int = UNLABELED_BATCH,
    ) -> None:
        self.suite, self.rows, self.adapter_seed, self.batch = chosen, rows, adapter_seed, batch
        self.base = suites.base(chosen.base)
        self.tasks: dict[str, Task] = {task.name: task for task in suites.tasks(chosen)}
        folders = {name: adapter_folder(cache, task, adapter_seed) for name, task in self.tasks.items()}
        missing = [name for name, folder in folders.items() if not is_trained(folder)]
        if missing:
            raise MergeError(
                f"suite {chosen.name!r}: {', '.join(missing)} not trained in {cache}; run: python -m "
                f"bench.quality.train --suite {chosen.name} --seed {adapter_seed} --cache {cache}"
            )
        self.model = self.base.load()
        self.adapters: dict[str, Adapter] = {n: read_adapter(f, name=n) for n, f in folders.items()}
        self.heads: dict[str, nn.Module] = {n: self._head(n, f) for n, f in folders.items()}
        self._tests: dict[tuple[str, int], list[tuple[dict[str, Tensor], Any]]] = {}
        self._answered: dict[tuple[str, int, int], Sequence[Any]] = {}

    def _head(self, name: str, folder: Path) -> nn.Module:
        head = self.base.new_head(self.tasks[name])
        head.load_state_dict(load_file(folder / "head.safetensors"))
        return head.eval().requires_grad_(False)

    def tests(self, name: str, seed: int) -> list[tuple[dict[str, Tensor], Any]]:
        """Test batches of a task, encoded once."""
        if (name, seed) not in self._tests:
            task = self.tasks[name]
            examples = self.base.examples(task, "test", self.rows, seed)
            self._tests[name, seed] = list(self.base.batches(task, examples, EVALUATION_BATCH, None))
        return self._tests[name, seed]

    def unlabeled(self, seed: int, rows: int = UNLABELED) -> dict[str, list[dict[str, Tensor]]]:
        """Unlabeled batches of every task, from short to long.

        All tasks have lists of about equal length that are shuffled alike later, so that batches of like
        length meet. The rows of a generation task are prompts that the task's own adapter and head have
        answered; reference answers are not read.
        """
        out = {}
        for name, task in self.tasks.items():
            if task.kind == "generation":
                examples = self._generated(name, seed, rows)
            else:
                examples = self.base.examples(task, "train", rows, seed)
            out[name] = [x for x, _ in self.base.batches(task, examples, self.batch, None)]
        return out

    def _generated(self, name: str, seed: int, rows: int) -> Sequence[Any]:
        """Rows of a generation task with the adapter's own answers, made once."""
        key = name, seed, rows
        if key not in self._answered:
            task = self.tasks[name]
            examples = self.base.examples(task, "train", rows, seed)
            with applied(self.model, self.adapters[name].canonical()):
                self._answered[key] = self.base.answered(task, self.model, self.heads[name], examples)
        return self._answered[key]

    def score(
        self, updates: Mapping[str, LowRankUpdate], seed: int, names: Sequence[str]
    ) -> dict[str, float]:
        """Scores of the model with the updates added to its weights."""
        with applied(self.model, updates):
            return {
                n: evaluate(self.tasks[n], self.base, self.model, self.heads[n], self.tests(n, seed))
                for n in names
            }

    def fine_tuned(self, seed: int) -> dict[str, float]:
        """Score of every task with its own adapter alone."""
        return {n: self.score(a.canonical(), seed, [n])[n] for n, a in self.adapters.items()}

    def majority(self, name: str, seed: int) -> float | None:
        """Accuracy of always answering the commonest class of the test rows; None for other kinds."""
        if self.tasks[name].kind != "classification":
            return None
        counts = torch.cat([targets for _, targets in self.tests(name, seed)]).bincount()
        return float(counts.max() / counts.sum())

    def not_applicable(self, chosen: Configuration) -> str | None:
        """Why the configuration cannot be used on this suite; None when it can."""
        if chosen.method != "adamerging":
            return None
        others = [f"{n} ({task.kind})" for n, task in self.tasks.items() if task.kind != "classification"]
        return f"all tasks must be classification, unlike {', '.join(others)}" if others else None

    def merge(self, chosen: Configuration, seed: int) -> Merged:
        """One merge; see :class:`Merged` for what is measured."""
        method = methods.get(chosen.method)
        parameters = method.parameters(**chosen.parameters)
        data = self.unlabeled(seed) if method.needs_data else None
        check_needs(method, True, data)
        with _peak_memory() as peak:
            started = time.process_time()
            model = self.model if method.needs_data else None
            prepared = prepare(model, self.adapters, data, seed=seed, base_name=self.base.name)
            ready = time.process_time()
            if chosen.method == "adamerging":
                result = self._with_heads(prepared.inputs, method, parameters)
            else:
                result = prepared.run(method, parameters)
            done = time.process_time()
        return Merged(
            result.updates,
            result.parameters,
            ready - started,
            done - ready,
            peak(),
            result.history,
            result.notices,
        )

    def _with_heads(self, inputs: MergeInputs, method: methods.Method, parameters: Strict) -> MergeResult:
        """A merge by predictions: the heads stand behind the base model, which moves to ``body``."""
        name = next(iter(self.tasks))
        predictor = _Predictor(self.base, self.tasks[name], self.model, self.base.new_head(self.tasks[name]))
        moved = MergeInputs(
            updates={t: {f"body.{m}": u for m, u in own.items()} for t, own in inputs.updates.items()},
            model=predictor.eval(),
            data=inputs.data,
            heads={
                t: {f"head.{key}": value for key, value in head.state_dict().items()}
                for t, head in self.heads.items()
            },
            seed=inputs.seed,
            impl=inputs.impl,
        )
        result = method.run(moved, parameters)
        return replace(result, updates={m.removeprefix("body."): u for m, u in result.updates.items()})


class _Predictor(nn.Module):
    """A base model with a head behind it, which gives the predictions of one kind of task."""

    def __init__(self, base: Base, task: Task, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.base, self.task, self.body, self.head = base, task, body, head

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.base.predict(self.task, self.body, self.head, inputs)


@contextmanager
def _peak_memory() -> Iterator[Callable[[], float | None]]:
    """Yields what tells, afterwards, how many MiB the resident set grew by at most inside."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        yield lambda: None
        return

    def read(field_name: str) -> float:
        line = next(x for x in status.read_text().splitlines() if x.startswith(field_name))
        return int(line.split()[1]) / 1024

    # Freed memory that the process still holds would be used again without growing it.
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    reset.write_text("5")
    before, after = read("VmRSS"), []
    yield lambda: round(after[0] - before, 1)
    after.append(read("VmHWM"))
