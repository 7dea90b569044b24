"""A label-free score of a finished merge, on rows that nothing was fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..batches import Batch, cut, rows
from ..factors import LowRankUpdate
from ..packing import divisible
from .anchors import Anchors
from .running import adapted, evaluating
from .states import StatesRunner

__all__ = ["Score", "held_out", "score"]


@dataclass(frozen=True)
class Score:
    """Distances of one merge; see :mod:`nsc_fast.objectives.anchors`.

    Attributes:
        distances: task -> distance to the task's adapter alone, 1 for the base model.
    """

    distances: Mapping[str, float]

    @property
    def mean(self) -> float:
        return sum(self.distances.values()) / len(self.distances)

    @property
    def worst(self) -> float:
        return max(self.distances.values())

    @property
    def value(self) -> float:
        """Half the mean and half the worst: no task may pay for the others. Lower is better."""
        return (self.mean + self.worst) / 2


def score(
    model: nn.Module,
    updates: Mapping[str, LowRankUpdate],
    tasks: Mapping[str, Anchors],
    *,
    micro_batch: int | None = None,
) -> Score:
    """One forward pass over the anchors' rows of every task under the merge, ``micro_batch`` at a time."""
    runner = StatesRunner(model, tuple(updates), micro_batch)
    distances = {}
    with evaluating(model), adapted(model, updates):
        for task, own in tasks.items():
            own = own.to(runner.device)
            seen = [own.of_views(a, a.tokens(runner.states(a.inputs))) for a in own.batches]
            views = [torch.cat(view).mean() for view in zip(*seen, strict=True)]
            distances[task] = float(torch.stack(views).mean())
    return Score(distances)


def held_out(
    batches: Mapping[str, Sequence[Mapping[str, Tensor]]], every: int = 4
) -> tuple[dict[str, list[Mapping[str, Tensor]]], dict[str, list[Mapping[str, Tensor]]]]:
    """Batches to fit and batches to judge by: every ``every``-th batch is held out.

    Where a task has fewer batches than ``every``, its batches are halved until there are enough.

    Raises:
        ValueError: a task has one row only; names it.
    """
    fitted, kept = {}, {}
    for task, own in batches.items():
        parts = list(own)
        while len(parts) < every:
            finer = [half for part in parts for half in _halves(part)]
            if len(finer) == len(parts):
                break
            parts = finer
        if len(parts) < 2:
            raise ValueError(
                f"task {task!r} has one unlabeled row only, or one batch that cannot be divided; judging a "
                "merge needs two at least"
            )
        step = min(every, len(parts))
        kept[task] = parts[step - 1 :: step]
        fitted[task] = [part for i, part in enumerate(parts) if i % step != step - 1]
    return fitted, kept


def _halves(batch: Batch) -> list[dict[str, Tensor]]:
    count = rows(batch)
    return cut(batch, [0, count // 2, count]) if count > 1 and divisible(batch) else [dict(batch)]
