"""What the command line shows."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = [
    "console",
    "describe_method",
    "inspection_table",
    "method_details",
    "methods_table",
    "print_checks",
    "progress",
    "ratio_table",
    "sweep_table",
]

# Names and paths may hold brackets: markup only where it is asked for.
console = Console(stderr=True, markup=False)


@contextmanager
def progress(steps: int) -> Iterator[tuple[Callable[[str], None], Callable[[Any], None]]]:
    """A bar, as two callbacks: for a stage, and for a step."""
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[loss]}")]
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("starting", total=steps or None, loss="")

        def on_stage(stage: str) -> None:
            progress.update(bar, description=stage)

        def on_step(record: Any) -> None:
            progress.update(bar, completed=record.step, loss=f"loss {record.loss:.4f}")

        yield on_stage, on_step


def ratio_table(history: Any, measure: str) -> None:
    """What the optimisation reached, task by task."""
    table = Table(title=f"mean {measure}, {len(history)} steps")
    for column in ("task", "first step", "last step"):
        table.add_column(column)
    for task, before in history[0].ratios.items():
        table.add_row(task, f"{before:.4f}", f"{history[-1].ratios[task]:.4f}")
    console.print(table)


def print_checks(checks: list[Any]) -> bool:
    """One line a check; whether all passed."""
    for check in checks:
        state = "[green]ok[/]" if check.passed else "[bold red]FAILED[/]"
        relation = ">" if check.name == "difference" else "<="
        console.print(
            f"{state} {check.name}: {check.value:.1e} (must be {relation} {check.limit:.0e}) "
            f"{escape(check.detail)}",
            highlight=False,
            markup=True,
        )
    return all(check.passed for check in checks)


def inspection_table(found: list[Any]) -> None:
    """What the adapters are, and what is wrong with them."""
    table = Table(title="adapters")
    for column in ("name", "base model", "rank", "scale", "targets", "modules", "dtype", "sha256"):
        table.add_column(column)
    for one in found:
        table.add_row(
            one.name,
            str(one.base_model),
            ", ".join(map(str, one.ranks)),
            ", ".join(f"{s:g}" for s in one.scales),
            ", ".join(one.targets),
            str(one.modules),
            one.dtype,
            one.digest[:12],
        )
    _plain().print(table)
    for one in found:
        if one.problems:
            # Imports torch: not before it is needed.
            from .adapters import AdapterError

            told = escape(str(AdapterError(f"adapter {one.name!r}", *one.problems)))
            console.print(f"[bold red]refused:[/] {told}", highlight=False, markup=True)
        for notice in one.notices:
            console.print(f"note: adapter {one.name!r}: {notice}", highlight=False)


def describe_method(method: Any) -> dict[str, Any]:
    """A method and its parameters, as JSON holds it."""
    described = {
        "name": method.name,
        "needs": "base model and unlabeled data" if method.needs_data else "adapters only",
        "output_rank": method.output_rank,
        "one_lora": method.one_model,
        "cost": method.cost,
        "paper": method.paper,
    }
    fields = {}
    for key, field in method.parameters.model_fields.items():
        bounds = [
            f"{sign} {getattr(bound, name)}"
            for bound in field.metadata
            for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
            if hasattr(bound, name)
        ]
        default = field.get_default(call_default_factory=True)
        if hasattr(default, "model_dump"):
            default = default.model_dump(mode="json")
        fields[key] = {"type": _type(field.annotation), "bounds": " and ".join(bounds), "default": default}
    return {**described, "parameters": fields}


def _type(annotation: Any) -> str:
    """A type as a user writes its values."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    for prefix in ("typing.", "nsc_fast.parameters."):
        text = text.replace(prefix, "")
    return re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace("'", "").replace(", ", " | "), text)


def methods_table(found: Sequence[Any]) -> None:
    """Every method in one row."""
    table = Table(title="merging methods; `nsc-fast methods NAME` lists the parameters of one")
    for column in ("method", "needs", "output rank", "cost", "paper"):
        table.add_column(column, overflow="fold")
    for method in found:
        needs = "data" if method.needs_data else "none"
        table.add_row(method.name, needs, method.output_rank, method.cost, method.paper)
    _plain().print(table)


def method_details(method: Any) -> None:
    """One method: its rule, needs and parameters."""
    described = describe_method(method)
    out = _plain()
    rule = sys.modules[method.run.__module__].__doc__
    out.print(f"{inspect.cleandoc(rule)}\n", markup=False)
    for key in ("needs", "output_rank", "cost", "paper"):
        out.print(f"{key.replace('_', ' ')}: {described[key]}", markup=False)
    table = Table(title=f"parameters of {method.name}")
    for column in ("parameter", "type", "bounds", "default"):
        table.add_column(column, overflow="fold")
    for key, field in described["parameters"].items():
        default = "none" if field["default"] is None else str(field["default"])
        table.add_row(key, field["type"], field["bounds"], default)
    out.print(table)
    for kind in method.parameters.__mro__:
        if kind.__module__.startswith("nsc_fast.") and kind.model_fields and kind.__doc__:
            out.print(inspect.cleandoc(kind.__doc__), "", sep="\n", markup=False)


def _plain() -> Console:
    """Standard output, without colours of its own."""
    return Console(highlight=False, markup=False)


def sweep_table(found: Any) -> None:
    """All points, the best marked."""
    better = "higher" if found.higher_is_better else "lower"
    table = Table(title=f"{found.method}: {found.score}, {better} is better")
    first = found.points[0]
    for column in (*first.values, "score", *first.parts, "seconds", ""):
        table.add_column(str(column))
    for number, point in enumerate(found.points):
        mark = "best" if number == found.best else ""
        cells = [str(value) for value in point.values.values()]
        cells += [f"{point.score:.6g}", *(f"{value:.4f}" for value in point.parts.values())]
        table.add_row(*cells, f"{point.seconds:.1f}", mark)
    _plain().print(table)
