"""Project: one pass over the activations gives the low-rank coordinates, norms, ratios and the loss.

    P     = Z Q^T                                      (N, R)  dtype of Z
    norm2 = ||z_n||^2                                  (N,)    float32
    omega = sqrt(max(1 - ||P_n[segment]||^2 / norm2_n, clamp))  float32

Z is (N, d), Q (R, d) holds orthonormal rows of one or several adapters stacked, and segment (R,) says which
stretch of rows belongs together. The energies come from the float32 accumulator, before P is rounded.
The programs run over blocks of tokens only; nothing is added up across programs, so results do not depend
on their order.
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
    current_target,
    is_aligned,
    matrix,
    on_device,
    rows,
    vector,
)
from .ratio_terms import omega_of
from .tf32 import factor_operand
from .tuned import choose


class Projection(NamedTuple):
    """What ``project`` returns; a field that was not asked for is None.

    p: (N, R), dtype of z.   norm2: (N,) float32.
    omega, float32: (N, num_segments) without task ids, (N,) with them, (N, siblings) with siblings > 1.
    loss_partials, float32: (blocks, num_segments), sum of weight * omega over each block of tokens;
    add them up over the first dimension.
    """

    p: Tensor | None
    norm2: Tensor | None
    omega: Tensor | None
    loss_partials: Tensor | None


@triton.jit
def _energy(
    accs,
    segment_ptr,
    own,
    r,
    rank,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Row sums of the squares in the columns whose segment is ``own``."""
    energy = tl.zeros((BLOCK_N,), tl.float32)
    for part in tl.static_range(PARTS):
        column = r + part * BLOCK_R
        segment = tl.load(segment_ptr + column, mask=column < rank, other=-1)[None, :]
        energy += tl.sum(tl.where(segment == own, accs[part] * accs[part], 0.0), axis=1)
    return energy


