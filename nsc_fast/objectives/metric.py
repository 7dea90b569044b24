"""The metric by which last states are compared: the directions in which an adapter moves them.

    W = S^1/2 / tr S^1/2 + FLOOR I / d,        S = E[(h* - h0)(h* - h0)^T],

with ``h*`` the states under the adapter alone and ``h0`` those of the base model. W has d x d numbers for
every task, so it is kept as ``R R^T + f I`` with at most :data:`COLUMNS` columns in R, of the largest
eigenvalues; what the others have of the trace of W goes to all directions alike, into f. Up to
d = :data:`COLUMNS` there are none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MergeError

__all__ = ["COLUMNS", "FLOOR", "Metric", "metric_of"]

FLOOR = 0.1
"""Share of W that is the same in all directions: what the adapter hardly moves must stay where it is."""

COLUMNS = 1024
"""Columns of R at most."""


@dataclass(frozen=True)
class Metric:
    """W, scaled so that the base model has mean distance 1.

    Attributes:
        root: R ``(d, m)``.
        floor: f.
    """

    root: Tensor
    floor: float

    def of(self, off: Tensor) -> Tensor:
        """``x^T W x`` of every row x of ``off (N, d)``; ``(N,)``, differentiable."""
        return (off @ self.root.to(off)).square().sum(1) + self.floor * off.square().sum(1)

    def to(self, device: torch.device) -> Metric:
        return Metric(self.root.to(device), self.floor)


def metric_of(task: str, second: Tensor, dtype: torch.dtype) -> Metric:
    """W of one task.

    Args:
        task: name, for messages.
        second: S ``(d, d)`` float64, the second moments of how far its adapter moves the states.
        dtype: of R.

    Raises:
        MergeError: no states are moved, or some are not finite.
    """
    d = len(second)
    trace = float(second.diagonal().sum())
    if not trace < float("inf"):
        raise MergeError(f"the states of task {task!r} are not finite; load the base model in float32")
    if trace == 0:
        raise MergeError(
            f"the adapter of task {task!r} changes nothing on its own rows; leave it out, or check its data"
        )
    values, vectors = torch.linalg.eigh(second)
    values = values.clamp(min=0)
    share = values.sqrt() / values.sqrt().sum()
    # Ascending.
    others, largest = slice(max(d - COLUMNS, 0)), slice(max(d - COLUMNS, 0), None)
    floor = (FLOOR + float(share[others].sum())) / d
    # E[x^T W x] = tr(W S).
    mean = float((share * values)[largest].sum()) + floor * trace
    root = vectors[:, largest] * (share[largest] / mean).sqrt()
    return Metric(root.to(dtype).contiguous(), floor / mean)
