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

__all__ = [
    "LowRankUpdate",
    "Stack",
    "canonical",
    "embedded",
    "gathered",
    "row_basis",
    "stack",
    "times_in_place",
    "weighted_sum",
]


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


def row_basis(down: Tensor, *, rtol: float | None = None, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of the row space of ``down`` and the coordinates of ``down`` in it.

    Args:
        down: A, ``(r, d_in)``, any floating dtype.
        rtol: singular values of A at or below ``rtol`` times the largest are taken for zero. Default: what
            float64 can tell from zero, ``max(r, d_in) * eps``.
        overwrite: the basis takes the memory of ``down``, a contiguous float64 matrix that is lost.

    Returns:
        ``(Q_a, M)`` in float64 with ``A = M Q_a``, ``Q_a (rank, d_in)`` orthonormal rows, ``M (r, rank)``.
    """
    rows = _Reflected.of(_rows(down).T, overwrite=overwrite)
    left, s, right = _split(rows.upper(), max(down.shape), rtol)
    return rows.times(left).T, right * s


def embedded(left: Tensor, matrix: Tensor) -> LowRankUpdate:
    """Canonical factors of ``left @ matrix``, in the memory of these two, which are lost.

    Args:
        left: ``(d_out, n)`` float64, orthonormal columns: with them only ``matrix`` has to be decomposed.
        matrix: ``(n, d_in)`` float64, contiguous.
    """
    rows = _Reflected.of(_rows(matrix).T, overwrite=True)
    inner, s, right = _split(rows.upper(), max(left.shape[0], matrix.shape[1]), None)
    return LowRankUpdate(times_in_place(left, right * s), rows.times(inner).T, s)


def canonical(down: Tensor, up: Tensor, scaling: float = 1.0, *, rtol: float | None = None) -> LowRankUpdate:
    """Canonical factors of ``scaling * up @ down``.

    With float64 inputs there is, besides them and the result, no further matrix of the size of a factor.

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
    return _canonical([down], [up], torch.tensor(scaling, dtype=torch.float64), rtol)


def _canonical(
    downs: Sequence[Tensor], ups: Sequence[Tensor], weights: Tensor, rtol: float | None = None
) -> LowRankUpdate:
    """Canonical factors of ``[B_1 ... B_K] @ diag(weights) @ [A_1; ...; A_K]``.

    Neither stack is formed beside the results: A's is decomposed where it is gathered, and of B's only the
    product with A's coordinates is needed, which is a sum over the parts.

    Args:
        weights: one value, or one per row of the stacked A.
    """
    if not (all(map(_finite, ups)) and _finite(weights)):
        raise ValueError("the up projection or its scaling holds NaN or infinite values")
    # The row side stays a product of reflections until the column side is done.
    rows = _Reflected.of(gathered([_checked(down) for down in downs]).T, overwrite=True)
    inner, s, right = _split(rows.upper(), max(rows.packed.shape), rtol)
    parts = (right * s * weights.to(s.device).reshape(-1, 1)).split([down.shape[0] for down in downs])
    # (d_out, rank), column by column in memory.
    core = (parts[0].T @ ups[0].detach().to(torch.float64).T).T
    for part, up in zip(parts[1:], ups[1:], strict=True):
        core.T.addmm_(part.T, up.detach().to(torch.float64).T)
    del parts, right
    d_out, rank = core.shape
    columns = _Reflected.of(core, overwrite=True)
    del core
    # The full right factor: with d_out < rank the thin one would lose directions of the row space.
    left, s, right = torch.linalg.svd(columns.upper(), full_matrices=True)
    scaled = columns.times(left.mul_(s))
    if d_out < rank:
        s = torch.nn.functional.pad(s, (0, rank - d_out))
        scaled = torch.nn.functional.pad(scaled, (0, rank - d_out))
    return LowRankUpdate(scaled, rows.times(inner @ right.T).T, s)


def gathered(parts: Sequence[Tensor], scales: Sequence[float] | None = None) -> Tensor:
    """The rows of ``parts``, each times its scale, one below the other in new float64 memory."""
    counts = [part.shape[0] for part in parts]
    out = torch.empty(sum(counts), parts[0].shape[1], dtype=torch.float64, device=parts[0].device)
    for i, (part, place) in enumerate(zip(parts, out.split(counts), strict=True)):
        place.copy_(part.detach())
        if scales is not None and scales[i] != 1.0:
            place.mul_(scales[i])
    return out


def times_in_place(tall: Tensor, small: Tensor) -> Tensor:
    """``tall @ small`` in the memory of ``tall``, which is lost; ``small`` has no more columns than rows.

    The result is laid out by columns, and holds no memory that it does not need, if ``tall`` is laid out so
    and holds none.
    """
    width = small.shape[1]
    for block in tall.split(_BLOCK):
        block[:, :width] = block @ small
    # A part of the memory would hold all of it.
    return tall if width == tall.shape[1] else tall[:, :width].T.clone().T


def _rows(down: Tensor) -> Tensor:
    """A down projection, checked, in float64."""
    return _checked(down).detach().to(torch.float64)


def _checked(down: Tensor) -> Tensor:
    if down.ndim != 2:
        raise ValueError(f"a down projection has two dimensions, got shape {tuple(down.shape)}")
    if not _finite(down):
        raise ValueError("the down projection holds NaN or infinite values")
    return down


def _split(upper: Tensor, size: int, rtol: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values of the triangular factor of A^T that are not zero, and its vectors of each side.

    With the left ones as basis, the right ones times the values are A's coordinates.
    """
    if rtol is None:
        rtol = size * torch.finfo(torch.float64).eps
    left, s, right = torch.linalg.svd(upper, full_matrices=False)
    keep = int((s > rtol * s.max()).sum()) if s.numel() else 0
    return left[:, :keep], s[:keep], right[:keep].T


def _finite(values: Tensor) -> bool:
    """Without a temporary of the size of ``values``, which ``isfinite`` needs."""
    parts = values.detach().reshape(1, -1) if values.ndim < 2 else values.detach()
    extremes = [torch.stack(part.aminmax()) for part in parts.split(_BLOCK) if part.numel()]
    return not extremes or bool(torch.isfinite(torch.stack(extremes)).all())


# Rows of a tall matrix that are multiplied at a time.
_BLOCK = 128


@dataclass
class _Reflected:
    """A tall matrix as Householder reflections and a triangular factor, in the memory of one matrix."""

    packed: Tensor
    tau: Tensor

    @staticmethod
    def of(matrix: Tensor, *, overwrite: bool = False) -> _Reflected:
        """QR of ``matrix``, float64; ``overwrite`` takes its memory, which is laid out by columns."""
        if not overwrite:
            return _Reflected(*torch.geqrf(matrix))
        return _Reflected(*torch.geqrf(matrix, out=(matrix, matrix.new_empty(min(matrix.shape)))))

    def upper(self) -> Tensor:
        """The triangular factor, ``(min(m, n), n)``."""
        return self.packed[: self.tau.numel()].triu()

    def times(self, small: Tensor) -> Tensor:
        """The orthonormal factor times ``small``, laid out by columns; uses up the reflections."""
        count = self.tau.numel()
        tall = self.packed[:, :count]
        torch.linalg.householder_product(tall, self.tau, out=tall)
        del self.packed
        return times_in_place(tall, small)


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
        return torch.tensor([k for k, r in enumerate(self.ranks) for _ in range(r)], dtype=torch.int32)

    def merged(self, coefficients: Tensor) -> LowRankUpdate:
        """Canonical factors of ``sum_k lambda_k C_k Q_k``, or of ``C X Q``.

        Args:
            coefficients: ``(K,)`` one per task, ``(R,)`` one per singular direction, or a core X ``(R, R)``.
        """
        if coefficients.ndim == 2:
            core = coefficients.detach().to(self.columns.device, torch.float64)
            return canonical(self.basis, self.columns @ core)
        return _canonical([self.basis], [self.columns], self.expand(coefficients))

    def expand(self, coefficients: Tensor) -> Tensor:
        """Coefficients as one float64 value per stacked column, ``(R,)``."""
        return _expand(coefficients, self.ranks)


def _expand(coefficients: Tensor, ranks: Sequence[int]) -> Tensor:
    c = coefficients.detach().to(torch.float64).cpu()
    if c.shape == (sum(ranks),):
        return c
    if c.shape != (len(ranks),):
        raise ValueError(
            f"expected {len(ranks)} coefficients (one per task) or {sum(ranks)} "
            f"(one per singular direction), got shape {tuple(c.shape)}"
        )
    return c.repeat_interleave(torch.tensor(ranks, dtype=torch.int64))


def stack(updates: Sequence[tuple[str, LowRankUpdate]]) -> Stack:
    """Stacks the updates of one module in the order given.

    Raises:
        ValueError: no update, or updates of weights of different shapes.
    """
    updates = _stackable(updates)
    return Stack(
        torch.cat([u.columns for _, u in updates], dim=1),
        torch.cat([u.basis for _, u in updates], dim=0),
        tuple(name for name, _ in updates),
        tuple(u.rank for _, u in updates),
    )


def weighted_sum(updates: Sequence[tuple[str, LowRankUpdate]], coefficients: Tensor) -> LowRankUpdate:
    """What :meth:`Stack.merged` gives on the stack of ``updates``, without forming the stack.

    Raises:
        ValueError: as for :func:`stack`, or a wrong number of coefficients.
    """
    own = [update for _, update in _stackable(updates)]
    weights = _expand(coefficients, [u.rank for u in own])
    return _canonical([u.basis for u in own], [u.columns for u in own], weights)


def _stackable(updates: Sequence[tuple[str, LowRankUpdate]]) -> list[tuple[str, LowRankUpdate]]:
    """The updates, checked, with a direction of zeros in place of rank 0."""
    if not updates:
        raise ValueError("no update to stack")
    shapes = {name: update.shape for name, update in updates}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"updates of one module differ in shape: {shapes}")
    # Every task has a column, so that R = K only where all ranks are 1, and coefficients per task and per
    # singular direction cannot be taken for each other.
    return [(name, _zero_direction(u) if u.rank == 0 else u) for name, u in updates]


def _zero_direction(update: LowRankUpdate) -> LowRankUpdate:
    """An update of rank 0 as one row and one column of zeros."""
    d_out, d_in = update.shape
    row, column = update.basis.new_zeros(1, d_in), update.columns.new_zeros(d_out, 1)
    return LowRankUpdate(column, row, update.singular_values.new_zeros(1))
