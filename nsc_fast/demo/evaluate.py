"""Scores an encoder on the demo's test rows, with updates added to its weights for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nsc_fast.demo.tasks import (
    Row,
    Task,
    batches,
    collate,
    collate_targets,
    encode,
    metric,
    new_head,
    predict,
    targets,
)
from nsc_fast.factors import LowRankUpdate

__all__ = ["TestSet", "applied", "evaluate", "load_head", "test_set"]

BATCH = 64


@dataclass(frozen=True)
class TestSet:
    """A task with its head and its test rows, tokenised and batched once for many evaluations.

    Attributes:
        task: what it is.
        head: the head that was trained with the task's adapter.
        inputs: model inputs, one dict per batch.
        answers: targets, one tensor per batch.
    """

    __test__ = False  # not a test case, whatever its name looks like to pytest

    task: Task
    head: nn.Linear
    inputs: tuple[dict[str, Tensor], ...]
    answers: tuple[Tensor, ...]

    @property
    def rows(self) -> int:
        """Number of test rows."""
        return sum(len(answer) for answer in self.answers)


def load_head(task: Task, folder: Path | None = None) -> nn.Linear:
    """The head that was trained with the adapter in ``folder``; default: the bundled adapter."""
    head = new_head(task)
    state = load_file((folder or task.adapter) / "head.safetensors")
    head.load_state_dict({key: value.float() for key, value in state.items()})
    return head.requires_grad_(False)


def test_set(task: Task, head: nn.Linear, tokenizer: Any, rows: Sequence[Row]) -> TestSet:
    """Tokenises and batches labeled rows.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError(f"no test rows for task {task.name!r}")
    examples = encode(task, tokenizer, rows)
    answers = targets(task, rows, examples)
    chosen = list(batches([len(e["input_ids"]) for e in examples], BATCH))
    return TestSet(
        task,
        head,
        tuple(collate([examples[i] for i in index]) for index in chosen),
        tuple(collate_targets(task, [answers[i] for i in index]) for index in chosen),
    )


test_set.__test__ = False  # type: ignore[attr-defined]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    tasks: Sequence[TestSet],
    *,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, float]:
    """Score of the encoder as it stands, with each task's own head.

    Args:
        model: takes the model inputs by name, returns ``last_hidden_state``.
        tasks: see :func:`test_set`.
        progress: called after each batch with its number of rows.

    Returns:
        task name -> metric (larger is better), in the order given.
    """
    scores = {}
    for task in tasks:
        outputs = []
        for batch in task.inputs:
            states = model(**batch).last_hidden_state
            outputs.append(predict(task.task, task.head, states, batch["attention_mask"]))
            progress(len(states))
        scores[task.task.name] = metric(task.task, outputs, task.answers)
    return scores


@contextmanager
def applied(model: nn.Module, updates: Mapping[str, LowRankUpdate]) -> Iterator[nn.Module]:
    """Adds ``columns @ basis`` to the named weights, and puts the old weights back after.

    The weights come back bit for bit: they are kept, not subtracted from.

    Args:
        model: changed in place.
        updates: module name -> update to add to its ``weight``.

    Raises:
        ValueError: a module that the model does not have, or an update of another shape.
    """
    modules = dict(model.named_modules())
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for name, update in updates.items():
            if name not in modules:
                raise ValueError(f"the model has no module {name!r}")
            weight = modules[name].weight
            if update.shape != tuple(weight.shape):
                raise ValueError(
                    f"the update of {name!r} has shape {update.shape}, its weight {tuple(weight.shape)}"
                )
            kept.append((weight, weight.data.clone()))
            weight.data.add_(update.dense().to(weight.dtype))
        yield model
    finally:
        for weight, original in kept:
            weight.data.copy_(original)
