"""Canonical factors of a low-rank update: the one representation that every part of nsc_fast uses.

A LoRA adapter changes a weight by ``s B A`` with ``A (r, d_in)``, ``B (d_out, r)``. The pair is not unique:
``(G A, B G^-1)`` is the same update. Its canonical factors are

    s B A = C Q,     rows of Q orthonormal,     columns of C orthogonal with norms = singular values,

computed in float64 from the small matrices only; no ``d_out x d_in`` matrix is ever formed:

    A^T = U_a S_a V_a^T (from a thin QR),    s B V_a S_a = U S V^T,    Q = V^T U_a^T,    C = U S.

Rows of Q span the row space of A also where B annihilates a direction of it, because the null-space ratio
is a property of A alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LowRankUpdate", "Stack", "canonical", "row_basis", "stack"]


@dataclass(frozen=True)
class LowRankUpdate:
    """An update ``C Q`` of one linear module in canonical form.

    Attributes:
        columns: C, ``(d_out, r)`` float64, orthogonal columns, norms equal ``singular_values``.
        basis: Q, ``(r, d_in)`` float64, orthonormal rows.
        singular_values: ``(r,)`` float64, descending; zero where B annihilates a direction of A.
    """

    columns: Tensor
    basis: Tensor
    singular_values: Tensor

    @property
    def rank(self) -> int:
        """Dimension of the row space of A; at most A's number of rows."""
        return self.basis.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of the weight that is updated."""
        return self.columns.shape[0], self.basis.shape[1]

    @property
    def energy(self) -> float:
        """Squared Frobenius norm of the update."""
        return float(self.singular_values.square().sum())

    def truncate(self, rank: int) -> tuple[LowRankUpdate, float]:
        """Best approximation of at most ``rank`` (Eckart-Young) and the share of energy that it keeps."""
        if rank < 1:
            raise ValueError(f"cannot truncate to rank {rank}: the smallest rank is 1")
        kept = LowRankUpdate(self.columns[:, :rank], self.basis[:rank], self.singular_values[:rank])
        return kept, kept.energy / self.energy if self.energy > 0 else 1.0

    def scaled(self, coefficient: float | Tensor) -> LowRankUpdate:
        """The update times a scalar, canonical again (a sign goes into the columns)."""
        coefficient = float(coefficient)
        return LowRankUpdate(self.columns * coefficient, self.basis, self.singular_values * abs(coefficient))

    def dense(self) -> Tensor:
        """``C Q``, ``(d_out, d_in)``. For tests and for writing full models only."""
        return self.columns @ self.basis

    def balanced(self) -> tuple[Tensor, Tensor]:
        """LoRA factors ``(down (r, d_in), up (d_out, r))`` with the singular values split evenly.

        The even split keeps both factors inside the range of float16.
        """
        root = self.singular_values.sqrt()
        unit = self.columns / torch.where(root > 0, root, torch.ones_like(root))
        return root[:, None] * self.basis, unit


def row_basis(down: Tensor, *, rtol: float | None = None) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of the row space of ``down`` and the coordinates of ``down`` in it.

    Args:
        down: A, ``(r, d_in)``, any floating dtype.
        rtol: singular values of A at or below ``rtol`` times the largest are taken for zero. Default: what
            float64 can tell from zero, ``max(r, d_in) * eps``.

    Returns:
        ``(Q_a, M)`` in float64 with ``A = M Q_a``, ``Q_a (rank, d_in)`` orthonormal rows, ``M (r, rank)``.
    """
    if down.ndim != 2:
        raise ValueError(f"a down projection has two dimensions, got shape {tuple(down.shape)}")
    a = down.detach().to(torch.float64)
    if not torch.isfinite(a).all():
        raise ValueError("the down projection holds NaN or infinite values")
    if rtol is None:
        rtol = max(a.shape) * torch.finfo(torch.float64).eps
    q, upper = torch.linalg.qr(a.T)  # (d_in, min), (min, r)
    left, s, right = torch.linalg.svd(upper, full_matrices=False)
    keep = int((s > rtol * s.max()).sum()) if s.numel() else 0
    basis = (q @ left[:, :keep]).T
    return basis.contiguous(), right[:keep].T * s[:keep]


