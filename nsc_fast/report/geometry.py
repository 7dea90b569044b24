"""The sections of a report on the updates themselves: the merged one, and the adapters among each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from .record import Pairs, Record, Spectrum
from .sections import figures, paragraph
from .svg import Series, curves, line_legend, sparkline
from .tables import Group, Shading, details, matrix, plain
from .text import by_block, fixed, known, mean, percent, sized

__all__ = ["QUANTITIES", "mean_pairs", "merged_update", "overlaps"]

_FLOOR = 1e-4
"""Below this part of the largest singular value, spectra are cut off."""

_SPARK = 1e-3
"""The same in the cells of a table."""

_PAIRS = 15
"""With more pairs than this, modules are shown with mean and extreme only."""

QUANTITIES = {
    "rows": "Overlap of row spaces",
    "columns": "Overlap of column spaces",
    "cosine": "Cosine of the updates",
}

EXPLAINED = {
    "rows": "Mean squared cosine of the principal angles between the row spaces of A: whether two adapters "
    "read the same inputs. 1: one row space lies in the other.",
    "columns": "The same between the column spaces of the updates: whether two adapters write to the same "
    "outputs.",
    "cosine": "Of the updates as vectors: below 0 two adapters undo each other, above 0 they add up.",
}

# The whole range, so that shades mean the same in every report.
SHADES = {"rows": Shading(0.0, 1.0), "columns": Shading(0.0, 1.0), "cosine": Shading(-1.0, 1.0)}


def merged_update(record: Record) -> str:
    """Spectrum of the merged update and what truncation keeps of it."""
    spectra = record.measurements.spectrum
    if not spectra:
        return paragraph("Not recorded by the version that wrote this folder.")
    output = record.measurements.output
    longest = max(len(s.values) for s in spectra.values())
    if longest == 0:
        return paragraph("The merged update is zero.")
    ranks = list(range(1, longest + 1))
    shown = [ranks[round(i * (longest - 1) / 99)] for i in range(100)] if longest > 100 else ranks
    relative = {i: _spread([_relative(s, i) for s in spectra.values() if len(s.values) >= i]) for i in shown}
    kept = {i: _spread([_kept(s, i) for s in spectra.values()]) for i in shown}
    names = {"s0": "median of the modules", "s1": "largest and smallest"}
    panels = {
        "Singular values, relative to the largest": _band(
            relative, "Spectrum of the merged update", log_y=True
        ),
        "Share of the energy that a truncation keeps": _band(
            kept, "Energy kept by a truncation", y_range=(0, 1.03)
        ),
    }
    told = sorted({1, *(2**k for k in range(20) if 2**k < longest), longest})
    numbers = [
        (str(i), *map(sized, _spread([_relative(s, i) for s in spectra.values() if len(s.values) >= i])))
        + tuple(fixed(v, 4) for v in _spread([_kept(s, i) for s in spectra.values()]))
        for i in told
    ]
    columns = (
        "rank",
        *(f"{q} {n}" for q in ("singular value", "kept energy") for n in ("min", "median", "max")),
    )
    text = "Rank is the number of singular values that float64 can tell from zero."
    if output is not None:
        cut = f"truncated to rank {output.max_rank}" if output.max_rank else "lossless"
        text = f"Written with rank {output.rank} in {output.dtype}, {cut}. {text}"
    return (
        paragraph(text)
        + line_legend(names)
        + figures(panels)
        + details("Numbers", plain(columns, numbers))
        + details(f"All {len(spectra)} modules", _module_table(record))
    )


def _relative(spectrum: Spectrum, i: int) -> float | None:
    return spectrum.values[i - 1] / spectrum.values[0] if spectrum.values[0] > 0 else None


def _kept(spectrum: Spectrum, rank: int) -> float | None:
    total = sum(v * v for v in spectrum.values)
    return sum(v * v for v in spectrum.values[:rank]) / total if total > 0 else None


def _spread(values: Sequence[float | None]) -> tuple[float | None, float | None, float | None]:
    there = sorted(known(values))
    if not there:
        return None, None, None
    middle = (there[(len(there) - 1) // 2] + there[len(there) // 2]) / 2
    return there[0], middle, there[-1]


def _band(
    spread: dict[int, tuple[float | None, float | None, float | None]],
    title: str,
    *,
    log_y: bool = False,
    y_range: tuple[float, float] | None = None,
) -> str:
    def line(position: int) -> list[tuple[float, float | None]]:
        return [(i, _above(own[position], log_y)) for i, own in spread.items()]

    series = [
        Series("median", line(1), "s0"),
        Series("smallest", line(0), "s1"),
        Series("largest", line(2), "s1"),
    ]
    if log_y:
        y_range = math.log10(_FLOOR) - 0.1, 0.1
    return curves(series, title=title, x_label="rank", y_range=y_range, log_y=log_y)


def _above(value: float | None, log_y: bool) -> float | None:
    return None if log_y and value is not None and value < _FLOOR else value


def _module_table(record: Record) -> str:
    spectra = record.measurements.spectrum
    rows = []
    for block, members in by_block(spectra).items():
        for module, _ in members:
            own = spectra[module]
            line = sparkline(own.values, title=f"Spectrum at {block}, log scale", low=_SPARK)
            rows.append(
                (
                    module,
                    f"{own.shape[0]}\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}{own.shape[1]}",
                    sized(math.sqrt(max(own.energy, 0.0))),
                    sized(own.values[0] if own.values else 0.0),
                    str(len(own.values)),
                    *(str(_rank_for(own, share)) for share in (0.9, 0.99)),
                    percent(own.kept),
                    line,
                )
            )
    columns = ("module", "shape", "norm", "largest", "rank", "rank for 90 %", "for 99 %", "kept", "spectrum")
    text = paragraph(
        "Norm and largest singular value of the merged update; directions that hold 90 and 99 % of its "
        "energy; share of the energy in the written adapter; singular values on a log scale down to "
        f"{_SPARK:g} of the largest."
    )
    return text + plain(columns, rows, html=(8,))


def _rank_for(spectrum: Spectrum, share: float) -> int:
    total, seen = sum(v * v for v in spectrum.values), 0.0
    for rank, value in enumerate(spectrum.values, 1):
        seen += value * value
        if seen >= share * total:
            return rank
    return 0


def mean_pairs(record: Record, quantity: str) -> dict[tuple[str, str], float | None]:
    """Pair of tasks -> mean over the modules that both adapt."""
    found: dict[tuple[str, str], list[float | None]] = {}
    for own in record.measurements.interference.values():
        for pair, value in _named(own, quantity):
            found.setdefault(pair, []).append(value)
    return {pair: mean(values) for pair, values in found.items()}


def _named(pairs: Pairs, quantity: str) -> list[tuple[tuple[str, str], float | None]]:
    return list(zip(combinations(pairs.tasks, 2), getattr(pairs, quantity), strict=True))


def overlaps(record: Record) -> str:
    """Interference between the adapters."""
    modules = record.measurements.interference
    if not modules:
        return paragraph("Not recorded by the version that wrote this folder.")
    if len(record.tasks) < 2:
        return paragraph("There is one adapter, and so no pair.")
    if not any(own.rows for own in modules.values()):
        return paragraph("No two adapters share a module.")
    parts = [
        paragraph(
            "From the adapters alone, before any merging: means over the modules that both of a pair adapt."
        )
    ]
    for quantity, title in QUANTITIES.items():
        means = mean_pairs(record, quantity)
        both = {**means, **{(b, a): v for (a, b), v in means.items()}}
        rows = [(a, [both.get((a, b)) for b in record.tasks]) for a in record.tasks]
        parts.append(f"<h3>{title}</h3>{paragraph(EXPLAINED[quantity] + _chance(record, quantity))}")
        parts.append(
            matrix(
                record.tasks,
                [Group(None, rows)],
                SHADES[quantity],
                caption=f"{title}, mean over modules",
                decimals=2 if len(record.tasks) > 12 else 3,
            )
        )
        parts.append(details(f"{title}, module by module", _by_module(record, quantity)))
    return "".join(parts)


def _chance(record: Record, quantity: str) -> str:
    """What random subspaces of these ranks would share."""
    if quantity == "cosine":
        return ""
    side = 1 if quantity == "rows" else 0
    expected = [
        max(pair) / record.measurements.spectrum[module].shape[side]
        for module, own in record.measurements.interference.items()
        if module in record.measurements.spectrum
        for pair in combinations(own.ranks, 2)
    ]
    return f" Random subspaces of these ranks would share {fixed(mean(expected), 3)}." if expected else ""


def _by_module(record: Record, quantity: str) -> str:
    modules = record.measurements.interference
    pairs = list(mean_pairs(record, quantity))
    rows = {module: dict(_named(own, quantity)) for module, own in modules.items() if own.rows}
    if len(pairs) <= _PAIRS:
        groups = [
            Group(block, [(name, [rows[module].get(pair) for pair in pairs]) for module, name in members])
            for block, members in by_block(rows).items()
        ]
        columns = [f"{a} × {b}" for a, b in pairs]
        return matrix(
            columns, groups, SHADES[quantity], caption=f"{QUANTITIES[quantity]} by module", corner="module"
        )
    table = []
    for _, members in by_block(rows).items():
        for module, _ in members:
            there = {pair: v for pair, v in rows[module].items() if known([v])}
            if not there:
                continue
            low, high = min(there, key=there.get), max(there, key=there.get)
            table.append(
                (
                    module,
                    fixed(mean(there.values())),
                    fixed(there[low]),
                    " × ".join(low),
                    fixed(there[high]),
                    " × ".join(high),
                )
            )
    text = paragraph(f"There are {len(pairs)} pairs; all numbers are in nsc_fast/measurements.json.")
    return text + plain(("module", "mean", "lowest", "of", "highest", "of"), table)
