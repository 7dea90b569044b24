"""Second stage of the two-stage sums: block partials (B, R) to column or segment sums, in a fixed order.

    sums_j = sum_b partials_bj            (R,)               or, with segments,
    sums_k = sum_b sum_{j: segment_j = k} partials_bj        (num_segments,)

float32 throughout. One program owns each sum and walks the blocks in order, so a result depends neither on
scheduling nor on the launch: no float atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check, on_device, vector

_BLOCK_B, _BLOCK_R = 64, 32


@triton.jit(do_not_specialize=["num_blocks"])
def column_sums_kernel(partial_ptr, sums_ptr, num_blocks, rank, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr):
    """One program per BLOCK_R columns: sums_j = sum_b partials_bj."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    b = tl.arange(0, BLOCK_B)
    acc = tl.zeros((BLOCK_B, BLOCK_R), tl.float32)
    for start in range(0, num_blocks, BLOCK_B):
        row = (start + b).to(tl.int64)
        mask = (row < num_blocks)[:, None] & (r < rank)[None, :]
        acc += tl.load(partial_ptr + row[:, None] * rank + r[None, :], mask=mask, other=0.0)
    tl.store(sums_ptr + r, tl.sum(acc, axis=0), mask=r < rank)


@triton.jit(do_not_specialize=["num_blocks"])
def segment_sums_kernel(
    partial_ptr, segment_ptr, sums_ptr, num_blocks, rank, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr
):
    """One program per segment k: sums_k = sum_b sum_{j: segment_j = k} partials_bj."""
    k = tl.program_id(0)
    b = tl.arange(0, BLOCK_B)
    acc = tl.zeros((BLOCK_B, BLOCK_R), tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        own = tl.load(segment_ptr + r, mask=r < rank, other=-1) == k
        for start in range(0, num_blocks, BLOCK_B):
            row = (start + b).to(tl.int64)
            mask = (row < num_blocks)[:, None] & (r < rank)[None, :]
            part = tl.load(partial_ptr + row[:, None] * rank + r[None, :], mask=mask, other=0.0)
            acc += tl.where(own[None, :], part, 0.0)
    tl.store(sums_ptr + k, tl.sum(tl.sum(acc, axis=1), axis=0))


def reduce_partials(
    partials: Tensor, segment: Tensor | None = None, num_segments: int | None = None
) -> Tensor:
    """Sums of ``partials`` (B, R) float32 over the first dimension: (R,), or (num_segments,) where
    ``segment`` (R,) int32 names the segment of each column. B = 0 gives zeros."""
    check("partials", partials, (None, None))
    num_blocks, rank = partials.shape
    partials = vector(partials, torch.float32)
    if segment is None:
        sums = torch.empty(rank, dtype=torch.float32, device=partials.device)
    else:
        check("segment", segment, (rank,))
        if num_segments is None:
            raise ValueError("num_segments is needed to sum over segments")
        sums = torch.empty(num_segments, dtype=torch.float32, device=partials.device)
    if not num_blocks or not sums.numel():
        return sums.zero_()
    sizes = {"BLOCK_B": _BLOCK_B, "BLOCK_R": _BLOCK_R, "num_warps": 4, "enable_fp_fusion": True}
    with on_device(partials.device):
        if segment is None:
            grid = (triton.cdiv(rank, _BLOCK_R),)
            column_sums_kernel[grid](partials, sums, num_blocks, rank, **sizes)
        else:
            segment_sums_kernel[(num_segments,)](
                partials, vector(segment, torch.int32), sums, num_blocks, rank, **sizes
            )
    return sums
