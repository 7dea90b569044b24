"""The k-th largest value of a stream that is too long to be held."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = ["kth_largest"]

# Values held for the last, exact step; buckets of a counting pass as a number of bits.
_HELD = 1 << 15
_BITS = 14


def kth_largest(stream: Callable[[], Iterable[Tensor]], k: int) -> float:
    """The ``k``-th largest of non-negative float64 values, exact; 0 if there are fewer.

    The bits of non-negative floats order as integers do. Each pass over the stream counts values by their
    leading bits and leaves one bucket, until what is in the bucket can be held and sorted: one pass for short
    streams, three for most others.

    Args:
        stream: gives the same 1-D float64 tensors each time it is called.
        k: from 1; 0 stands for the threshold of an empty stream.
    """
    low, width = 0, 63
    count, held = _gather(stream, 0, 1 << 63)
    if held is None:
        while True:
            shift = max(width - _BITS, 0)
            counts = _histogram(stream, low, width, shift)
            above = counts.flip(0).cumsum(0).flip(0)  # values in this bucket or a higher one
            if int(above[0]) < k:
                return 0.0
            bucket = int((above >= k).sum()) - 1
            k -= int(above[bucket] - counts[bucket])
            low, width = low + (bucket << shift), shift
            if shift == 0:
                return float(torch.tensor(low, dtype=torch.int64).view(torch.float64))
            if int(counts[bucket]) <= _HELD:
                count, held = _gather(stream, low, low + (1 << width))
                break
    if k > count or k < 1:
        return 0.0
    return float(held.kthvalue(count - k + 1).values)


def _gather(stream: Callable[[], Iterable[Tensor]], low: int, high: int) -> tuple[int, Tensor | None]:
    """The values whose bits lie in ``[low, high)``; None as soon as they are too many."""
    parts, count = [], 0
    for values in stream():
        bits = values.view(torch.int64)
        # 2^63 is no int64: the upper end of everything.
        inside = bits >= low if high > (1 << 63) - 1 else (bits >= low) & (bits < high)
        part = values[inside]
        count += part.numel()
        if count > _HELD:
            return count, None
        parts.append(part)
    return count, torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def _histogram(stream: Callable[[], Iterable[Tensor]], low: int, width: int, shift: int) -> Tensor:
    size = 1 << (width - shift)
    counts = torch.zeros(size, dtype=torch.int64)
    for values in stream():
        index = (values.view(torch.int64) - low) >> shift
        # The arithmetic shift leaves values below ``low`` negative.
        counts += torch.bincount(index[(index >= 0) & (index < size)], minlength=size)
    return counts
