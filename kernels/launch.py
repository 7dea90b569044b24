"""How the programs of this folder are launched: block sizes, guards and memory layout.

The choices are plain functions of (rank, dtype, target); nothing here looks at the number of tokens, so a
new sequence length never compiles or tunes anything. ``target`` is a name such as ``"sm_90"`` or
``"gfx942"``; unknown targets get small tiles that fit everywhere.

Why the numbers are what they are (P = Z Q^T over N tokens, d features, rank R, 2-byte dtypes):

 - A program holds all R columns of its tokens, so Z is read once. Q is then read again by every program,
   R / block_n bytes from L2 for each byte of Z; block_n = 128 keeps that at or below 1 up to R = 128.
 - ||z||^2 comes in one of two ways. Without ``prefetch`` it is the diagonal of Z Z^T, computed by the matrix
   units from the shared-memory tile they read anyway: on sm_90 and sm_100 they read it asynchronously, and a
   tile that feeds both them and ordinary arithmetic is refilled too early by Triton's pipeliner. With
   ``prefetch`` Z is one step ahead in registers and squared there, and the shared tile has a single buffer:
   half the matrix work, and on sm_80 and sm_120 a layout without bank conflicts. On sm_90 at R = 128 the
   diagonal would not leave registers for two programs, so that choice prefetches too.
 - ``parts``: H of 128 columns in one accumulator would make the arithmetic after the loop spill.
 - ``maxnreg`` = 128 at 8 warps is what two programs per multiprocessor leave (65536 / 512 threads).
 - float32 products run on the ordinary arithmetic units, so they take small tiles. In tf32 (``tf32``) they
   run on the matrix units of NVIDIA's devices; the tiles hold as many bytes as the 2-byte ones of 64 rows,
   and Z is squared in registers: the diagonal would have its factors rounded.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

MAX_RANK = 512
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PRECISIONS = ("ieee", "tf32")
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
RANK_BINS = (32, 64, 128, 256, 512)

_FAMILIES = {
    "sm_80": "ampere",
    "sm_86": "consumer",
    "sm_87": "consumer",
    "sm_89": "consumer",
    "sm_90": "hopper",
    "sm_100": "blackwell",
    "sm_103": "blackwell",
    "sm_120": "consumer",
    "sm_121": "consumer",
    "gfx942": "cdna",
    "gfx950": "cdna",
}
_NVIDIA = ("ampere", "consumer", "hopper", "blackwell")


@dataclass(frozen=True)
class Launch:
    """One launch choice.

    block_n: tokens per program. block_d: features per step. block_r: rank columns per accumulator, parts:
    accumulators. tiles: steps per program where it does not walk all features. prefetch: see ``contract``.
    """

    block_n: int
    block_d: int
    block_r: int
    num_warps: int
    num_stages: int
    prefetch: bool = False
    parts: int = 1
    tiles: int = 1
    maxnreg: int | None = None

    def options(self) -> dict[str, object]:
        """Keyword arguments of the launch itself. Fused multiply-add is asked for by name because Triton's
        default for it is about to change."""
        options: dict[str, object] = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        if self.maxnreg is not None:
            options["maxnreg"] = self.maxnreg
        return options


def rank_bin(rank: int) -> int:
    """Columns that a program reserves for ``rank``: the next of 32, 64, 128, 256, 512."""
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(
            f"the stacked rank must be 1..{MAX_RANK}, got {rank}; split the stack into several calls"
        )
    return next(b for b in RANK_BINS if rank <= b)


def family(target: str) -> str:
    return _FAMILIES.get(target, "other")


def has_tf32(target: str) -> bool:
    return family(target) in _NVIDIA


def _runs_in_tf32(dtype: torch.dtype, precision: str, target: str) -> bool:
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(map(repr, PRECISIONS))}")
    return dtype == torch.float32 and precision == "tf32" and has_tf32(target)


def project_choice(
    rank: int,
    dtype: torch.dtype,
    target: str,
    *,
    ratio: bool = True,
    aligned: bool = True,
    precision: str = "ieee",
) -> Launch:
    """Choice for ``project`` (``ratio``: with norms and ratios) and, without, for ``coefficient_grads``,
    which walks its wide operand in the same way. ``aligned``: see ``is_aligned``. ``precision``: "ieee" or
    "tf32", for float32."""
    r, f = rank_bin(rank), family(target)
    tf32 = _runs_in_tf32(dtype, precision, target)
    if dtype == torch.float32 and not tf32:
        return _project_float32(r, target, ratio)
    if f == "other" or not aligned:
        warps, block_d = 4 if r <= 128 else 8, 16 if tf32 else 32
        return Launch(32, block_d, min(r, 32), warps, 2, prefetch=ratio, parts=r // min(r, 32))
    if tf32:
        return _project_tf32(r, f, ratio)
    if f in ("hopper", "blackwell"):
        if r <= 64:
            return Launch(128, 64, r, 8, 3, maxnreg=128)
        if r == 128 and ratio:
            return Launch(128, 64, 128, 8, 3, prefetch=True, maxnreg=128)
        if r == 128:
            return Launch(128, 64, 32, 8, 3, parts=4, maxnreg=128)
        return Launch(64, 64, 64, 8, 3 if r == 256 else 2, parts=r // 64)
    if f == "cdna":
        if r <= 128:
            return Launch(128, 64, r, 4 if r == 32 else 8, 2, prefetch=ratio)
        return Launch(64, 64 if r == 256 else 32, r, 8 if r == 256 else 4, 2, prefetch=ratio)
    if r <= 64:
        return Launch(64, 64, r, 4, 3, prefetch=ratio)
    if r == 128 and ratio:
        return Launch(128, 32, 64, 8, 3, prefetch=True, parts=2, maxnreg=128)
    if r == 128:
        return Launch(128, 32, 32, 4, 3, parts=4)
    block_r = 256 if r == 512 and ratio else 128
    return Launch(64, 32, block_r, 8, 2, prefetch=ratio, parts=r // block_r)


def _project_float32(r: int, target: str, ratio: bool) -> Launch:
    if family(target) == "cdna":
        # A second stage on gfx950 would copy straight to LDS, four bytes at a time where it transposes.
        stages = 1 if target == "gfx950" else 2
        if r == 512:
            return Launch(32, 16, 256, 8, stages, prefetch=ratio, parts=2)
        return Launch(64 if r <= 64 else 32, 32, r, 4, stages, prefetch=ratio)
    if r <= 128:
        return Launch(64 if r <= 64 else 32, 16, r, 4, 2, prefetch=ratio)
    return Launch(16, 16, r // 2, 4, 2, prefetch=ratio, parts=2)


def _project_tf32(r: int, f: str, ratio: bool) -> Launch:
    if r == 32:
        return Launch(64, 32, 32, 4, 2, prefetch=ratio)
    if r == 64:
        # Three programs' worth of registers; by itself ptxas makes do with fewer and spills.
        return Launch(64, 32, 64, 4, 3, prefetch=ratio, maxnreg=168)
    if r == 128 and f in ("hopper", "blackwell"):
        return Launch(64, 32, 64, 8, 2, prefetch=ratio, parts=2)
    if r == 128:
        return Launch(32, 32, 128, 4, 2, prefetch=ratio)
    block_r = 128 if ratio else 64
    return Launch(32, 32, block_r, 8, 2, prefetch=ratio, parts=r // block_r)


def expand_choice(
    rank: int,
    dtype: torch.dtype,
    target: str,
    *,
    step: str = "input_gradient",
    aligned: bool = True,
    precision: str = "ieee",
) -> Launch:
    """Choice for ``expand`` as "input_gradient" or "low_rank_output" (which adds nothing to the product),
    and for "ratio_backward". A program keeps at most 128 columns; larger ranks go in steps of block_r."""
    r, f = rank_bin(rank), family(target)
    tf32 = _runs_in_tf32(dtype, precision, target)
    if dtype == torch.float32 and not tf32:
        if f == "cdna":
            return Launch(32, 64, 32, 4, 1 if target == "gfx950" else 2, tiles=4)
        return Launch(32, 64, 32 if r == 32 else 16, 4, 2, tiles=4)
    if f == "other" or not aligned:
        return Launch(32, 32, min(r, 128), 4, 2, tiles=8)
    if tf32:
        # Where the rank takes several steps, the ordinary matrix units leave registers for 32 columns each.
        several = 64 if f in ("hopper", "blackwell") else 32
        return Launch(64, 32, r if r <= 64 else several, 4, 2, tiles=8)
    if f == "hopper" and r == 128 and step == "low_rank_output":
        return Launch(256, 32, 128, 8, 2, tiles=16, maxnreg=128)
    if f == "ampere" and r == 128 and step == "ratio_backward":
        return Launch(64, 64, 128, 4, 2, tiles=8)
    if f in ("hopper", "blackwell"):
        maxnreg = 128 if r <= 128 else None
        return Launch(128, 64, min(r, 128), 8, 3 if r <= 64 else 2, tiles=8, maxnreg=maxnreg)
    if f == "ampere" and r <= 128:
        return Launch(128, 64, r, 8, 2, tiles=8, maxnreg=128)
    if r > 128 and f != "cdna":
        return Launch(64, 64, 64, 4, 2, tiles=8)
    return Launch(64, 64, min(r, 128), 4, 2, tiles=8)


def current_target(device: torch.device) -> str:
    """Name of the device that a kernel would be compiled for. In Triton's interpreter, which takes any tile,
    the name of a target whose choices have every feature."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "sm_90"
    with on_device(device):
        target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes ``device`` the current one: Triton launches on the current device, whatever its arguments."""
    if device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(device).device(device)


def check(name: str, tensor: Tensor, shape: tuple[int | None, ...], like: Tensor | None = None) -> None:
    """Refuses a tensor of the wrong shape (None: any size), device or dtype by name."""
    expected = tuple("*" if s is None else s for s in shape)
    if tensor.dim() != len(shape) or any(
        s is not None and s != t for s, t in zip(shape, tensor.shape, strict=True)
    ):
        raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {like.device}")
    if like is not None and tensor.dtype != like.dtype:
        raise ValueError(f"{name} is {tensor.dtype}, expected {like.dtype}")


def check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}; the kernels take bfloat16, float16 and float32")


def check_per_token(name: str, tensor: Tensor, num_tokens: int, columns: int) -> None:
    """Refuses anything but (N, columns), or (N,) where there is one column."""
    if tuple(tensor.shape) not in {(num_tokens, columns), (num_tokens,) if columns == 1 else ()}:
        raise ValueError(f"{name} must have shape ({num_tokens}, {columns}), got {tuple(tensor.shape)}")


def rows(tensor: Tensor) -> Tensor:
    """The matrix with unit stride along its last dimension; a copy only if it has another.

    Inside a program offsets are 32-bit relative to the program's first row, so a row stride that could
    overflow them is copied away too (no real activation has one).
    """
    fits = abs(tensor.stride(0)) < 1 << 23
    unit = tensor.stride(1) == 1 or tensor.shape[1] == 1
    return tensor if fits and unit else tensor.contiguous()


def is_aligned(tensor: Tensor) -> bool:
    """May the rows of this wide matrix be read 16 bytes at a time? Triton asks for multiples of 16
    everywhere; without them every number is an access of its own, and large tiles would not fit in registers.
    (Ranks have no such say: pad a stack with zero rows of segment -1 to ``padded_rank`` for full speed.)"""
    return tensor.shape[1] % 16 == 0 and tensor.stride(0) % 16 == 0 and tensor.data_ptr() % 16 == 0


def coordinates(tensor: Tensor) -> Tensor:
    """``rows`` for P and dP, which may be columns of a wider stack: a copy also where one brings back the
    16-byte accesses that the stack's row stride or the first column has cost. It is narrow, and read more
    than once."""
    tensor = rows(tensor)
    if tensor.shape[1] % 16 or is_aligned(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def padded_rank(rank: int) -> int:
    """The next multiple of 16: the rank at which P and dP, too, move 16 bytes at a time. Zero rows in Q and
    zero columns in C change no result."""
    return -(-rank // 16) * 16


def matrix(tensor: Tensor) -> Tensor:
    """The matrix with unit stride along either dimension; a copy only if it has neither."""
    if tensor.stride(1) == 1 or tensor.stride(0) == 1:
        return tensor
    return tensor.contiguous()


def vector(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A small side input as the program reads it: contiguous and of one dtype."""
    return None if tensor is None else tensor.to(dtype).contiguous()
