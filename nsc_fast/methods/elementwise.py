"""Rules that look at single entries: trimming, sign election, disjoint merge (TIES) and random drops (DARE).

The matrices of all tasks at all modules are read in blocks of rows, so that the memory needed does not grow
with the model: a matrix is given as a product ``left @ right``, formed block by block, and thresholds over
whole models are selected from a stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..factors import LowRankUpdate
from ..parameters import Strict
from .selection import kth_largest

__all__ = [
    "Drop",
    "Dropping",
    "Election",
    "Entries",
    "Matrices",
    "dropped_sum",
    "keep_mask",
    "merged",
    "selected",
]

# Entries of one task in memory at a time.
_BLOCK = 1 << 15
# Parts of a block that are joined over the tasks one by one.
_PARTS = 4
# A sum this small beside its terms is rounding: opposite updates are equal only up to that.
_CANCELLED = 1e-10


class Election(Strict):
    """Trim, elect, merge (Yadav et al., 2023).

    Attributes:
        density: share of a task's entries that survive the trimming, those of largest magnitude.
        granularity: one threshold per task over the whole "model", or one per task and "module".
        trim: "inclusive" keeps the entries at least as large as the (floor(density N) + 1)-th, "exact" as
            the round(density N)-th.
        majority_sign: elect by the sum of the values ("total") or by the number of signs ("frequency", where
            a draw counts as positive), or not at all ("none": magnitude pruning). Under "total", entries that
            cancel exactly elect nothing and give 0.
        combine: "mean", "sum" or "max" of the entries that agree with the elected sign.
    """

    density: float = Field(0.2, gt=0, le=1)
    granularity: Literal["model", "module"] = "model"
    trim: Literal["inclusive", "exact"] = "inclusive"
    majority_sign: Literal["total", "frequency", "none"] = "total"
    combine: Literal["mean", "sum", "max"] = "mean"

    def kept(self, count: int) -> int:
        """How many of ``count`` entries survive."""
        if self.trim == "inclusive":
            return min(int(count * self.density) + 1, count)
        return max(round(count * self.density), 1)


class Dropping(Strict):
    """Random drops (Yu et al., 2024): an entry is kept with probability 1 - drop and divided by it."""

    drop: float = Field(0.2, ge=0, lt=1)


@dataclass(frozen=True)
class Entries:
    """One task's matrix at one module, ``left @ right``; ``right=None`` stands for the identity.

    Attributes:
        nominal: number of entries that a density refers to, where it is not that of the matrix.
    """

    left: Tensor
    right: Tensor | None = None
    nominal: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    @property
    def count(self) -> int:
        return self.shape[0] * self.shape[1] if self.nominal is None else self.nominal

    def rows(self, start: int, stop: int) -> Tensor:
        part = self.left[start:stop]
        return part if self.right is None else part @ self.right

    @staticmethod
    def of(update: LowRankUpdate) -> Entries:
        return Entries(update.columns, update.basis)


# Module -> task -> matrix.
Matrices = Mapping[str, Mapping[str, Entries]]


@dataclass(frozen=True)
class Drop:
    """How entries are dropped.

    Attributes:
        probability: of an entry to be dropped.
        seed: fixes the draws, whatever the order of tasks and modules.
        after_trim: drop what the trimming left, instead of trimming what the drops left.
    """

    probability: float
    seed: int
    after_trim: bool = False

    def apply(self, block: Tensor, task: str, module: str, start: int) -> Tensor:
        """Drops entries of a block of rows that begins at row ``start``."""
        if self.probability == 0:
            return block
        keep = keep_mask(self, task, module, start, block.shape)
        return torch.where(keep, block / (1.0 - self.probability), 0.0)


def keep_mask(drop: Drop, task: str, module: str, start: int, shape: tuple[int, ...]) -> Tensor:
    """Which entries of a block are kept. The same block gets the same draws each time it is read."""
    digest = hashlib.sha256(f"{drop.seed}/{task}/{module}/{start}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(shape, generator=generator, dtype=torch.float64) >= drop.probability


def blocks(entries: Entries) -> Iterator[tuple[int, int]]:
    """Row ranges of a matrix, small enough to hold several of them."""
    rows, width = entries.shape
    step = max(_BLOCK // max(width, 1), 1)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def merged(matrices: Matrices, rule: Election, drop: Drop | None = None) -> Iterator[tuple[str, Tensor]]:
    """TIES on the matrices of all tasks; gives module after module."""
    cuts = _thresholds(matrices, rule, drop)
    for module, own in matrices.items():
        yield module, _assemble(own, lambda x: _combine(_elect(x, rule), rule), cuts, module, drop)


def selected(matrices: Matrices, rule: Election) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What TIES keeps of every task before the tasks are joined; module after module."""
    cuts = _thresholds(matrices, rule, None)
    for module, own in matrices.items():
        parts: dict[str, list[Tensor]] = {task: [] for task in own}
        for block in _stacked(own, cuts, module, None):
            for task, part in zip(own, _elect(block, rule), strict=True):
                parts[task].append(part)
        yield module, {task: torch.cat(rows) for task, rows in parts.items()}


