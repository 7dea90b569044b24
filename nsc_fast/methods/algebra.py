"""Exact algebra of stacked low-rank updates: everything happens in matrices of the size of the ranks.

With orthonormal bases U of the columns of ``[B_1 ... B_K]`` and V of the rows of ``[A_1; ...; A_K]``,

    D_k = B_k A_k = U M_k V,        M_k = U^T B_k A_k V^T    (n_B x n_A, both at most sum r_k),

so a rule that commutes with orthonormal changes of basis (sums, singular value decompositions, polar
factors) may be applied to the cores M_k instead of the updates D_k, without any loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..factors import LowRankUpdate, canonical, gathered, row_basis, times_in_place

__all__ = ["RTOL", "Core", "compress", "energy_notice", "joint_core", "pairs_of", "polar", "product", "svd"]

# Directions whose singular value is below this part of the largest are not spanned. Far above the rounding of
# float64, far below that of factors stored in half precision.
RTOL = 1e-10

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Core:
    """Updates of several tasks in joint orthonormal bases.

    Attributes:
        left: U, ``(d_out, n_B)``: left singular vectors of the stacked B, numerical rank only.
        right: V, ``(n_A, d_in)``: right singular vectors of the stacked A as rows.
        matrices: task -> M_k, ``(n_B, n_A)``.
        ranks: task -> r_k.
    """

    left: Tensor
    right: Tensor
    matrices: dict[str, Tensor]
    ranks: dict[str, int]

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of the weight that is updated."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def side(self) -> int:
        """``min(n_B, n_A)``: number of singular values of a core."""
        return min(self.left.shape[1], self.right.shape[0])

    @property
    def nominal(self) -> int:
        """Number of entries that a core would have if both stacks had full rank."""
        total = sum(self.ranks.values())
        return min(total, self.shape[0]) * min(total, self.shape[1])

    def embed(self, matrix: Tensor) -> LowRankUpdate:
        """``U M V`` as an update: with orthonormal U and V only the small M is decomposed.

        The update takes the memory of the bases: the core cannot be used again.
        """
        left, s, right = svd(matrix)
        columns = times_in_place(self.left, left * s)
        return LowRankUpdate(columns, times_in_place(self.right.T, right.T).T, s)


def joint_core(factors: Mapping[str, Factors], scales: Sequence[float] | None = None) -> Core:
    """Joint bases and cores of ``task -> (down, scale * up)``; cost ``O((d_in + d_out) R^2)``.

    Each side is stacked and decomposed in the memory of its basis, one after the other.

    The bases are those of the singular value decompositions of the two stacks, which rules that look at
    single entries need (up to signs); for all others any orthonormal bases would do.
    """
    ranks = {task: down.shape[0] for task, (down, _) in factors.items()}
    right, down = row_basis(gathered([d for d, _ in factors.values()]), rtol=RTOL, overwrite=True)
    left, up = row_basis(gathered([u.T for _, u in factors.values()], scales), rtol=RTOL, overwrite=True)
    counts = list(ranks.values())
    pairs = zip(ranks, up.split(counts), down.split(counts), strict=True)
    return Core(left.T, right, {task: b.T @ a for task, b, a in pairs}, ranks)


def pairs_of(updates: Mapping[str, LowRankUpdate]) -> dict[str, Factors]:
    """Canonical factors as ``(down, up)``."""
    return {task: (update.basis, update.columns) for task, update in updates.items()}


def svd(
    matrix: Tensor, rank: int | None = None, *, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD, cut to ``rank`` and to the numerical rank: no arbitrary null-space directions.

    Args:
        scale: what singular values are small compared with. Default: the largest of them.
    """
    left, s, right = torch.linalg.svd(matrix, full_matrices=False)
    if scale is None:
        scale = float(s[:1].sum())
    keep = int((s > RTOL * scale).sum())
    keep = keep if rank is None else min(keep, rank)
    return left[:, :keep], s[:keep], right[:keep]


def polar(matrix: Tensor) -> Tensor:
    """``U V^T`` of the thin SVD, restricted to the range: the nearest partial isometry."""
    left, _, right = svd(matrix)
    return left @ right


def product(up: Tensor, down: Tensor) -> LowRankUpdate:
    """Canonical factors of ``up @ down`` without the directions that cancel."""
    return _cut(canonical(down, up))


def _cut(update: LowRankUpdate) -> LowRankUpdate:
    s = update.singular_values
    keep = int((s > max(update.shape) * torch.finfo(s.dtype).eps * s.max()).sum()) if s.numel() else 0
    return update if keep == update.rank else update.truncate(keep)[0] if keep else _nothing(update)


def _nothing(update: LowRankUpdate) -> LowRankUpdate:
    return LowRankUpdate(update.columns[:, :0], update.basis[:0], update.singular_values[:0])


def compress(matrix: Tensor, max_rank: int | None) -> tuple[LowRankUpdate, float]:
    """A dense update as canonical factors, of full rank or the best of ``max_rank``.

    The truncation takes the leading eigenvectors of the smaller Gram matrix and projects the update on them,
    several times cheaper than its SVD: the factors are orthonormal to rounding, and only the choice of the
    subspace sees the squared condition number.

    Returns:
        The factors, and the share of energy (squared Frobenius norm) that they keep.
    """
    d_out, d_in = matrix.shape
    if max_rank is None or max_rank >= min(d_out, d_in):
        left, s, right = torch.linalg.svd(matrix, full_matrices=False)
        return _cut(LowRankUpdate(left * s, right, s)), 1.0
    if d_in <= d_out:
        _, vectors = torch.linalg.eigh(matrix.T @ matrix)
        right = vectors[:, -max_rank:].T
        update = product(matrix @ right.T, right)
    else:
        _, vectors = torch.linalg.eigh(matrix @ matrix.T)
        left = vectors[:, -max_rank:]
        update = product(left, left.T @ matrix)
    energy = float(matrix.square().sum())
    return update, update.energy / energy if energy > 0 else 1.0


def energy_notice(kept: Mapping[str, float], max_rank: int | None) -> tuple[str, ...]:
    """What a truncation of dense updates lost, for the user."""
    if max_rank is None:
        return (
            "the rule leaves no low-rank form: the merged updates have full rank. Set max_rank, or write a "
            "full model",
        )
    worst = min(kept, key=lambda module: kept[module])
    mean = sum(kept.values()) / len(kept)
    return (
        f"the merged updates were truncated to rank {max_rank}: {mean:.2%} of their energy is kept on "
        f"average, least at {worst!r} ({kept[worst]:.2%})",
    )
