"""A random sample of rows in one pass, in an order that the seed alone fixes."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["Drawn", "draw"]

T = TypeVar("T")


@dataclass(frozen=True)
class Drawn(Generic[T]):
    """What was drawn.

    Attributes:
        items: in random order; a smaller sample of the same rows is a beginning of a larger one.
        seen: rows that were passed.
        empty: numbers of the rows that were looked at and held nothing.
    """

    items: list[T]
    seen: int
    empty: list[Any]


def draw(
    records: Iterable[tuple[Any, Any]], accept: Callable[[Any, Any], T | None], count: int, seed: int
) -> Drawn[T]:
    """``count`` of the accepted records, drawn without replacement.

    Every record gets a random key in the order of the file, and the ``count`` smallest keys win (bottom-k
    sampling). No more than ``count`` items are held at a time, and only records whose key is small enough
    when they come by are opened: about ``count (1 + ln(n / count))`` of n. There are no workers that could
    change the order.

    Args:
        records: (number, raw record).
        accept: opens a record; None for one that holds nothing, which is then as if it were not there.
        count: how many.
        seed: of the keys.
    """
    generator = random.Random(seed)
    best: list[tuple[float, int, T]] = []
    empty = []
    seen = 0
    for number, raw in records:
        seen += 1
        key = -generator.random()
        if len(best) == count and key <= best[0][0]:
            continue
        item = accept(number, raw)
        if item is None:
            empty.append(number)
        elif len(best) < count:
            heapq.heappush(best, (key, seen, item))
        else:
            heapq.heapreplace(best, (key, seen, item))
    return Drawn([item for _, _, item in sorted(best, key=lambda one: -one[0])], seen, empty)
