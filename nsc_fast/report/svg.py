"""Small plots as SVG text: curves, dots in rows, and a curve in a table cell.

Series are told apart by dash patterns and marker shapes, and named in words; colours come from the style
sheet. Every plot is narrow enough for a telephone and has a title for screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .text import escape, known, short, sized

__all__ = ["MARKS", "Series", "curves", "dots", "legend", "line_legend", "sparkline", "ticks"]

WIDTH = 360

_LABEL = 25


@dataclass(frozen=True)
class Series:
    """A curve; ``style`` is a class of the style sheet: "s0", "s1" or "s2"."""

    name: str
    points: Sequence[tuple[float, float | None]]
    style: str = "s0"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside the range, about ``count``."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    step = 10 ** math.floor(math.log10(span / count))
    step = next(step * m for m in (1, 2, 5, 10) if span / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _range(values: Sequence[float | None], given: tuple[float, float] | None) -> tuple[float, float]:
    if given is not None:
        return given
    there = known(values) or [0.0, 1.0]
    low, high = min(there), max(there)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def curves(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_range: tuple[float, float] | None = None,
    log_y: bool = False,
    height: int = 190,
) -> str:
    """Curves over a common axis; gaps where a value is missing.

    Args:
        y_range: of the axis; default: of the values.
        log_y: values at or below zero are left out.
    """
    lifted = [Series(s.name, [(x, _lift(y, log_y)) for x, y in s.points], s.style) for s in series]
    xs = [x for s in lifted for x, _ in s.points] or [0.0, 1.0]
    left, right = min(xs), max(xs)
    if left == right:
        left, right = left - 0.5, right + 0.5
    low, high = _range([y for s in lifted for _, y in s.points], y_range)
    x0, x1, y0, y1 = 46, WIDTH - 10, height - 32, 8

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            x0 + (x - left) / (right - left) * (x1 - x0),
            y0 + (y - low) / (high - low) * (y1 - y0),
        )

    parts = [_open(height, title)]
    marks = _decades(low, high) if log_y else ticks(low, high)
    for tick in marks:
        _, y = place(left, tick)
        label = _power(tick) if log_y else sized(tick)
        parts.append(f'<path class="grid" d="M{x0} {y:.1f}H{x1}"/>')
        parts.append(f'<text class="end" x="{x0 - 5}" y="{y + 4:.1f}">{label}</text>')
    whole = [t for t in ticks(left, right, 5) if t == int(t)]
    for tick in whole:
        x, _ = place(tick, low)
        parts.append(f'<text class="mid" x="{x:.1f}" y="{y0 + 15}">{sized(tick)}</text>')
    parts.append(f'<path class="axis" d="M{x0} {y0}H{x1}"/>')
    parts.append(f'<text class="mid" x="{(x0 + x1) / 2}" y="{height - 3}">{escape(x_label)}</text>')
    for s in lifted:
        parts.append(_curve([(x, y) for x, y in s.points], place, s.style))
    return "".join(parts) + "</svg>"


def _lift(y: float | None, log_y: bool) -> float | None:
    if not log_y:
        return y
    return math.log10(y) if y is not None and y > 0 and math.isfinite(y) else None


def _decades(low: float, high: float) -> list[float]:
    every = max(1, math.ceil((high - low) / 5))
    return [float(d) for d in range(math.ceil(low), math.floor(high) + 1) if d % every == 0]


def _power(exponent: float) -> str:
    if -3 <= exponent <= 3:
        return f"{10**exponent:g}"
    return f'10<tspan dy="-4" class="small">{exponent:.0f}</tspan>'


def _curve(
    points: Sequence[tuple[float, float | None]],
    place: Callable[[float, float], tuple[float, float]],
    style: str,
) -> str:
    path, drawn, pen_down = [], [], False
    for x, y in points:
        if not known([y]):
            pen_down = False
            continue
        px, py = place(x, y)
        path.append(f"{'L' if pen_down else 'M'}{px:.1f} {py:.1f}")
        drawn.append((px, py))
        pen_down = True
    if len(drawn) == 1:
        return f'<circle class="dot" cx="{drawn[0][0]:.1f}" cy="{drawn[0][1]:.1f}" r="2.5"/>'
    return f'<path class="{style}" d="{"".join(path)}"/>' if path else ""


# Name -> SVG of a marker around (0, 0); shapes differ, so that no colour is needed.
MARKS: Mapping[str, str] = {
    "random": '<path class="mark" d="M0-5V5"/>',
    "base": '<path class="mark" d="M0-4.5L4.5 0 0 4.5-4.5 0Z"/>',
    "alone": '<circle class="mark" r="4"/>',
    "initial": '<path class="mark" d="M-3.5-3.5L3.5 3.5M-3.5 3.5L3.5-3.5"/>',
    "final": '<circle class="mark full" r="3.5"/>',
}


def dots(
    rows: Sequence[tuple[str, Mapping[str, float | None]]],
    *,
    title: str,
    x_range: tuple[float, float],
    row_height: int = 17,
) -> str:
    """One row a label, with a marker of every kind in :data:`MARKS` at its value."""
    labels = max((len(short(label, _LABEL)) for label, _ in rows), default=0)
    x0, x1 = max(34, 8 + round(6.1 * labels)), WIDTH - 14
    y0 = 8
    height = y0 + row_height * len(rows) + 22
    low, high = x_range
    if low == high:
        low, high = low - 0.05, high + 0.05

    def place(value: float) -> float:
        return x0 + (value - low) / (high - low) * (x1 - x0)

    bottom = y0 + row_height * len(rows)
    parts = [_open(height, title)]
    for tick in ticks(low, high, 5 if x0 < 110 else 4):
        x = place(tick)
        parts.append(f'<path class="grid" d="M{x:.1f} {y0}V{bottom}"/>')
        parts.append(f'<text class="mid" x="{x:.1f}" y="{bottom + 15}">{sized(tick)}</text>')
    for number, (label, values) in enumerate(rows):
        y = y0 + row_height * (number + 0.5)
        parts.append(f'<path class="grid" d="M{x0} {y:.1f}H{x1}"/>')
        parts.append(
            f'<text class="end" x="{x0 - 6}" y="{y + 3.5:.1f}"><title>{escape(label)}</title>'
            f"{escape(short(label, _LABEL))}</text>"
        )
        for kind, mark in MARKS.items():
            if known([values.get(kind)]):
                parts.append(f'<g transform="translate({place(values[kind]):.1f} {y:.1f})">{mark}</g>')
    return "".join(parts) + "</svg>"


def legend(names: Mapping[str, str]) -> str:
    """What the markers are: kind -> words."""
    items = "".join(
        f'<li><svg viewBox="-7 -7 14 14" width="14" height="14" aria-hidden="true">{MARKS[kind]}</svg>'
        f"{escape(words)}</li>"
        for kind, words in names.items()
    )
    return f'<ul class="legend">{items}</ul>'


def line_legend(names: Mapping[str, str]) -> str:
    """What the curves are: style -> words."""
    items = "".join(
        f'<li><svg viewBox="0 0 28 10" width="28" height="10" aria-hidden="true">'
        f'<path class="{style}" d="M1 5H27"/></svg>{escape(words)}</li>'
        for style, words in names.items()
    )
    return f'<ul class="legend">{items}</ul>'


def sparkline(values: Sequence[float], *, title: str, low: float, width: int = 110, height: int = 22) -> str:
    """A falling sequence on a log scale from its first value down to ``low`` times it, at most 40 points."""
    if not values or values[0] <= 0:
        return ""
    positions = sorted({round(i * (len(values) - 1) / 39) for i in range(40)}) if len(values) > 40 else None
    chosen = range(len(values)) if positions is None else positions
    points = []
    for i in chosen:
        level = math.log10(max(values[i] / values[0], low)) / math.log10(low)
        points.append(f"{2 + i / max(len(values) - 1, 1) * (width - 4):.0f} {2 + level * (height - 4):.1f}")
    return (
        f'<svg class="spark" role="img" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<title>{escape(title)}</title><path class="s0" d="M{"L".join(points)}"/></svg>'
    )


def _open(height: int, title: str) -> str:
    return f'<svg class="plot" role="img" viewBox="0 0 {WIDTH} {height}"><title>{escape(title)}</title>'
