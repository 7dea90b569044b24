"""Memory for large results on the CPU, taken over from earlier results that are gone.

The C library returns large blocks to the system as soon as they are free, and a block that comes anew is
mapped page by page while it is written: for the gradient of 4096 tokens of width 4096 that costs more time
than the arithmetic. What the steps return therefore comes from here, and its memory comes back when nothing
refers to it any more, views and gradients included. Accelerators have allocators that do this for all of
torch.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor

__all__ = ["empty", "release"]

# Smaller blocks are reused by the C library.
_SMALLEST_BYTES = 8 << 20

# As torch aligns its own.
_ALIGNMENT = 64

# What may lie idle.
_IDLE_BYTES = 256 << 20

_idle: dict[int, list[np.ndarray]] = {}


def empty(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """``(rows, columns)`` on the device of ``like``, uninitialised."""
    size = rows * columns * dtype.itemsize
    # Other kinds of tensors (fake ones, of a compiler or a planner) have no memory.
    plain = like.device.type == "cpu" and type(like) in (Tensor, torch.nn.Parameter)
    if not plain or not _SMALLEST_BYTES <= size <= _IDLE_BYTES:
        return like.new_empty(rows, columns, dtype=dtype)
    try:
        memory = _idle[size].pop()
    except (KeyError, IndexError):
        memory = _aligned(size)
    # The storage made of it holds this view until the last tensor on it is gone.
    held = memory.view()
    weakref.finalize(held, _take_back, memory).atexit = False
    # No view of another tensor: autograd would refuse to let a model change it in place.
    result = torch.empty(0, dtype=dtype, device="cpu")
    return result.set_(torch.from_numpy(held).untyped_storage(), 0, (rows, columns))


def release() -> None:
    """Gives the idle memory back to the system."""
    _idle.clear()


def _aligned(size: int) -> np.ndarray:
    memory = np.empty(size + _ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size]


def _take_back(memory: np.ndarray) -> None:
    size = memory.nbytes
    if _idle_bytes() + size > _IDLE_BYTES:
        # Shapes have changed: what has another size may never be asked for again.
        for other in set(_idle) - {size}:
            _idle.pop(other, None)
    if _idle_bytes() + size <= _IDLE_BYTES:
        _idle.setdefault(size, []).append(memory)


def _idle_bytes() -> int:
    return sum(size * len(blocks) for size, blocks in list(_idle.items()))
