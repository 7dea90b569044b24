"""The model card: README.md of the output folder."""

from __future__ import annotations

import re

import yaml

from .geometry import QUANTITIES, mean_pairs
from .record import Record
from .sections import KINDS
from .text import counted, fixed, known, mean, percent, public, shortened

__all__ = ["BEGIN", "END", "card", "renewed"]

BEGIN = "<!-- nsc_fast report: written again by `nsc-fast report`; text outside is left alone -->"
END = "<!-- end of nsc_fast report -->"


def card(record: Record) -> str:
    """The whole card; its front matter is what the hub reads."""
    summary = record.summary
    head = {
        "library_name": "peft" if record.full is None else "transformers",
        "base_model": None if summary.base_model is None else public(summary.base_model),
        "tags": [*(["lora"] if record.full is None else []), "merge", "nsc_fast", summary.method],
    }
    what = "adapter" if record.full is None else "model"
    adapters = counted(len(summary.tasks), "LoRA adapter")
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# Merge of {adapters}\n\n"
        f"{BEGIN}\n{_body(record)}\n{END}\n\n"
        f"The licence of this {what} follows from those of its sources.\n"
    )


def renewed(text: str, record: Record) -> str | None:
    """A card with the part between the marks made again; None where there are no marks."""
    # The last, since a value of the recipe may look like the mark.
    start, end = text.find(BEGIN), text.rfind(END)
    if start < 0 or end < start:
        return None
    return f"{text[:start]}{BEGIN}\n{_body(record)}\n{text[end:]}"


def _body(record: Record) -> str:
    parts = [
        _opening(record),
        _sources(record),
        _coefficients(record),
        _ratios(record),
        _update(record),
        _interference(record),
        _fenced("Recipe", _recipe(record)),
        _fenced("Versions", record.environment),
        "Plots and all numbers by module: `nsc_fast/report.html`.",
    ]
    return "\n\n".join(part for part in parts if part)


def _opening(record: Record) -> str:
    summary = record.summary
    version = record.environment.get("nsc_fast")
    made = f" with nsc_fast {version}" if version else ""
    lines = [
        f"One LoRA made from {counted(len(summary.tasks), 'adapter')} of one base model "
        f"by `{summary.method}`{made}."
    ]
    if record.full is not None:
        lines[0] = (
            "The base model with one LoRA in its weights, made from "
            f"{counted(len(summary.tasks), 'adapter')} by `{summary.method}`{made}. The LoRA by itself is in "
            f"`nsc_fast/lora`; by the rounding of the weights the update in them is off by "
            f"{percent(record.full.total_rounding)}."
        )
    if summary.interrupted:
        lines.append(f"> The optimisation was interrupted after {len(record.history)} steps.")
    lines += [f"> {_text(notice)}" for notice in summary.notices]
    return "\n\n".join(lines)


def _sources(record: Record) -> str:
    rows = [
        (_text(task), _text(public(own.source)), f"`{own.digest[:16]}`")
        for task in record.tasks
        if (own := record.summary.sources.get(task))
    ]
    return "## Sources\n\n" + (_table(("adapter", "source", "sha256"), rows) if rows else "Not recorded.")


def _coefficients(record: Record) -> str:
    table = record.coefficient_table()
    if not table:
        return ""
    rows = []
    for task in record.tasks:
        values = known([own.get(task) for own in table.values()])
        if values:
            rows.append((_text(task), *(fixed(v, 4) for v in (mean(values), min(values), max(values)))))
    return f"## Coefficients\n\nOver {len(table)} modules.\n\n" + _table(
        ("adapter", "mean", "smallest", "largest"), rows
    )


def _ratios(record: Record) -> str:
    signal, measure = record.measurements.signal, record.summary.measure
    parts = []
    if record.history:
        first, last = record.history[0].ratios, record.history[-1].ratios
        rows = [(_text(t), fixed(v, 4), fixed(last.get(t), 4)) for t, v in first.items()]
        parts.append(
            f"## Mean {measure}\n\nOf every task, at the first and the last of {len(record.history)} steps, "
            f"each on one batch.\n\n{_table(('task', 'first step', 'last step'), rows)}"
        )
    kinds = {kind: own for kind in KINDS if signal is not None and (own := getattr(signal, kind))}
    if kinds:
        columns = ["task", *kinds, *(["strength"] if signal.strength else [])]
        rows = [
            (
                _text(task),
                *(fixed(own.get(task), 4) for own in kinds.values()),
                *([fixed(signal.strength.get(task), 2)] if signal.strength else []),
            )
            for task in record.tasks
        ]
        parts.append(
            "## Signal\n\nMean null-space ratio of every task's own unlabeled data: "
            + "; ".join(f"{kind}, {KINDS[kind]}" for kind in kinds)
            + (". Strength 1 is no signal" if signal.strength else "")
            + f".\n\n{_table(columns, rows)}"
        )
    return "\n\n".join(parts)


def _update(record: Record) -> str:
    output, spectra = record.measurements.output, record.measurements.spectrum
    if output is None or not spectra:
        return ""
    total = sum(s.energy for s in spectra.values())
    kept = sum(s.kept * s.energy for s in spectra.values()) / total if total > 0 else 1.0
    worst = min(spectra, key=lambda m: spectra[m].kept)
    text = f"## Merged update\n\nRank {output.rank} in {output.dtype}, {len(spectra)} modules"
    if output.max_rank is None:
        return f"{text}, lossless."
    return (
        f"{text}; truncation to rank {output.max_rank} kept {percent(kept)} of the energy, least at "
        f"`{worst}` ({percent(spectra[worst].kept)})."
    )


def _interference(record: Record) -> str:
    rows = []
    for quantity, title in QUANTITIES.items():
        there = {pair: v for pair, v in mean_pairs(record, quantity).items() if known([v])}
        if there:
            most = max(there, key=lambda pair: abs(there[pair]))
            names = f"{fixed(there[most], 4)} ({_text(most[0])}, {_text(most[1])})"
            rows.append((title, fixed(mean(there.values()), 4), names))
    if not rows:
        return ""
    return "## Interference\n\nOver all pairs of adapters, means over modules.\n\n" + _table(
        ("", "mean", "of the largest size"), rows
    )


def _recipe(record: Record) -> object:
    return shortened(record.recipe or {"parameters": record.summary.parameters})


def _fenced(title: str, content: object) -> str:
    if not content:
        return ""
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    # Longer than any run of backticks inside.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"## {title}\n\n{fence}yaml\n{text}{fence}"


def _table(columns: tuple[str, ...] | list[str], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: str) -> str:
    """On one line, with what Markdown would take for markup escaped."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", " ".join(text.split()))
