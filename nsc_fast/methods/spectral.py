"""Rules that look at singular values and vectors, on matrices of any size (cores, as a rule).

All of them commute with orthonormal changes of basis, so on cores they give what they give on the updates.
Directions that the matrices do not span never enter: a null space has no preferred basis, and rules that are
written for matrices of full rank would take arbitrary directions from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..factors import LowRankUpdate
from .algebra import RTOL, polar, svd

__all__ = ["cart", "isotropic", "isotropic_task_aware", "quotas", "soft_threshold", "task_singular_vectors"]


def task_singular_vectors(matrices: Sequence[Tensor], quotas: Sequence[int]) -> Tensor:
    """TSV-Merge (Gargiulo et al., 2025): ``polar([U_1 ... U_K]) S polar([V_1^T; ...; V_K^T])``.

    Args:
        quotas: singular triplets that each task contributes at most.
    """
    scale = _scale(matrices)
    triplets = [svd(m, quota, scale=scale) for m, quota in zip(matrices, quotas, strict=True)]
    return _orthogonalised(triplets, torch.cat([s for _, s, _ in triplets]))


def isotropic(update: LowRankUpdate, count: int) -> LowRankUpdate:
    """Iso-C (Marczak et al., 2025): all singular values replaced by their mean over ``count`` of them.

    The columns take the memory of those of ``update``, which is lost.
    """
    s = update.singular_values
    keep = int((s > RTOL * s.max()).sum()) if s.numel() else 0
    mean = s.sum() / max(count, 1)
    return LowRankUpdate(
        update.columns[:, :keep].mul_(mean / s[:keep]),
        update.basis[:keep],
        torch.full_like(s[:keep], mean.item()),
    )


def isotropic_task_aware(matrices: Sequence[Tensor], count: int, common_fraction: float) -> Tensor:
    """Iso-CTS (Marczak et al., 2025): directions of the sum and of every task by itself.

    Of ``count`` directions, a multiple of K near ``(1 - common_fraction) count`` is left to the tasks.
    """
    k = len(matrices)
    total = torch.stack(list(matrices)).sum(0)
    own = k * round((count - int(count * common_fraction)) / k)
    scale = _scale(matrices)
    common = svd(total, count - own, scale=scale)
    left = common[0]
    triplets = [svd(m - left @ (left.T @ m), own // k, scale=scale) for m in matrices]
    triplets.append(common)
    values = torch.cat([s for _, s, _ in triplets])
    return _orthogonalised(triplets, torch.full_like(values, float(values.sum()) / max(count, 1)))


def cart(matrices: Sequence[Tensor], rank: int, scale: float) -> Tensor:
    """CART (Choi et al., 2024): ``mean + scale * sum_k trunc_rank(M_k - mean)``."""
    stack = torch.stack(list(matrices))
    mean = stack.mean(0)
    out = mean.clone()
    for matrix in stack:
        left, s, right = svd(matrix - mean, rank)
        out += scale * (left * s) @ right
    return out


def soft_threshold(matrix: Tensor, tau: float) -> Tensor:
    """Singular values reduced by ``tau``, at least to 0: the proximal map of the nuclear norm."""
    left, s, right = svd(matrix)
    return (left * (s - tau).clamp(min=0)) @ right


def _scale(matrices: Sequence[Tensor]) -> float:
    """Size of the largest matrix; what is at rounding level beside it is no direction of its own."""
    return max(float(matrix.norm()) for matrix in matrices)


def _orthogonalised(triplets: Sequence[tuple[Tensor, Tensor, Tensor]], values: Tensor) -> Tensor:
    left = polar(torch.cat([u for u, _, _ in triplets], dim=1))
    right = polar(torch.cat([v for _, _, v in triplets]))
    return (left * values) @ right


def quotas(ranks: Mapping[str, int], shape: tuple[int, int]) -> list[int]:
    """Singular triplets per task: an equal share of the smaller side, never above the task's rank."""
    share = max(min(shape) // len(ranks), 1)
    return [min(rank, share) for rank in ranks.values()]
