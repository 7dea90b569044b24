"""The loop that ``project`` and ``coefficient_grads`` share: a block of rows of X times Y, over all of d.

    accs = X Y in PARTS blocks of columns, each (BLOCK_N, BLOCK_R) float32;   norm2_n = ||x_n||^2

X is read once. Two ways to feed it, chosen per target (``launch`` says why):

PREFETCH False: X and Y go through shared memory several steps ahead and meet only the matrix units; norm2 is
the diagonal of X X^T.
PREFETCH: X is one step ahead in registers, is squared there if the norm is wanted, and is copied to shared
memory for the product.

The columns stand in PARTS accumulators so that what follows the loop needs registers for one at a time.
"""

import triton
import triton.language as tl

from .tf32 import as_operand


@triton.jit
def contract(
    x_ptrs,  # (BLOCK_N, BLOCK_D)
    y_ptrs,  # (BLOCK_D, BLOCK_R), the first part
    n_ok,
    dim,
    rank,
    stride_yd,
    stride_yr,
    NORM: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    norm2 = tl.zeros((BLOCK_N,), tl.float32)
    accs = ()
    for _ in tl.static_range(PARTS):
        accs = accs + (tl.zeros((BLOCK_N, BLOCK_R), tl.float32),)
    if PREFETCH:
        ahead = tl.load(x_ptrs, mask=n_ok[:, None] & (d < dim)[None, :], other=0.0)
        for start in range(0, dim, BLOCK_D):
            x = ahead
            x_ptrs += BLOCK_D
            x_mask = n_ok[:, None] & (d < dim - start - BLOCK_D)[None, :]
            ahead = tl.load(x_ptrs, mask=x_mask, other=0.0)
            accs = _add_product(
                x, y_ptrs, accs, d < dim - start, r, rank, stride_yr, EVEN_D, PRECISION, BLOCK_R, PARTS
            )
            if NORM:
                x32 = x.to(tl.float32)
                norm2 += tl.sum(x32 * x32, axis=1)
            y_ptrs += BLOCK_D * stride_yd
    else:
        gram = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
        for start in range(0, dim, BLOCK_D):
            x_mask = n_ok[:, None] if EVEN_D else n_ok[:, None] & (d < dim - start)[None, :]
            x = tl.load(x_ptrs, mask=x_mask, other=0.0)
            accs = _add_product(
                x, y_ptrs, accs, d < dim - start, r, rank, stride_yr, EVEN_D, PRECISION, BLOCK_R, PARTS
            )
            if NORM:
                x = as_operand(x, PRECISION)
                gram = tl.dot(x, tl.trans(x), gram, input_precision=PRECISION)
            x_ptrs += BLOCK_D
            y_ptrs += BLOCK_D * stride_yd
        if NORM:
            n = tl.arange(0, BLOCK_N)
            norm2 = tl.sum(tl.where(n[:, None] == n[None, :], gram, 0.0), axis=1)
    return accs, norm2


@triton.jit
def _add_product(
    x,
    y_ptrs,
    accs,
    d_ok,
    r,
    rank,
    stride_yr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
):
    """accs + x Y for one step along d."""
    x = as_operand(x, PRECISION)
    sums = ()
    for part in tl.static_range(PARTS):
        r_ok = (r + part * BLOCK_R < rank)[None, :]
        shift = tl.cast(part * BLOCK_R, tl.int64) * stride_yr
        y = tl.load(y_ptrs + shift, mask=r_ok if EVEN_D else r_ok & d_ok[:, None], other=0.0)
        sums = sums + (tl.dot(x, y, accs[part], input_precision=PRECISION),)
    return sums
