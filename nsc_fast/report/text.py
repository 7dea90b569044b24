"""Numbers and names as a report shows them."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any

from ..coefficients import block_of

__all__ = [
    "breakable",
    "by_block",
    "counted",
    "escape",
    "fixed",
    "known",
    "mean",
    "percent",
    "public",
    "short",
    "shortened",
    "sized",
]

NONE = "–"

# Control characters and halves of surrogate pairs, which XML and UTF-8 do not know.
_FORBIDDEN = re.compile("[^\\t\\n\\r\\x20-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")


def escape(text: object) -> str:
    """For HTML, also inside attributes; characters that XML does not know are replaced."""
    return html.escape(_FORBIDDEN.sub("\ufffd", str(text)))


def breakable(text: object) -> str:
    """For HTML, with room for line breaks inside the paths of modules."""
    return re.sub(r"([./])(?=[^\W\d])", r"\1<wbr/>", escape(text))


def known(values: Iterable[float | None]) -> list[float]:
    """Those that are there and finite."""
    return [v for v in values if v is not None and math.isfinite(v)]


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    there = known(values)
    return sum(there) / len(there) if there else None


def fixed(value: float | None, decimals: int = 3) -> str:
    """With a fixed number of decimals."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:.{decimals}f}"
    # No minus in front of a zero.
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def percent(share: float) -> str:
    """With two decimals; what is less than everything is not rounded up to it."""
    value = 100 * share
    return f"{min(value, 99.99) if value < 100 else value:.2f}\N{NO-BREAK SPACE}%"


def sized(value: float | None) -> str:
    """Of any magnitude, with three significant digits."""
    if value is None or not math.isfinite(value):
        return NONE
    size = abs(value)
    form = ".3g" if size == 0 or 1e-3 <= size < 1e3 else ".0f" if 1e3 <= size < 1e6 else ".2e"
    return f"{value:{form}}".replace("-", "\N{MINUS SIGN}")


def counted(number: int, noun: str) -> str:
    """Number and noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def short(text: str, length: int) -> str:
    """At most ``length`` characters; the middle goes."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"


def public(source: str) -> str:
    """A hub id as it is; of an absolute path only its last part, for files that may be published."""
    paths: tuple[type[PurePath], ...] = (PurePosixPath, PureWindowsPath)
    return next((path(source).name or "/" for path in paths if path(source).is_absolute()), source)


def shortened(content: Any) -> Any:
    """A recipe with all its absolute paths made :func:`public`."""
    if isinstance(content, Mapping):
        return {key: shortened(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [shortened(value) for value in content]
    return public(content) if isinstance(content, str) else content


def by_block(modules: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """Block -> ``(module, its name inside the block)``, in order; modules outside blocks each on their own.

    Blocks are in the order of their numbers, because safetensors and JSON sort names as text.
    """
    groups: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for module in modules:
        block = block_of(module)
        if block is None:
            groups.setdefault((module, -1), []).append((module, module))
        else:
            prefix = f"{block[0]}.{block[1]}".lstrip(".")
            groups.setdefault(block, []).append((module, module[len(prefix) :].lstrip(".") or module))
    return {
        name if number < 0 else f"{name}.{number}".lstrip("."): groups[name, number]
        for name, number in sorted(groups, key=_inside_first(groups))
    }


def _inside_first(groups: Sequence[tuple[str, int]] | Mapping[tuple[str, int], Any]) -> Any:
    """Stacks of blocks in order of appearance, blocks by number, modules outside blocks last."""
    order = {name: i for i, name in enumerate(dict.fromkeys(name for name, _ in groups))}
    return lambda key: (key[1] < 0, order[key[0]], key[1])
