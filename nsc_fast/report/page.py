"""The report as one HTML page: no script, no external resource."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files

import yaml

from . import geometry, sections
from .record import Record
from .tables import definitions
from .text import counted, escape, percent, public, shortened

__all__ = ["page"]

_SECTIONS: tuple[tuple[str, str, Callable[[Record], str]], ...] = (
    ("warnings", "Warnings", sections.warnings),
    ("adapters", "Adapters", sections.sources),
    ("coefficients", "Coefficients", sections.coefficients),
    ("optimisation", "Optimisation", sections.optimisation),
    ("ratios", "Null-space ratios", sections.ratios),
    ("update", "Merged update", geometry.merged_update),
    ("interference", "Interference between the adapters", geometry.overlaps),
    ("recipe", "Recipe", lambda record: _recipe(record)),
    ("versions", "Versions", lambda record: definitions(record.environment)),
)


def page(record: Record) -> str:
    """The whole page."""
    title = f"Merge of {counted(len(record.tasks), 'LoRA adapter')}"
    links = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in _SECTIONS)
    body = "".join(
        f'<section id="{key}"><h2>{escape(name)}</h2>{content(record)}</section>'
        for key, name, content in _SECTIONS
    )
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1>{definitions(_summary(record))}</header>"
        f'<nav aria-label="Sections">{links}</nav><main>{body}</main></body></html>\n'
    )


def _summary(record: Record) -> dict[str, str]:
    summary, measured = record.summary, record.measurements
    told = {
        "method": summary.method,
        "base model": "not recorded" if summary.base_model is None else public(summary.base_model),
        "modules": str(summary.modules),
    }
    if record.history:
        told["steps"] = f"{len(record.history)}{' (interrupted)' if summary.interrupted else ''}"
    if measured.output is not None:
        told["rank"] = str(measured.output.rank)
        told["dtype"] = measured.output.dtype
    if record.full is not None:
        told["output"] = f"full model; its rounding takes {percent(record.full.total_rounding)} of the update"
    total = sum(s.energy for s in measured.spectrum.values())
    if total > 0:
        kept = sum(s.kept * s.energy for s in measured.spectrum.values()) / total
        told["energy kept"] = percent(kept)
    return told


def _recipe(record: Record) -> str:
    if record.recipe:
        content = shortened(record.recipe)
    else:
        content = {"merge_method": record.summary.method, "parameters": shortened(record.summary.parameters)}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    note = "Absolute paths are shortened to their last part; nsc_fast/config.resolved.yaml has them in full."
    return f'<pre tabindex="0">{escape(text)}</pre>{sections.paragraph(note) if record.recipe else ""}'