def dropped_sum(matrices: Matrices, drop: Drop) -> Iterator[tuple[str, Tensor]]:
    """Sum over tasks of the matrices after the drops; module after module."""
    for module, own in matrices.items():
        yield module, _assemble(own, lambda x: x.sum(0), {}, module, drop)


def _assemble(
    own: Mapping[str, Entries],
    join: Callable[[Tensor], Tensor],
    cuts: Mapping[tuple[str, str], float],
    module: str,
    drop: Drop | None,
) -> Tensor:
    """Joins the tasks block by block."""
    first = next(iter(own.values()))
    out = first.left.new_empty(first.shape)
    start = 0
    for block in _stacked(own, cuts, module, drop):
        # The rules make several temporaries of the size of what they are given: a part of a block.
        for part in block.split(max(block.shape[1] // _PARTS, 1), dim=1):
            stop = start + part.shape[1]
            out[start:stop] = join(part)
            start = stop
    return out


def _stacked(
    own: Mapping[str, Entries], cuts: Mapping[tuple[str, str], float], module: str, drop: Drop | None
) -> Iterator[Tensor]:
    """Blocks ``(K, rows, width)`` of all tasks, trimmed and dropped."""
    for start, stop in blocks(next(iter(own.values()))):
        stacked = None
        for i, (task, entries) in enumerate(own.items()):
            block = _read(entries, task, module, start, stop, drop)
            if (cut := cuts.get((task, module))) is not None:
                block = torch.where(block.abs() >= cut, block, 0.0)
            if drop is not None and drop.after_trim:
                block = drop.apply(block, task, module, start)
            if stacked is None:
                stacked = block.new_empty(len(own), *block.shape)
            stacked[i] = block
        yield stacked


def _read(entries: Entries, task: str, module: str, start: int, stop: int, drop: Drop | None) -> Tensor:
    block = entries.rows(start, stop)
    return block if drop is None or drop.after_trim else drop.apply(block, task, module, start)


def _thresholds(matrices: Matrices, rule: Election, drop: Drop | None) -> dict[tuple[str, str], float]:
    """(task, module) -> smallest magnitude that survives; empty where everything does."""
    if rule.density == 1.0:
        return {}
    cuts: dict[tuple[str, str], float] = {}
    for task in dict.fromkeys(task for own in matrices.values() for task in own):
        modules = [module for module, own in matrices.items() if task in own]
        groups = [modules] if rule.granularity == "model" else [[module] for module in modules]
        for group in groups:
            count = sum(matrices[module][task].count for module in group)
            stream = partial(_magnitudes, matrices, task, group, drop)
            cut = kth_largest(stream, rule.kept(count))
            cuts.update({(task, module): cut for module in group})
    return cuts


def _magnitudes(matrices: Matrices, task: str, modules: list[str], drop: Drop | None) -> Iterator[Tensor]:
    for module in modules:
        entries = matrices[module][task]
        for start, stop in blocks(entries):
            yield _read(entries, task, module, start, stop, drop).abs().flatten()


def _elect(x: Tensor, rule: Election) -> Tensor:
    """Entries ``(K, ...)`` of the elected sign; zero elsewhere."""
    if rule.majority_sign == "none":
        return x
    if rule.majority_sign == "total":
        total = x.sum(0)
        sign = torch.where(total.abs() > _CANCELLED * x.abs().sum(0), total.sign(), 0.0)
    else:
        sign = torch.where(x.sign().sum(0) >= 0, 1.0, -1.0).to(x.dtype)
    return torch.where(x * sign > 0, x, 0.0)


def _combine(x: Tensor, rule: Election) -> Tensor:
    if rule.combine == "sum":
        return x.sum(0)
    if rule.combine == "mean":
        return x.sum(0) / (x != 0).sum(0).clamp(min=1)
    return x.gather(0, x.abs().argmax(0, keepdim=True)).squeeze(0)
