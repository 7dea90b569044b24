"""Which adapted modules enter the loss: chosen by block range and by name.

The paper takes all adapted modules of the last quarter of the blocks (its LLaVA runs: only ``v_proj``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from .coefficients import block_of

__all__ = ["matches", "select_targets"]

_LAST = re.compile(r"^last_(\d+)$")
_RANGE = re.compile(r"^(\d+)(?:-(\d+))?$")


def matches(module: str, names: str | Sequence[str]) -> bool:
    """Whether the module path ends in one of ``names``, compared at dots: "v_proj", "self.value"."""
    names = [names] if isinstance(names, str) else names
    return any(module == name or module.endswith("." + name) for name in names)


def select_targets(
    modules: Iterable[str],
    *,
    layers: str = "last_quarter",
    names: str | Sequence[str] | None = None,
    all_modules: Iterable[str] | None = None,
) -> tuple[str, ...]:
    """Target modules J among the adapted ``modules``, in their order.

    Args:
        modules: adapted module paths, in the order of the model.
        layers: "last_quarter", "last_N", "all", or block numbers such as "24-31" or "5". The blocks
            counted are those of the stack ("model.layers") that comes last among the adapted modules.
        names: ends of module paths to keep ("v_proj", or a list). None: all.
        all_modules: module paths of the whole model, which tell how many blocks the stack has. Default: the
            adapted ones.

    Raises:
        ValueError: a pattern that matches nothing, or an unreadable range; names what there is instead.
    """
    modules = list(modules)
    chosen = modules if names is None else [m for m in modules if matches(m, names)]
    if not chosen:
        ends = sorted({m.rpartition(".")[2] for m in modules})
        raise ValueError(f"no adapted module ends in {names!r}; the adapters adapt {', '.join(ends)}")
    if layers == "all":
        return tuple(chosen)
    stacks = [block[0] for m in chosen if (block := block_of(m)) is not None]
    if not stacks:
        raise ValueError(
            f"layers={layers!r}: the adapted modules stand in no numbered blocks; use layers='all'"
        )
    stack = stacks[-1]
    numbers = {
        block[1]
        for m in (modules if all_modules is None else all_modules)
        if (block := block_of(m)) is not None and block[0] == stack
    }
    first, last = _range(layers, max(numbers) + 1)
    kept = [m for m in chosen if (b := block_of(m)) is not None and b[0] == stack and first <= b[1] <= last]
    if not kept:
        raise ValueError(
            f"layers={layers!r} selects blocks {first} to {last} of {stack!r}, where no chosen module is "
            f"adapted; {stack!r} has blocks 0 to {max(numbers)}"
        )
    return tuple(kept)


def _range(layers: str, count: int) -> tuple[int, int]:
    if layers == "last_quarter":
        return count - max(-(-count // 4), 1), count - 1
    if found := _LAST.match(layers):
        return max(count - int(found[1]), 0), count - 1
    if found := _RANGE.match(layers):
        return int(found[1]), int(found[2] or found[1])
    raise ValueError(f"layers={layers!r}: use 'last_quarter', 'last_N', 'all', or a range such as '24-31'")
