"""Backward of the null-space ratio by itself: dL/dZ from dL/domega in one read and one write of Z.

    t_nk = a_nk / (omega_nk norm2_n), 0 at the clamp                  a = dL/domega
    dZ_n = (sum_k t_nk (1 - omega_nk^2)) z_n - sum_j t_n,segment(j) P_nj Q_j        (N, d)  dtype of Z

P, norm2 and omega are what ``project`` returned; Q is (R, d). This is ``expand`` with x = -t P, made on the
way in instead of being stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coefficient_grads import coefficient_grads
from .expand import input_gradient
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
from .tf32 import as_operand, factor_operand
from .tuned import choose


@triton.jit(do_not_specialize=["num_tokens", "task_id"])
def ratio_backward_kernel(
    z_ptr,  # (N, d)
    q_ptr,  # (R, d), any strides
    p_ptr,  # (N, R)
    norm2_ptr,  # (N,) float32
    omega_ptr,  # (N, columns) float32
    a_ptr,  # (N, columns) float32
    segment_ptr,  # (R,) int32
    task_ptr,  # (N,) int32, or None
    dz_ptr,  # (N, d)
    num_tokens,
    dim,
    rank,
    num_tasks,
    task_id,
    stride_zn,
    stride_qr,
    stride_qd,
    stride_pn,
    stride_dzn,
    clamp,
    OWN: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_N tokens by TILES * BLOCK_D features of dZ, for R <= BLOCK_R; OWN as in ``project``."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * (TILES * BLOCK_D) + tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    n_ok = first + n < num_tokens
    r_ok = r < rank

    clamp32 = tl.cast(clamp, tl.float32)
    norm2 = tl.load(norm2_ptr + first + n, mask=n_ok, other=0.0)
    segment = tl.load(segment_ptr + r, mask=r_ok, other=-1)
    row_ok = n_ok
    if OWN:
        if task_ptr is not None:
            task = tl.load(task_ptr + first + n, mask=n_ok, other=-1)
        else:
            task = tl.zeros((BLOCK_N,), tl.int32) + tl.cast(task_id, tl.int32)
        row_ok = n_ok & (task >= 0)
    row_scale = tl.zeros((BLOCK_N,), tl.float32)
    t_top = tl.zeros((BLOCK_N,), tl.float32)
    for column in range(COLUMNS):
        t, tu = load_scales(a_ptr, omega_ptr, (first + n) * COLUMNS + column, row_ok, norm2, clamp32)
        row_scale += tu
        t_top = tl.maximum(t_top, tl.abs(t))

    # x = -(t / t_top) P on the columns of each segment. A token's largest |t| is kept out of x: t is often
    # far below what float16 can hold, and with a single segment x is then P itself, not rounded once more.
    p_ptrs = p_ptr + first * stride_pn + n[:, None] * stride_pn + r[None, :]
    p = tl.load(p_ptrs, mask=n_ok[:, None] & r_ok[None, :], other=0.0)
    x = tl.zeros((BLOCK_N, BLOCK_R), q_ptr.dtype.element_ty)
    below = 1.0 / tl.where(t_top == 0.0, 1.0, t_top)
    if OWN:
        for s in tl.static_range(COLUMNS):
            t, _tu = load_scales(a_ptr, omega_ptr, (first + n) * COLUMNS + s, row_ok, norm2, clamp32)
            mine = segment[None, :] == (task + s * num_tasks)[:, None]
            x = tl.where(mine, (p.to(tl.float32) * (-t * below)[:, None]).to(x.dtype), x)
    else:
        for k in range(COLUMNS):
            t, _tu = load_scales(a_ptr, omega_ptr, (first + n) * COLUMNS + k, row_ok, norm2, clamp32)
            mine = (segment == k)[None, :]
            x = tl.where(mine, (p.to(tl.float32) * (-t * below)[:, None]).to(x.dtype), x)

    x = as_operand(x, PRECISION)
    z_ptrs = z_ptr + first * stride_zn + n[:, None] * stride_zn + d[None, :]
    q_ptrs = q_ptr + r[:, None].to(tl.int64) * stride_qr + d[None, :].to(tl.int64) * stride_qd
    dz_ptrs = dz_ptr + first * stride_dzn + n[:, None] * stride_dzn + d[None, :]
    for i in tl.range(0, TILES, num_stages=STAGES):
        shift = i * BLOCK_D
        d_ok = d + shift < dim
        nd_ok = n_ok[:, None] if EVEN_D else n_ok[:, None] & d_ok[None, :]
        q_mask = r_ok[:, None] if EVEN_D else r_ok[:, None] & d_ok[None, :]
        q = tl.load(q_ptrs + shift * stride_qd, mask=q_mask, other=0.0)
        z = tl.load(z_ptrs + shift, mask=nd_ok, other=0.0)
        acc = tl.dot(x, q, input_precision=PRECISION) * t_top[:, None]
        acc += row_scale[:, None] * z.to(tl.float32)
        tl.store(dz_ptrs + shift, acc.to(dz_ptr.dtype.element_ty), mask=nd_ok)


def ratio_backward(
    z: Tensor,
    q: Tensor,
    p: Tensor,
    norm2: Tensor,
    omega: Tensor,
    grad_omega: Tensor,
    segment: Tensor | None = None,
    num_segments: int = 1,
    *,
    task: Tensor | int | None = None,
    siblings: int = 1,
    clamp: float = 0.0,
    out: Tensor | None = None,
    precision: str = "ieee",
    choice: Launch | None = None,
) -> Tensor:
    """dZ of the ratio; (N, d), dtype of z.

    Args:
        z, q, segment, num_segments, task, siblings, clamp: as given to ``project``.
        p, norm2, omega: as ``project`` returned them.
        grad_omega: dL/domega, shaped like omega.
        out: (N, d) with unit stride along d; made if None.
        precision: "ieee" or "tf32", for float32 inputs.
        choice: a launch choice other than the default one.

    Above the ranks that one program keeps (128), -t P is written by ``coefficient_grads`` and expanded in a
    second launch: 2 N R more values of traffic beside the 2 N d.
    """
    check_dtype("z", z)
    check("z", z, (None, None))
    num_tokens, dim = z.shape
    check("q", q, (None, dim), z)
    rank = q.shape[0]
    check("p", p, (num_tokens, rank), z)
    check("norm2", norm2, (num_tokens,))
    if num_segments % siblings or (siblings > 1 and task is None):
        raise ValueError(f"{siblings} siblings need task ids and a multiple of them as num_segments")
    own = task is not None
    columns = siblings if own else num_segments
    check_per_token("omega", omega, num_tokens, columns)
    check_per_token("grad_omega", grad_omega, num_tokens, columns)
    if isinstance(task, Tensor):
        check("task", task, (num_tokens,))
    if segment is None:
        segment = torch.zeros(rank, dtype=torch.int32, device=z.device)
    check("segment", segment, (rank,))
    dz = torch.empty((num_tokens, dim), dtype=z.dtype, device=z.device) if out is None else out
    check("out", dz, (num_tokens, dim), z)
    if dz.stride(1) != 1 and dim > 1:
        raise ValueError("out must have unit stride along its last dimension")
    if not num_tokens:
        return dz
    z = rows(z)
    if choice is None:
        target = current_target(z.device)
        aligned = is_aligned(z)
        choice = choose("ratio_backward", rank, z.dtype, target, aligned=aligned, precision=precision)
    if rank > choice.block_r:
        x = coefficient_grads(
            None,
            None,
            p,
            None,
            a=grad_omega,
            omega=omega,
            norm2=norm2,
            segment=segment,
            num_segments=num_segments,
            task=task,
            siblings=siblings,
            clamp=clamp,
        )
        return input_gradient(x.dp, q, row_scale=x.row_scale, z=z, out=dz, precision=precision)
    q, p = matrix(factor_operand(q, 0, precision)), coordinates(p)
    span = choice.block_d * choice.tiles
    with on_device(z.device):
        ratio_backward_kernel[(triton.cdiv(num_tokens, choice.block_n), triton.cdiv(dim, span))](
            z,
            q,
            p,
            vector(norm2, torch.float32),
            vector(omega, torch.float32),
            vector(grad_omega, torch.float32),
            vector(segment, torch.int32),
            vector(task, torch.int32) if isinstance(task, Tensor) else None,
            dz,
            num_tokens,
            dim,
            rank,
            num_segments // siblings,
            task if isinstance(task, int) else -1,
            z.stride(0),
            q.stride(0),
            q.stride(1),
            p.stride(0),
            dz.stride(0),
            float(clamp),
            OWN=own,
            COLUMNS=columns,
            EVEN_D=dim % span == 0,
            PRECISION=precision,
            BLOCK_N=choice.block_n,
            BLOCK_D=choice.block_d,
            BLOCK_R=choice.block_r,
            TILES=choice.tiles,
            STAGES=choice.num_stages,
            **choice.options(),
        )
    return dz