def canonical(down: Tensor, up: Tensor, scaling: float = 1.0, *, rtol: float | None = None) -> LowRankUpdate:
    """Canonical factors of ``scaling * up @ down``.

    Args:
        down: A, ``(r, d_in)``.
        up: B, ``(d_out, r)``.
        scaling: s, ``alpha / r`` or ``alpha / sqrt(r)`` (rslora).
        rtol: see :func:`row_basis`.

    Returns:
        float64 factors on the device of the inputs; exact to float64 rounding. The rank is the dimension of
        A's row space, so ``A = 0`` gives an update of rank 0.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"factors do not fit: down {tuple(down.shape)}, up {tuple(up.shape)}; "
            "expected (r, d_in) and (d_out, r)"
        )
    b = up.detach().to(torch.float64) * scaling
    if not torch.isfinite(b).all():
        raise ValueError("the up projection or its scaling holds NaN or infinite values")
    row, coordinates = row_basis(down, rtol=rtol)
    core = b @ coordinates  # (d_out, rank)
    return _from_core(core, row)


def _from_core(core: Tensor, orthonormal: Tensor) -> LowRankUpdate:
    """Canonical factors of ``core @ orthonormal``; keeps also the directions that ``core`` annihilates."""
    d_out, rank = core.shape
    tall, upper = torch.linalg.qr(core)  # (d_out, min), (min, rank)
    # The full right factor: with d_out < rank the thin one would lose directions of the row space.
    left, s, right = torch.linalg.svd(upper, full_matrices=True)
    s = torch.nn.functional.pad(s, (0, rank - s.numel()))
    unit = torch.nn.functional.pad(tall @ left, (0, max(rank - tall.shape[1], 0)))
    return LowRankUpdate((unit * s).contiguous(), (right @ orthonormal).contiguous(), s)


@dataclass(frozen=True)
class Stack:
    """Updates of several tasks at one module, stacked so that one projection serves all.

    Attributes:
        columns: C = [C_1 ... C_K], ``(d_out, R)``.
        basis: Q = [Q_1; ...; Q_K], ``(R, d_in)``; orthonormal within a task, not across tasks.
        tasks: names of the tasks that adapt this module, in stack order.
        ranks: r_k of each, ``sum(ranks) == R``; 1, with zeros, for an update of rank 0.
    """

    columns: Tensor
    basis: Tensor
    tasks: tuple[str, ...]
    ranks: tuple[int, ...]

    @property
    def segment(self) -> Tensor:
        """Index of the task of each of the R columns, int32."""
        index = torch.arange(len(self.ranks), dtype=torch.int32)
        return index.repeat_interleave(torch.tensor(self.ranks, dtype=torch.int64))

    def merged(self, coefficients: Tensor) -> LowRankUpdate:
        """Canonical factors of ``sum_k lambda_k C_k Q_k``.

        Args:
            coefficients: ``(K,)`` one per task or ``(R,)`` one per singular direction.
        """
        return canonical(self.basis, self.columns * self.expand(coefficients))

    def expand(self, coefficients: Tensor) -> Tensor:
        """Coefficients as one float64 value per stacked column, ``(R,)``."""
        c = coefficients.detach().to(torch.float64).cpu()
        if c.shape == (sum(self.ranks),):
            return c
        if c.shape != (len(self.tasks),):
            raise ValueError(
                f"expected {len(self.tasks)} coefficients (one per task) or {sum(self.ranks)} "
                f"(one per singular direction), got shape {tuple(c.shape)}"
            )
        return c[self.segment.long()]


def stack(updates: Sequence[tuple[str, LowRankUpdate]]) -> Stack:
    """Stacks the updates of one module in the order given.

    Raises:
        ValueError: no update, or updates of weights of different shapes.
    """
    if not updates:
        raise ValueError("no update to stack")
    shapes = {name: update.shape for name, update in updates}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"updates of one module differ in shape: {shapes}")
    # Every task has a column, so that R = K only where all ranks are 1, and coefficients per task and per
    # singular direction cannot be taken for each other.
    updates = [(name, _zero_direction(u) if u.rank == 0 else u) for name, u in updates]
    return Stack(
        torch.cat([u.columns for _, u in updates], dim=1),
        torch.cat([u.basis for _, u in updates], dim=0),
        tuple(name for name, _ in updates),
        tuple(u.rank for _, u in updates),
    )


def _zero_direction(update: LowRankUpdate) -> LowRankUpdate:
    """An update of rank 0 as one row and one column of zeros."""
    d_out, d_in = update.shape
    row, column = update.basis.new_zeros(1, d_in), update.columns.new_zeros(d_out, 1)
    return LowRankUpdate(column, row, update.singular_values.new_zeros(1))
