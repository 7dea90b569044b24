"""The fused steps in plain torch: what a CPU runs, and any device on which Triton is not used.

Each function does the work of the launcher of the same name in ``kernels/``, with the same arguments and
results, so that the differentiable operations above are written once. Half-precision activations are
lifted to float32 block by block, which keeps the whole computation in float32 without a float32 copy of z.

Notation: N tokens, d features, R stacked rank, G segments (the stacked adapters); ``segment[j]`` is the
segment of stacked column j.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..reference import TINY
from . import buffers

# Rows are handled in blocks of about this size, which bounds the wide copies of half-precision input. Large
# blocks: every product waits for all cores, and on a busy machine each wait is long.
_BLOCK_BYTES = 64 << 20

# A product with few columns is spread over the cores by rows, a small product for each tile of them: split
# by the library itself it takes up to 1.6 times as long at ranks 8 to 48. One with less work is not.
_TILE_WORK = 45_000_000

# A product with few terms, of these numbers, is spread in the same way: up to twice as fast at d = 4096.
_TILE_TERMS = range(48, 101)
_TILE_LEAST_ROWS = 1024

# With fewer rows than this for each column, the other factor is not worth being laid out anew.
_LAYOUT_ROWS = 16

# With more entries in the output, the bias is better one more term of the product than a second pass.
_WIDE_OUTPUT = 1 << 20


class Projection(NamedTuple):
    """One pass over z: ``p (N, R)``, ``norm2 (N,)``, ``omega (N, G)``, or ``(N,)``/``(N, S)`` with tasks."""

    p: Tensor
    norm2: Tensor | None
    omega: Tensor | None


class CoefficientGrads(NamedTuple):
    """``dp (N, R)``, ``dcoef (R,)`` or ``(G,)``, and the row scale ``t u (N,)`` of z; None where absent."""

    dp: Tensor | None
    dcoef: Tensor | None
    row_scale: Tensor | None


def project(
    z: Tensor,
    q: Tensor,
    segment: Tensor,
    num_segments: int,
    *,
    task: Tensor | None = None,
    clamp: float,
    ratio: bool = True,
    siblings: int = 1,
) -> Projection:
    """``P = Z Q^T``, ``||z||^2`` and the null-space ratios, with one read of Z.

    Args:
        z: ``(N, d)``, last dimension contiguous.
        q: ``(R, d)``, rows orthonormal within a segment.
        segment: ``(R,)`` int32, ascending.
        num_segments: G.
        task: ``(N,)`` int32 segment of each token's own task, -1 for none (its omega is 1): only the own
            ratios are formed.
        clamp: lower bound of the radicand.
        ratio: False forms P alone.
        siblings: with task, number S of stacks that share z; segment ``s * G / S + k`` is task k of stack s.
    """
    wide = compute_dtype(z.dtype)
    qt = q.to(wide).t()
    p = z.new_empty(z.shape[0], q.shape[0], dtype=wide)
    norm2 = z.new_empty(z.shape[0], dtype=wide) if ratio else None
    for rows in _blocks(z, wide):
        block = z[rows].to(wide)
        if norm2 is not None:
            torch.linalg.vector_norm(block, dim=1, out=norm2[rows])
        _contract(block, qt, p[rows])
    if norm2 is None:
        return Projection(p, None, None)
    norm2.square_()
    if task is None:
        u = _inside(p, norm2, segment, num_segments)
    else:
        each = num_segments // siblings
        own = p.masked_fill(segment % each != task[:, None], 0.0)
        u = _inside(own, norm2, segment // each, siblings)
        u = u.squeeze(1) if siblings == 1 else u
    return Projection(p, norm2, u.neg_().add_(1.0).clamp_(min=clamp).sqrt_())


def ratio_backward(
    z: Tensor,
    q: Tensor,
    p: Tensor,
    norm2: Tensor,
    omega: Tensor,
    grad_omega: Tensor,
    segment: Tensor,
    *,
    clamp: float,
) -> Tensor:
    """``dZ = sum_g (t_g u_g) z - sum_g t_g P_g Q_g`` with ``t = grad_omega / (omega ||z||^2)``, ``(N, d)``.

    ``omega`` and ``grad_omega`` are ``(N, G)``.
    """
    t = _slope(omega, norm2, grad_omega, clamp)
    row_scale = (t * _inside(p, norm2, segment, omega.shape[1])).sum(1)
    if t.shape[1] > 1:
        t = t @ _one_hot(segment, t.shape[1], t.dtype).t()
    dp = p * t
    return input_gradient(dp.neg_(), q, row_scale=row_scale, z=z, dtype=z.dtype)


def input_gradient(
    dp: Tensor,
    q: Tensor,
    *,
    row_scale: Tensor | None = None,
    z: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """``dZ = dP Q + row_scale * Z``, ``(N, d)``, in ``dtype``; a base layer's product accumulates onto it.

    Args:
        dp: ``(N, R)``.
        q: ``(R, d)``.
        row_scale: ``(N,)`` with ``z (N, d)``, or None.
    """
    wide = dp.dtype
    q = q.to(wide)
    out = buffers.empty(dp, dp.shape[0], q.shape[1], dtype)
    for rows, block in _written(out, wide):
        if row_scale is None:
            _expand(dp[rows], q, block)
        else:
            # The product adds to what is there faster than a second pass over Z would add to the product.
            torch.mul(z[rows].to(wide), row_scale[rows, None], out=block)
            block.addmm_(dp[rows], q)
    return out


def low_rank_output(
    p: Tensor, c: Tensor, coef: Tensor | None, *, bias: Tensor | None = None, dtype: torch.dtype
) -> Tensor:
    """``Y = (P * coef) C^T + bias``, ``(N, d_out)``, in ``dtype``; the base product accumulates onto it.

    Args:
        p: ``(N, R)``.
        c: ``(d_out, R)``.
        coef: ``(R,)``, or None for ones.
        bias: ``(d_out,)`` or None.
    """
    wide, rank = p.dtype, p.shape[1]
    ct, bias = c.to(wide).t(), None if bias is None else bias.to(wide)
    if bias is not None and p.shape[0] * c.shape[0] > _WIDE_OUTPUT:
        # A column of ones beside P, the bias beside C. Adding it by itself costs as much as the product.
        x = p.new_empty(p.shape[0], rank + 1)
        if coef is None:
            x[:, :rank] = p
        else:
            torch.mul(p, coef.to(wide), out=x[:, :rank])
        x[:, rank] = 1.0
        ct, bias = torch.cat((ct, bias[None])), None
    else:
        x = p if coef is None else p * coef.to(wide)
    out = buffers.empty(p, p.shape[0], c.shape[0], dtype)
    for rows, block in _written(out, wide):
        _expand(x[rows], ct, block)
        if bias is not None:
            block.add_(bias)
    return out


def coefficient_grads(
    g: Tensor | None,
    c: Tensor,
    p: Tensor,
    coef: Tensor | None,
    segment: Tensor,
    num_segments: int,
    *,
    task: Tensor | None = None,
    a: Tensor | None = None,
    omega: Tensor | None = None,
    norm2: Tensor | None = None,
    clamp: float,
    per_segment: bool,
    want_dp: bool = True,
    want_dcoef: bool = True,
    out: Tensor | None = None,
) -> CoefficientGrads:
    """``H = G C``; ``dcoef_j = sum_n P_nj H_nj``; ``dP = H * coef - [own segment] t P``; ``t u``.

    Args:
        g: ``(N, d_out)`` gradient of the output, or None when nothing downstream depends on it.
        c: ``(d_out, R)``.
        p: ``(N, R)``.
        coef: ``(R,)``, or None for ones.
        segment, num_segments, task, clamp: as in :func:`project`.
        a: ``(N,)`` gradient of the own ratio, or None; with ``omega`` and ``norm2`` of :func:`project`.
        per_segment: sum ``dcoef`` over the columns of each segment.
        out: ``(N, R)`` that receives dP where there is one; rows may be strided.
    """
    wide = p.dtype
    dp = dcoef = row_scale = None
    if g is not None:
        h = p.new_empty(p.shape)
        columns = c.to(wide)
        for rows in _blocks(g, wide) if g.dtype != wide else (slice(None),):
            _contract(g[rows].to(wide), columns, h[rows])
        if want_dcoef:
            dcoef = torch.linalg.vecdot(p, h, dim=0)
            if per_segment:
                # A product, so that the order of the sum is fixed on every device.
                dcoef = _one_hot(segment, num_segments, wide).t() @ dcoef
        if want_dp:
            # Written once where out is part of a wider matrix, which a product would not do well.
            if coef is not None:
                dp = torch.mul(h, coef.to(wide), out=h if out is None else out)
            else:
                dp = h if out is None else out.copy_(h)
    if want_dp and a is not None:
        t = _slope(omega, norm2, a, clamp)
        own = p.masked_fill(segment != task[:, None], 0.0)
        row_scale = t * _inside(own, norm2, segment, 1).squeeze(1)
        term = own.mul_(t[:, None])
        if dp is not None:
            dp.sub_(term)
        else:
            dp = term.neg_() if out is None else torch.neg(term, out=out)
    return CoefficientGrads(dp, dcoef, row_scale)


def _slope(omega: Tensor, norm2: Tensor, grad_omega: Tensor, clamp: float) -> Tensor:
    """``t = grad_omega / (omega ||z||^2)``; 0 for zero tokens and at the clamp, where omega is constant."""
    floor = omega.new_tensor(clamp).sqrt_()
    norm2 = norm2.view(-1, *[1] * (omega.ndim - 1))
    live = (omega > floor) & (norm2 > TINY)
    return torch.where(live, grad_omega.to(omega.dtype) / (omega * norm2), 0.0)


def dense_rows(z: Tensor) -> Tensor:
    """z with unit stride in its last dimension; rows may be strided."""
    return z if z.stride(-1) == 1 else z.contiguous()


def _one_hot(segment: Tensor, num_segments: int, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.one_hot(segment.long(), num_segments).to(dtype)


def _inside(p: Tensor, norm2: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """Share of each token's energy inside each segment's row space, ``(N, G)``; 0 for zero tokens."""
    if num_segments == 1:
        energy = torch.linalg.vector_norm(p, dim=1, keepdim=True).square_()
    else:
        energy = p.square() @ _one_hot(segment, num_segments, p.dtype)
    positive = torch.where(norm2 > TINY, norm2, torch.inf)
    return energy.div_(positive[:, None])


def _contract(x: Tensor, m: Tensor, out: Tensor) -> None:
    """``out = x @ m`` for a product with few columns."""
    x, rows = dense_rows(x), x.shape[0]
    columns = m.shape[1]
    small = x.numel() * columns < _TILE_WORK or (rows < _LAYOUT_ROWS * columns and not m.is_contiguous())
    if x.device.type != "cpu" or small or not out.is_contiguous():
        torch.mm(x, m, out=out)
    else:
        _by_tiles(x, m, out, 32 if columns <= 96 else 128)


def _expand(x: Tensor, m: Tensor, out: Tensor) -> None:
    """``out = x @ m`` for a product with few terms."""
    if x.device.type == "cpu" and len(m) in _TILE_TERMS and len(x) >= _TILE_LEAST_ROWS and x.is_contiguous():
        _by_tiles(x, m, out, 32)
    else:
        torch.mm(x, m, out=out)


def _by_tiles(x: Tensor, m: Tensor, out: Tensor, tile: int) -> None:
    """``out = x @ m``, a product for every ``tile`` rows; ``out`` contiguous."""
    (terms, columns), rows = m.shape, x.shape[0]
    tiles = rows // tile
    whole = tiles * tile
    m = m.contiguous()
    tiled = out[:whole].view(tiles, tile, columns)
    torch.bmm(x[:whole].view(tiles, tile, terms), m.expand(tiles, terms, columns), out=tiled)
    if whole < rows:
        torch.mm(x[whole:], m, out=out[whole:])


def _written(out: Tensor, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Row ranges of ``out``, each with the block in ``wide`` to be filled, which is then rounded into it."""
    for rows in _blocks(out, wide):
        block = out[rows] if out.dtype == wide else torch.empty_like(out[rows], dtype=wide)
        yield rows, block
        if out.dtype != wide:
            out[rows] = block


def _blocks(like: Tensor, wide: torch.dtype) -> Iterator[slice]:
    """Row ranges of about ``_BLOCK_BYTES``; one range on devices other than the CPU, except for casts."""
    n, d = like.shape
    if like.device.type != "cpu" and like.dtype == wide:
        yield slice(0, n)
        return
    step = max(_BLOCK_BYTES // max(d * wide.itemsize, 1), 1)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
