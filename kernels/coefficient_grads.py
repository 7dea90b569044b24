"""Coefficient gradients: the upstream gradient meets C once, and everything that depends on it follows.

    H       = G C                                               (N, R)   G (N, d_out), C (d_out, R)
    dcoef_j = sum_n P_nj H_nj                                   (R,)     float32
    t_nk    = a_nk / (omega_nk norm2_n), 0 at the clamp         (N, columns)
    dP_nj   = H_nj coef_j - t_n,segment(j) P_nj                 (N, R)   dtype of P
    row_scale_n = sum_k t_nk (1 - omega_nk^2)                   (N,)     float32

a is dL/domega, zero-cost when there is no ratio in the loss. The last two lines are the ratio's gradient:
dZ = dP Q + row_scale Z (``expand.input_gradient``). Without G (the last module of a truncated forward) only
they remain. dcoef is summed per block of tokens here and over blocks in ``reduce``: no float atomics.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import contract
from .launch import (
    Launch,
    check,
    check_dtype,
    check_per_token,
    coordinates,
    current_target,
    is_aligned,
    matrix,
    on_device,
    rows,
    vector,
)
from .ratio_terms import load_scales
from .reduce import reduce_partials
from .tf32 import factor_operand
from .tuned import choose


class CoefficientGrads(NamedTuple):
    """dp (N, R) in the dtype of p; dcoef (R,), or (num_segments,) if summed per segment, float32, None
    without g; row_scale (N,) float32, None without a."""

    dp: Tensor
    dcoef: Tensor | None
    row_scale: Tensor | None


@triton.jit
def _finish(
    h,
    p_ptrs,
    dp_ptrs,
    coef_ptr,
    partial_ptr,
    a_ptr,
    omega_ptr,
    segment_ptr,
    norm2,
    task,
    token,
    n_ok,
    r,
    rank,
    num_tasks,
    clamp,
    OWN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """From H of some rank columns r: their share of dcoef, and dP. coef_ptr None: there is no H."""
    r_ok = r < rank
    mask = n_ok[:, None] & r_ok[None, :]
    if coef_ptr is not None:
        p = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(partial_ptr + r, tl.sum(p * h, axis=0), mask=r_ok)
        dp = h * tl.load(coef_ptr + r, mask=r_ok, other=0.0)[None, :]
    else:
        dp = h
    if a_ptr is not None:
        # P is loaded again (from the cache): kept in registers since the sum above, it would not fit.
        p = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32)
        segment = tl.load(segment_ptr + r, mask=r_ok, other=-1)[None, :]
        if OWN:
            for s in tl.static_range(COLUMNS):
                t, _ = load_scales(a_ptr, omega_ptr, token * COLUMNS + s, n_ok & (task >= 0), norm2, clamp)
                dp -= tl.where(segment == (task + s * num_tasks)[:, None], t[:, None], 0.0) * p
        else:
            for k in range(COLUMNS):
                t, _ = load_scales(a_ptr, omega_ptr, token * COLUMNS + k, n_ok, norm2, clamp)
                dp -= tl.where(segment == k, t[:, None], 0.0) * p
    tl.store(dp_ptrs, dp.to(dp_ptrs.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "task_id"])
def coefficient_grads_kernel(
    g_ptr,  # (N, d_out), or None
    c_ptr,  # (d_out, R), any strides
    p_ptr,  # (N, R)
    coef_ptr,  # (R,) float32, or None without g
    a_ptr,  # (N, columns) float32, or None
    omega_ptr,  # (N, columns) float32
    norm2_ptr,  # (N,) float32
    segment_ptr,  # (R,) int32
    task_ptr,  # (N,) int32, or None
    dp_ptr,  # (N, R)
    partial_ptr,  # (blocks, R) float32, or None without g
    row_scale_ptr,  # (N,) float32, or None without a
    num_tokens,
    dim,
    rank,
    num_tasks,
    task_id,
    stride_gn,
    stride_cd,
    stride_cr,
    stride_pn,
    stride_dpn,
    clamp,
    OWN: tl.constexpr,
    COLUMNS: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
):
    """dP, row_scale and a block's share of dcoef; formulas in the module's docstring.

    OWN: column s of a and omega belongs to the segment s * num_tasks + task of each token. Otherwise
    column k belongs to segment k. PREFETCH and PARTS as in ``contract``.
    """
    block = tl.program_id(0).to(tl.int64)
    first = block * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    n_ok = first + n < num_tokens
    if g_ptr is not None:
        g_ptrs = g_ptr + first * stride_gn + n[:, None] * stride_gn + d[None, :]
        c_ptrs = c_ptr + d[:, None].to(tl.int64) * stride_cd + r[None, :].to(tl.int64) * stride_cr
        hs, _ = contract(
            g_ptrs,
            c_ptrs,
            n_ok,
            dim,
            rank,
            stride_cd,
            stride_cr,
            False,
            PREFETCH,
            EVEN_D,
            PRECISION,
            BLOCK_N,
            BLOCK_D,
            BLOCK_R,
            PARTS,
        )
    else:
        hs = ()
        for _part in tl.static_range(PARTS):
            hs = hs + (tl.zeros((BLOCK_N, BLOCK_R), tl.float32),)

    token = first + n
    norm2 = tl.zeros((BLOCK_N,), tl.float32)
    task = tl.zeros((BLOCK_N,), tl.int32) + tl.cast(task_id, tl.int32)
    clamp32 = tl.cast(clamp, tl.float32)
    if a_ptr is not None:
        norm2 = tl.load(norm2_ptr + token, mask=n_ok, other=0.0)
        if task_ptr is not None:
            task = tl.load(task_ptr + token, mask=n_ok, other=-1)
        row_scale = tl.zeros((BLOCK_N,), tl.float32)
        row_ok = n_ok & (task >= 0) if OWN else n_ok
        for column in range(COLUMNS):
            _, tu = load_scales(a_ptr, omega_ptr, token * COLUMNS + column, row_ok, norm2, clamp32)
            row_scale += tu
        tl.store(row_scale_ptr + token, row_scale, mask=n_ok)

    p_ptrs = p_ptr + first * stride_pn + n[:, None] * stride_pn + r[None, :]
    dp_ptrs = dp_ptr + first * stride_dpn + n[:, None] * stride_dpn + r[None, :]
    if partial_ptr is not None:
        partial_ptr += block * rank
    for part in tl.static_range(PARTS):
        _finish(
            hs[part],
            p_ptrs + part * BLOCK_R,
            dp_ptrs + part * BLOCK_R,
            coef_ptr,
            partial_ptr,
            a_ptr,
            omega_ptr,
            segment_ptr,
            norm2,
            task,
            token,
            n_ok,
            r + part * BLOCK_R,
            rank,
            num_tasks,
            clamp32,
            OWN,
            COLUMNS,
        )


def coefficient_grads(
    g: Tensor | None,
    c_mat: Tensor | None,
    p: Tensor,
    coef: Tensor | None,
    *,
    a: Tensor | None = None,
    omega: Tensor | None = None,
    norm2: Tensor | None = None,
    segment: Tensor | None = None,
    num_segments: int = 1,
    task: Tensor | int | None = None,
    siblings: int = 1,
    clamp: float = 0.0,
    per_segment: bool = False,
    out: Tensor | None = None,
    precision: str = "ieee",
    choice: Launch | None = None,
) -> CoefficientGrads:
    """dP, the coefficient gradient and the row scale of Z, in one read of G.

    Args:
        g: (N, d_out) upstream gradient, or None: dP is then the ratio's term alone and dcoef None.
        c_mat: (d_out, R), any strides (a transposed (R, d_out) view will do); None without g.
        p: (N, R) as ``project`` returned it, R <= 512; any row stride, so a sibling's columns will do.
        coef: (R,), coefficient of each rank column; None without g.
        a: dL/domega, shaped like omega; None: no ratio term. With it omega and norm2 from ``project``.
        segment, num_segments, task, siblings, clamp: as given to ``project``.
        per_segment: sum dcoef over the columns of each segment, (num_segments,).
        out: (N, R) matrix with unit column stride that receives dP.
        precision: "ieee" or "tf32", for float32 inputs.
        choice: a launch choice other than the default one.
    """
    check_dtype("p", p)
    check("p", p, (None, None))
    num_tokens, rank = p.shape
    dim, aligned = 0, True
    if g is not None:
        if c_mat is None or coef is None:
            raise ValueError("c_mat and coef are needed with g")
        check("g", g, (num_tokens, None), p)
        g, dim = rows(g), g.shape[1]
        aligned = is_aligned(g)
        check("c_mat", c_mat, (dim, rank), p)
        check("coef", coef, (rank,))
    elif a is None:
        raise ValueError("nothing to compute: both g and a are None")
    if num_segments % siblings or (siblings > 1 and task is None):
        raise ValueError(f"{siblings} siblings need task ids and a multiple of them as num_segments")
    own = task is not None
    columns = siblings if own else num_segments
    if segment is None:
        segment = torch.zeros(rank, dtype=torch.int32, device=p.device)
    check("segment", segment, (rank,))
    if a is not None:
        if omega is None or norm2 is None:
            raise ValueError("omega and norm2 are needed with a")
        check_per_token("a", a, num_tokens, columns)
        check_per_token("omega", omega, num_tokens, columns)
        check("norm2", norm2, (num_tokens,))
    if isinstance(task, Tensor):
        check("task", task, (num_tokens,))
    dp = torch.empty((num_tokens, rank), dtype=p.dtype, device=p.device) if out is None else out
    check("out", dp, (num_tokens, rank), p)
    if dp.stride(1) != 1 and rank > 1:
        raise ValueError("out must have unit stride along its last dimension")

    if choice is None:
        target = current_target(p.device)
        choice = choose("coefficient_grads", rank, p.dtype, target, aligned=aligned, precision=precision)
    blocks = triton.cdiv(num_tokens, choice.block_n)
    partials = row_scale = None
    if g is not None:
        partials = torch.empty((blocks, rank), dtype=torch.float32, device=p.device)
    if a is not None:
        row_scale = torch.empty(num_tokens, dtype=torch.float32, device=p.device)
    if num_tokens:
        p = coordinates(p)
        c_mat = None if g is None else matrix(factor_operand(c_mat, 0, precision))
        with on_device(p.device):
            coefficient_grads_kernel[(blocks,)](
                g,
                c_mat,
                p,
                None if g is None else vector(coef, torch.float32),
                vector(a, torch.float32),
                None if a is None else vector(omega, torch.float32),
                None if a is None else vector(norm2, torch.float32),
                vector(segment, torch.int32),
                vector(task, torch.int32) if isinstance(task, Tensor) else None,
                dp,
                partials,
                row_scale,
                num_tokens,
                dim,
                rank,
                num_segments // siblings,
                task if isinstance(task, int) else -1,
                0 if g is None else g.stride(0),
                0 if g is None else c_mat.stride(0),
                0 if g is None else c_mat.stride(1),
                p.stride(0),
                dp.stride(0),
                float(clamp),
                OWN=own,
                COLUMNS=columns,
                PREFETCH=choice.prefetch,
                EVEN_D=dim % choice.block_d == 0,
                PRECISION=precision,
                BLOCK_N=choice.block_n,
                BLOCK_D=choice.block_d,
                BLOCK_R=choice.block_r,
                PARTS=choice.parts,
                **choice.options(),
            )
    dcoef = None
    if partials is not None:
        dcoef = reduce_partials(partials, *((segment, num_segments) if per_segment else ()))
    return CoefficientGrads(dp, dcoef, row_scale)