@triton.jit(do_not_specialize=["num_tokens", "task_id"])
def project_kernel(
    z_ptr,  # (N, d)
    q_ptr,  # (R, d), any strides
    segment_ptr,  # (R,) int32
    task_ptr,  # (N,) int32, or None
    weight_ptr,  # (N,) float32, or None
    p_ptr,  # (N, R), or None
    norm2_ptr,  # (N,) float32, or None: no norms, no ratios
    omega_ptr,  # (N, columns) float32
    partial_ptr,  # (blocks, segments) float32, or None
    num_tokens,
    dim,
    rank,
    num_segments,
    num_tasks,
    task_id,
    stride_zn,
    stride_qr,
    stride_qd,
    stride_pn,
    clamp,
    OWN: tl.constexpr,
    SIBLINGS: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """P, norm2, omega and loss partials of BLOCK_N tokens; formulas in the module's docstring.

    OWN: each token has its own task k, given by task_ptr or by task_id for all; its segments are
    s * num_tasks + k for the siblings s. Otherwise every token gets the ratio of every segment.
    PREFETCH and PARTS as in ``contract``.
    """
    block = tl.program_id(0).to(tl.int64)
    first = block * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    n_ok = first + n < num_tokens
    z_ptrs = z_ptr + first * stride_zn + n[:, None] * stride_zn + d[None, :]
    q_ptrs = q_ptr + d[:, None].to(tl.int64) * stride_qd + r[None, :].to(tl.int64) * stride_qr

    accs, norm2 = contract(
        z_ptrs,
        q_ptrs,
        n_ok,
        dim,
        rank,
        stride_qd,
        stride_qr,
        norm2_ptr is not None,
        PREFETCH,
        EVEN_D,
        PRECISION,
        BLOCK_N,
        BLOCK_D,
        BLOCK_R,
        PARTS,
    )

    if p_ptr is not None:
        p_ptrs = p_ptr + first * stride_pn + n[:, None] * stride_pn + r[None, :]
        for part in tl.static_range(PARTS):
            mask = n_ok[:, None] & (r + part * BLOCK_R < rank)[None, :]
            tl.store(p_ptrs + part * BLOCK_R, accs[part].to(p_ptr.dtype.element_ty), mask=mask)

    if norm2_ptr is not None:
        tl.store(norm2_ptr + first + n, norm2, mask=n_ok)
        clamp32 = tl.cast(clamp, tl.float32)
        if partial_ptr is not None:
            weight = tl.load(weight_ptr + first + n, mask=n_ok, other=0.0)
        if OWN:
            if task_ptr is not None:
                task = tl.load(task_ptr + first + n, mask=n_ok, other=-1)
            else:
                task = tl.where(n_ok, tl.cast(task_id, tl.int32), -1)
            for s in tl.static_range(SIBLINGS):
                own = (task + s * num_tasks)[:, None]
                energy = _energy(accs, segment_ptr, own, r, rank, BLOCK_N, BLOCK_R, PARTS)
                omega = tl.where(task >= 0, omega_of(energy, norm2, clamp32), 1.0)
                tl.store(omega_ptr + (first + n) * SIBLINGS + s, omega, mask=n_ok)
                if partial_ptr is not None:
                    term = tl.where(weight == 0.0, 0.0, weight * omega)
                    for k0 in range(0, num_tasks, BLOCK_K):
                        k = k0 + tl.arange(0, BLOCK_K)
                        hit = task[:, None] == k[None, :]
                        total = tl.sum(tl.where(hit, term[:, None], 0.0), axis=0)
                        total_ptrs = partial_ptr + block * num_segments + s * num_tasks + k
                        tl.store(total_ptrs, total, mask=k < num_tasks)
        else:
            for k in range(num_segments):
                energy = _energy(accs, segment_ptr, k, r, rank, BLOCK_N, BLOCK_R, PARTS)
                omega = omega_of(energy, norm2, clamp32)
                tl.store(omega_ptr + (first + n) * num_segments + k, omega, mask=n_ok)
                if partial_ptr is not None:
                    term = tl.where(weight == 0.0, 0.0, weight * omega)
                    tl.store(partial_ptr + block * num_segments + k, tl.sum(term, axis=0))


def project(
    z: Tensor,
    q: Tensor,
    segment: Tensor | None = None,
    num_segments: int = 1,
    *,
    task: Tensor | int | None = None,
    siblings: int = 1,
    weight: Tensor | None = None,
    clamp: float = 0.0,
    ratio: bool = True,
    want_p: bool = True,
    precision: str = "ieee",
    choice: Launch | None = None,
) -> Projection:
    """P = Z Q^T with norms, ratios and loss partials, in one read of Z.

    Args:
        z: (N, d) bfloat16, float16 or float32; any row stride.
        q: (R, d), R <= 512, dtype of z; orthonormal rows within each segment; any strides, so a
            transposed view of a (d, R) matrix will do. Zero rows of segment -1 may pad it.
        segment: (R,) int32, segment of each row of q; None for a single segment.
        num_segments: number of segments.
        task: int32 (N,), the task of each token, or one int for all; -1: the token has no term of its
            own (omega = 1, no loss). None: the ratio of every segment for every token.
        siblings: with task, the number S of stacks that share z; segments are then numbered
            s * (num_segments / S) + task.
        weight: (N,) float32; asks for loss_partials. Tokens of weight 0 add nothing, whatever z holds.
        clamp: lower bound of 1 - u.
        ratio: False computes P only.
        want_p: False computes everything else and does not write P.
        precision: "ieee" or "tf32", for float32 inputs.
        choice: a launch choice other than the default one.
    """
    check_dtype("z", z)
    check("z", z, (None, None))
    num_tokens, dim = z.shape
    check("q", q, (None, dim), z)
    rank = q.shape[0]
    z, q = rows(z), matrix(factor_operand(q, 1, precision))
    if choice is None:
        target = current_target(z.device)
        step = "project" if ratio else "low_rank_input"
        choice = choose(step, rank, z.dtype, target, aligned=is_aligned(z), precision=precision)
    if not ratio and not want_p:
        raise ValueError("nothing to compute: both ratio and want_p are False")
    if num_segments % siblings or (siblings > 1 and task is None):
        raise ValueError(f"{siblings} siblings need task ids and a multiple of them as num_segments")
    own = task is not None
    if isinstance(task, Tensor):
        check("task", task, (num_tokens,))
    if weight is not None:
        check("weight", weight, (num_tokens,))
    if segment is None:
        segment = torch.zeros(rank, dtype=torch.int32, device=z.device)
    check("segment", segment, (rank,))

    columns = siblings if own else num_segments
    blocks = triton.cdiv(num_tokens, choice.block_n)
    p = norm2 = omega = partials = None
    if want_p:
        p = torch.empty((num_tokens, rank), dtype=z.dtype, device=z.device)
    if ratio:
        norm2 = torch.empty(num_tokens, dtype=torch.float32, device=z.device)
        omega = torch.empty((num_tokens, columns), dtype=torch.float32, device=z.device)
        if weight is not None:
            partials = torch.empty((blocks, num_segments), dtype=torch.float32, device=z.device)
    if num_tokens:
        with on_device(z.device):
            project_kernel[(blocks,)](
                z,
                q,
                vector(segment, torch.int32),
                vector(task, torch.int32) if isinstance(task, Tensor) else None,
                None if partials is None else vector(weight, torch.float32),
                p,
                norm2,
                omega,
                partials,
                num_tokens,
                dim,
                rank,
                num_segments,
                num_segments // siblings,
                task if isinstance(task, int) else -1,
                z.stride(0),
                q.stride(0),
                q.stride(1),
                rank,
                float(clamp),
                OWN=own,
                SIBLINGS=siblings,
                PREFETCH=choice.prefetch,
                EVEN_D=dim % choice.block_d == 0,
                PRECISION=precision,
                BLOCK_N=choice.block_n,
                BLOCK_D=choice.block_d,
                BLOCK_R=choice.block_r,
                PARTS=choice.parts,
                BLOCK_K=16,
                **choice.options(),
            )
    if omega is not None and own and siblings == 1:
        omega = omega.view(num_tokens)
    return Projection(p, norm2, omega, partials)


def low_rank_input(z: Tensor, q: Tensor, *, precision: str = "ieee", choice: Launch | None = None) -> Tensor:
    """P = Z Q^T alone, for modules whose ratio is not in the loss."""
    return project(z, q, ratio=False, precision=precision, choice=choice).p
