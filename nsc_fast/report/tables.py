"""Tables: plain ones, and matrices whose cells are shaded by their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .text import breakable, escape, fixed, known, short

__all__ = ["Group", "Shading", "definitions", "details", "matrix", "plain"]

_STEPS = 10


@dataclass(frozen=True)
class Shading:
    """Numbers to shades: from ``low`` to ``high``, or around 0 where there are negative numbers."""

    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float | None], low: float | None = None, high: float | None = None) -> Shading:
        """Over the range of ``values``; ``low`` and ``high`` fix an end."""
        there = known(values) or [0.0]
        return Shading(min(there) if low is None else low, max(there) if high is None else high)

    def name(self, value: float) -> str:
        """Class of the cell."""
        if self.low < 0:
            reach = max(-self.low, self.high)
            step = round(_STEPS * min(abs(value) / reach, 1.0))
            return f"{'n' if value < 0 else 'h'}{step}"
        span = self.high - self.low
        step = round(_STEPS * min(max((value - self.low) / span, 0.0), 1.0)) if span > 0 else 0
        return f"h{step}"

    def legend(self, decimals: int) -> str:
        """A strip of all shades with the numbers at its ends; nothing where all numbers are equal."""
        if self.low == self.high:
            return ""
        if self.low < 0:
            reach = max(-self.low, self.high)
            ends = -reach, reach
            names = [f"n{i}" for i in range(_STEPS, 0, -1)] + [f"h{i}" for i in range(_STEPS + 1)]
        else:
            ends, names = (self.low, self.high), [f"h{i}" for i in range(_STEPS + 1)]
        strip = "".join(f'<i class="{name}"></i>' for name in names)
        return (
            f'<p class="scale">{fixed(ends[0], decimals)}<span aria-hidden="true">{strip}</span>'
            f"{fixed(ends[1], decimals)}</p>"
        )


@dataclass(frozen=True)
class Group:
    """Rows of a matrix that belong together: ``(label, values)`` each, under a title of their own if any."""

    title: str | None
    rows: Sequence[tuple[str, Sequence[float | None]]]


def matrix(
    columns: Sequence[str],
    groups: Sequence[Group],
    shading: Shading,
    *,
    caption: str,
    corner: str = "",
    decimals: int = 3,
) -> str:
    """Numbers in shaded cells, the first row and column fixed while the rest scrolls.

    Args:
        caption: one line, plain text.
        corner: what rows and columns are, over the labels of the rows.
    """
    tall = len(columns) > 6 or any(len(name) > 14 for name in columns)
    head = "".join(_head(name) for name in columns)
    parts = [
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="matrix{" tall" if tall else ""}{" wide" if len(columns) > 12 else ""}">'
        f"<caption>{escape(caption)}</caption>"
        f'<thead><tr><th scope="col" class="corner">{escape(corner)}</th>{head}</tr></thead>'
    ]
    for group in groups:
        parts.append("<tbody>")
        if group.title is not None:
            parts.append(
                f'<tr class="block"><th scope="rowgroup" colspan="{len(columns) + 1}">'
                f"<span>{escape(group.title)}</span></th></tr>"
            )
        for label, values in group.rows:
            cells = "".join(_cell(value, shading, decimals) for value in values)
            parts.append(f'<tr><th scope="row">{breakable(label)}</th>{cells}</tr>')
        parts.append("</tbody>")
    parts.append(f"</table></div>{shading.legend(decimals)}")
    return "".join(parts)


def _head(name: str) -> str:
    shown = short(name, 24)
    title = f' title="{escape(name)}"' if shown != name else ""
    return f'<th scope="col"{title}><span>{escape(shown)}</span></th>'


def _cell(value: float | None, shading: Shading, decimals: int) -> str:
    text = fixed(value, decimals)
    if not known([value]):
        return f"<td>{text}</td>"
    return f'<td class="{shading.name(value)}">{text}</td>'


def plain(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", html: Sequence[int] = ()
) -> str:
    """Text cells; those of the columns in ``html`` are HTML already."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = []
    for row in rows:
        cells = [cell if i in html else breakable(cell) for i, cell in enumerate(row)]
        rest = "".join(f"<td>{cell}</td>" for cell in cells[1:])
        body.append(f'<tr><th scope="row">{cells[0]}</th>{rest}</tr>')
    label = f' aria-label="{escape(caption)}"' if caption else ' aria-label="table"'
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0" role="region"{label}><table class="plain">{title}'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def definitions(pairs: Mapping[str, str]) -> str:
    """Names and values, escaped."""
    return (
        "<dl>"
        + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs.items())
        + "</dl>"
    )


def details(summary: str, content: str) -> str:
    """Folded; ``content`` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"
