"""Expand: from R coordinates back to d features, with everything that is added on the way.

    out (+)= (x * scale) M + row_scale z + bias          (N, d)  dtype of x

x (N, R), M (R, d), z (N, d); scale (R,), row_scale (N,), bias (d,) float32. Two steps of a merged
layer are this one program:

    input_gradient     dZ = dP Q + row_scale Z                 x = dP, M = Q
    low_rank_output    Y  = (P * coef) C^T + bias              x = P,  M = C^T

Order of the steps. Into a base product W of the same shape, both orders move the same bytes through memory:
expand first writes out, and the matrix product reads and writes it (beta = 1); or the product writes, and
expand reads and writes. But the product is limited by arithmetic and hides one more read, while expand is
limited by memory: with accumulate=False it moves 1 N d (2 N d with z) instead of 2 N d (3 N d). So run
expand first and let the base product accumulate; accumulate=True is for base layers (quantised ones) that
cannot add into a given matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    Launch,
    check,
    check_dtype,
    coordinates,
    current_target,
    is_aligned,
    matrix,
    on_device,
    rows,
    vector,
)
from .tf32 import as_operand, factor_operand
from .tuned import choose


@triton.jit(do_not_specialize=["num_tokens"])
def expand_kernel(
    x_ptr,  # (N, R)
    m_ptr,  # (R, d), any strides
    scale_ptr,  # (R,) float32, or None
    bias_ptr,  # (d,) float32, or None
    row_scale_ptr,  # (N,) float32, or None
    z_ptr,  # (N, d), with row_scale
    out_ptr,  # (N, d)
    num_tokens,
    dim,
    rank,
    stride_xn,
    stride_mr,
    stride_md,
    stride_zn,
    stride_outn,
    ACCUMULATE: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_R: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_N tokens by TILES * BLOCK_D features of out; formula in the module's docstring.

    ONE_R: all of R fits in BLOCK_R, and x stays with the program. The loop over features asks for its
    pipelining by name: by itself Triton would only fetch ahead what feeds a product, not z.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * (TILES * BLOCK_D) + tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    n_ok = first + n < num_tokens
    x_ptrs = x_ptr + first * stride_xn + n[:, None] * stride_xn + r[None, :]
    m_ptrs = m_ptr + r[:, None].to(tl.int64) * stride_mr + d[None, :].to(tl.int64) * stride_md
    out_ptrs = out_ptr + first * stride_outn + n[:, None] * stride_outn + d[None, :]
    if z_ptr is not None:
        z_ptrs = z_ptr + first * stride_zn + n[:, None] * stride_zn + d[None, :]
        row_scale = tl.load(row_scale_ptr + first + n, mask=n_ok, other=0.0)
    if ONE_R:
        r_ok = r < rank
        x = tl.load(x_ptrs, mask=n_ok[:, None] & r_ok[None, :], other=0.0)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + r, mask=r_ok, other=0.0)
            x = (x.to(tl.float32) * scale[None, :]).to(m_ptr.dtype.element_ty)
        x = as_operand(x, PRECISION)

    for i in tl.range(0, TILES, num_stages=STAGES):
        shift = i * BLOCK_D
        d_ok = d + shift < dim
        nd_ok = n_ok[:, None] if EVEN_D else n_ok[:, None] & d_ok[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        if ONE_R:
            m_mask = r_ok[:, None] if EVEN_D else r_ok[:, None] & d_ok[None, :]
            m = tl.load(m_ptrs + shift * stride_md, mask=m_mask, other=0.0)
            acc = tl.dot(x, m, acc, input_precision=PRECISION)
        else:
            for r0 in range(0, rank, BLOCK_R):
                r_ok = r + r0 < rank
                x = tl.load(x_ptrs + r0, mask=n_ok[:, None] & r_ok[None, :], other=0.0)
                if scale_ptr is not None:
                    scale = tl.load(scale_ptr + r0 + r, mask=r_ok, other=0.0)
                    x = (x.to(tl.float32) * scale[None, :]).to(m_ptr.dtype.element_ty)
                x = as_operand(x, PRECISION)
                m_mask = r_ok[:, None] if EVEN_D else r_ok[:, None] & d_ok[None, :]
                m = tl.load(m_ptrs + shift * stride_md + r0 * stride_mr, mask=m_mask, other=0.0)
                acc = tl.dot(x, m, acc, input_precision=PRECISION)
        if z_ptr is not None:
            z = tl.load(z_ptrs + shift, mask=nd_ok, other=0.0)
            acc += row_scale[:, None] * z.to(tl.float32)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + d + shift, mask=d_ok, other=0.0)[None, :]
        if ACCUMULATE:
            acc += tl.load(out_ptrs + shift, mask=nd_ok, other=0.0).to(tl.float32)
        tl.store(out_ptrs + shift, acc.to(out_ptr.dtype.element_ty), mask=nd_ok)


def expand(
    x: Tensor,
    m: Tensor,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    z: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    precision: str = "ieee",
    choice: Launch | None = None,
) -> Tensor:
    """out (+)= (x * scale) m + row_scale z + bias.

    Args:
        x: (N, R) bfloat16, float16 or float32; any row stride; R <= 512.
        m: (R, d), dtype of x; any strides, so C.T needs no copy.
        scale: (R,), multiplies the columns of x.
        bias: (d,); float32 saves a conversion (as 16-bit numbers it would cost bank conflicts).
        row_scale, z: (N,) and (N, d), both or neither.
        out: (N, d) with unit stride along d; made if None.
        accumulate: add to what out holds.
        precision: "ieee" or "tf32", for float32 inputs.
        choice: a launch choice other than the default one.
    """
    check_dtype("x", x)
    check("x", x, (None, None))
    num_tokens, rank = x.shape
    check("m", m, (rank, None), x)
    dim = m.shape[1]
    if (row_scale is None) != (z is None):
        raise ValueError("row_scale and z go together")
    if accumulate and out is None:
        raise ValueError("accumulate needs out")
    if scale is not None:
        check("scale", scale, (rank,))
    if bias is not None:
        check("bias", bias, (dim,))
    if z is not None:
        check("z", z, (num_tokens, dim), x)
        check("row_scale", row_scale, (num_tokens,))
    if out is None:
        out = torch.empty((num_tokens, dim), dtype=x.dtype, device=x.device)
    check("out", out, (num_tokens, dim), x)
    if out.stride(1) != 1 and dim > 1:
        raise ValueError("out must have unit stride along its last dimension")
    if choice is None:
        target = current_target(x.device)
        bare = z is None and bias is None and not accumulate
        step = "low_rank_output" if bare else "input_gradient"
        choice = choose(step, rank, x.dtype, target, aligned=is_aligned(out), precision=precision)
    if num_tokens and dim:
        x, m = coordinates(x), matrix(factor_operand(m, 0, precision))
        z = None if z is None else rows(z)
        span = choice.block_d * choice.tiles
        with on_device(x.device):
            expand_kernel[(triton.cdiv(num_tokens, choice.block_n), triton.cdiv(dim, span))](
                x,
                m,
                vector(scale, torch.float32),
                vector(bias, torch.float32),
                vector(row_scale, torch.float32),
                z,
                out,
                num_tokens,
                dim,
                rank,
                x.stride(0),
                m.stride(0),
                m.stride(1),
                0 if z is None else z.stride(0),
                out.stride(0),
                ACCUMULATE=accumulate,
                EVEN_D=dim % span == 0,
                PRECISION=precision,
                BLOCK_N=choice.block_n,
                BLOCK_D=choice.block_d,
                BLOCK_R=choice.block_r,
                ONE_R=rank <= choice.block_r,
                TILES=choice.tiles,
                STAGES=choice.num_stages,
                **choice.options(),
            )
    return out


def input_gradient(
    dp: Tensor,
    q: Tensor,
    *,
    row_scale: Tensor | None = None,
    z: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    **launch: object,
) -> Tensor:
    """dZ (+)= dP Q + row_scale Z: (N, d) from dp (N, R) and q (R, d)."""
    return expand(dp, q, row_scale=row_scale, z=z, out=out, accumulate=accumulate, **launch)


def low_rank_output(
    p: Tensor,
    c_mat: Tensor,
    coef: Tensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    **launch: object,
) -> Tensor:
    """Y (+)= (P * coef) C^T + bias: (N, d_out) from p (N, R), c_mat (d_out, R) and coef (R,)."""
    return expand(p, c_mat.T, scale=coef, bias=bias, out=out, accumulate=accumulate, **launch)
