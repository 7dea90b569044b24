"""How much the adapters of a merge get into each other's way, from their canonical factors.

For two updates ``D_i = C_i Q_i`` and ``D_j = C_j Q_j`` of one module:

    rows      ||Q_i Q_j^T||_F^2 / min(r_i, r_j)   overlap of the row spaces: do they read the same inputs
    columns   ||U_i^T U_j||_F^2 / min(s_i, s_j)   overlap of the column spaces: do they write the same outputs
    cosine    <D_i, D_j> / (||D_i|| ||D_j||)      do they write the same for the same input

with U the normalised columns of C that are not zero and s their number. Overlaps lie in [0, 1]; of random
subspaces of a space of dimension d the expectation is ``max(r_i, r_j) / d``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import LowRankUpdate

__all__ = ["Interference", "interference"]


@dataclass(frozen=True)
class Interference:
    """Of all pairs of adapters at one module.

    Attributes:
        tasks: adapters of the module, K of them.
        ranks: dimension of each row space.
        rows, columns, cosine: ``(K, K)`` float64 on the CPU, symmetric; NaN where an update is zero and the
            quantity has no meaning.
    """

    tasks: tuple[str, ...]
    ranks: tuple[int, ...]
    rows: Tensor
    columns: Tensor
    cosine: Tensor


def interference(updates: Mapping[str, Mapping[str, LowRankUpdate]]) -> dict[str, Interference]:
    """Of every module.

    Args:
        updates: task -> module path -> canonical update.

    Returns:
        Module path -> overlaps and cosines, modules in the order of first appearance.
    """
    modules = dict.fromkeys(module for own in updates.values() for module in own)
    return {m: _of({task: own[m] for task, own in updates.items() if m in own}) for m in modules}


def _of(updates: Mapping[str, LowRankUpdate]) -> Interference:
    ranks = [update.rank for update in updates.values()]
    basis = torch.cat([update.basis for update in updates.values()])
    columns = torch.cat([update.columns for update in updates.values()], dim=1)
    values = torch.cat([update.singular_values for update in updates.values()])
    real = torch.cat([_nonzero(update) for update in updates.values()])
    # One product a side holds all pairs: (R, R), R the sum of the ranks.
    inputs, outputs = basis @ basis.T, columns.T @ columns
    inner = _blocks(inputs * outputs, ranks)
    norm = inner.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(real, 1 / torch.where(real, values, torch.ones_like(values)), 0.0)
    directions = outputs * inverse[:, None] * inverse
    counts = torch.stack([part.sum() for part in real.split(ranks)])
    return Interference(
        tasks=tuple(updates),
        ranks=tuple(ranks),
        rows=_share(_blocks(inputs.square(), ranks), torch.tensor(ranks)),
        columns=_share(_blocks(directions.square(), ranks), counts.cpu()),
        cosine=(inner / (norm[:, None] * norm)).cpu(),
    )


def _nonzero(update: LowRankUpdate) -> Tensor:
    """Which columns are directions of the column space: those that float64 can tell from zero."""
    s = update.singular_values
    largest = s.max() if s.numel() else 0.0
    return s > largest * max(update.shape) * torch.finfo(torch.float64).eps


def _blocks(matrix: Tensor, ranks: Sequence[int]) -> Tensor:
    """Sums over the blocks of every pair: ``(R, R)`` to ``(K, K)``."""
    rows = torch.stack([part.sum(0) for part in matrix.split(ranks)])
    return torch.stack([part.sum(1) for part in rows.split(ranks, dim=1)], dim=1)


def _share(energy: Tensor, ranks: Tensor) -> Tensor:
    return energy.cpu() / torch.minimum(ranks[:, None], ranks).to(torch.float64)
