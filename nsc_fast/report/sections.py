"""The sections of a report: what the merge chose, and how it got there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .record import Record
from .svg import Series, curves, dots, legend
from .tables import Group, Shading, details, matrix, plain
from .text import by_block, counted, escape, fixed, known, mean, public, sized

__all__ = ["coefficients", "figures", "optimisation", "paragraph", "ratios", "sources", "warnings"]

_POINTS = 240
_ROWS = 40

KINDS = {
    "random": "random subspace of the same rank (expected)",
    "base": "base model",
    "alone": "its adapter alone",
    "initial": "initial merge",
    "final": "final merge",
}


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{escape(text)}</p>"


def figures(panels: Mapping[str, str]) -> str:
    """Plots beside each other: caption -> SVG."""
    return (
        '<div class="panels">'
        + "".join(f"<figure><figcaption>{escape(k)}</figcaption>{v}</figure>" for k, v in panels.items())
        + "</div>"
    )


def warnings(record: Record) -> str:
    """The notices of the merge."""
    notices = list(record.summary.notices)
    if record.summary.interrupted:
        notices.insert(0, f"The optimisation was interrupted after {len(record.history)} steps.")
    if not notices:
        return paragraph("None.")
    return '<ul class="warnings">' + "".join(f"<li>{escape(n)}</li>" for n in notices) + "</ul>"


def sources(record: Record) -> str:
    """The adapters, with the digests of their weights."""
    rows = []
    for task in record.tasks:
        own = record.summary.sources.get(task)
        rows.append((task, public(own.source), own.digest) if own else (task, "not recorded", "not recorded"))
    return plain(("adapter", "source", "sha256 of its weights"), rows)


def coefficients(record: Record) -> str:
    """Heat map, modules by tasks."""
    table = record.coefficient_table()
    if not table:
        if record.coefficients:
            return paragraph("One per singular direction; see nsc_fast/coefficients.json.")
        return paragraph(
            f"Method {record.summary.method!r} gives no coefficients: its result is no weighted sum of "
            "the updates."
        )
    rows = {m: [own.get(task) for task in record.tasks] for m, own in table.items()}
    values = [v for row in rows.values() for v in row]
    note = (
        " Means over the singular directions, each of which has its own."
        if any(len(c.values) != len(c.tasks) for c in record.coefficients.values())
        else ""
    )
    text = paragraph(
        "Factor of each adapter's update in the merge. Modules with the same coefficients share a row; "
        f"– where a task does not adapt the module.{note}"
    )
    return text + matrix(
        record.tasks,
        _united_groups(rows),
        Shading.of(values),
        caption="Merge coefficients",
        corner="module",
        decimals=2 if len(record.tasks) > 12 else 3,
    )


def _united_groups(rows: Mapping[str, Sequence[float | None]]) -> list[Group]:
    whole = _united(list(rows.values()))
    if whole is not None and len(rows) > 1:
        return [Group(None, [(f"all {len(rows)} modules", whole)])]
    groups: list[Group] = []
    for block, members in by_block(rows).items():
        own = _united([rows[module] for module, _ in members])
        if own is None:
            groups.append(Group(block, [(name, rows[module]) for module, name in members]))
            continue
        several = f" ({len(members)} modules)" if len(members) > 1 else ""
        line = f"{block}{several}", own
        if groups and groups[-1].title is None:
            groups[-1] = Group(None, [*groups[-1].rows, line])
        else:
            groups.append(Group(None, [line]))
    return groups


def _united(rows: Sequence[Sequence[float | None]]) -> list[float | None] | None:
    """One row for all, if no two of them differ where both have a value."""
    out: list[float | None] = []
    for column in zip(*rows, strict=True):
        different = {v for v in column if v is not None}
        if len(different) > 1:
            return None
        out.append(different.pop() if different else None)
    return out


def optimisation(record: Record) -> str:
    """Curves of the loss and of every task's part of it."""
    history = record.history
    if not history:
        return paragraph(f"Method {record.summary.method!r} recorded no optimisation steps.")
    size = -(-len(history) // _POINTS)
    parts = [history[i : i + size] for i in range(0, len(history), size)]

    def curve(values: Sequence[Sequence[float | None]]) -> list[tuple[float, float | None]]:
        steps = [sum(r.step for r in part) / len(part) for part in parts]
        return [(x, mean(v)) for x, v in zip(steps, values, strict=True)]

    measure = record.summary.measure
    loss = curve([[r.loss for r in part] for part in parts])
    tasks = list(dict.fromkeys(task for r in history for task in r.ratios))
    own = {task: curve([[r.ratios.get(task) for r in part] for part in parts]) for task in tasks}
    there = known([y for points in own.values() for _, y in points])
    low, high = (min(there), max(there)) if there else (0.0, 1.0)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    averaged = f" Each point is the mean of {size} steps." if size > 1 else ""
    first, last = history[0], history[-1]
    panels = {
        f"Loss, {fixed(first.loss, 4)} to {fixed(last.loss, 4)}": curves(
            [Series("loss", loss)], title="Loss at every step", x_label="step"
        )
    }
    many = {
        f"{task}, {fixed(first.ratios.get(task), 4)} to {fixed(last.ratios.get(task), 4)}": curves(
            [Series(task, points)],
            title=f"Mean {measure} of {task} at every step",
            x_label="step",
            y_range=(low - margin, high + margin),
            height=150,
        )
        for task, points in own.items()
    }
    rows = [
        (str(r.step), sized(r.learning_rate), fixed(r.loss, 4), *(fixed(r.ratios.get(t), 4) for t in tasks))
        for r in history[:: -(-len(history) // 50)]
    ]
    return (
        paragraph(
            f"{counted(len(history), 'step')}; each sees one batch of every task, so curves vary with the "
            f"batch.{averaged}"
        )
        + figures(panels)
        + f"<h3>Mean {escape(measure)} of every task</h3>"
        + figures(many)
        + details("Numbers", plain(("step", "learning rate", "loss", *tasks), rows))
    )


def ratios(record: Record) -> str:
    """Null-space ratios: random, base, alone, initial and final; by layer; who sees whose activations."""
    signal = record.measurements.signal
    if signal is None:
        if record.history or record.summary.interrupted:
            return paragraph("Not measured beyond the curves of the optimisation.")
        return paragraph(f"Not measured: method {record.summary.method!r} ran without data.")
    return _overview(record) + _by_layer(record) + _sees(record)


def _overview(record: Record) -> str:
    signal = record.measurements.signal
    kinds = {kind: own for kind in KINDS if (own := getattr(signal, kind))}
    columns = ["task", *kinds]
    alone, final = signal.alone or {}, signal.final or {}
    both = bool(alone and final)
    columns += ["final \N{MINUS SIGN} alone"] * both
    columns += ["strength"] * bool(signal.strength) + ["tokens"] * bool(signal.tokens)
    if len(columns) == 1:
        return ""
    rows = []
    for task in record.tasks:
        row = [task, *(fixed(own.get(task), 4) for own in kinds.values())]
        if both:
            pair = known([alone.get(task), final.get(task)])
            row.append(fixed(pair[1] - pair[0], 4) if len(pair) == 2 else fixed(None))
        if signal.strength:
            row.append(fixed(signal.strength.get(task), 2))
        if signal.tokens:
            count = signal.tokens.get(task)
            row.append("–" if count is None else str(count))
        rows.append(row)
    text = (
        "The null-space ratio is the share of an activation's norm that an adapter's down projection does "
        "not see, here the mean over the target modules on the task's own unlabeled data. The lower, the "
        "more of the activations its adapter acts on."
    )
    if signal.strength:
        weak = [t for t in record.tasks if known([signal.strength.get(t)]) and signal.strength[t] <= 1]
        text += (
            " Strength: the energy that the adapter alone sees, relative to a random subspace of its rank; "
            "1 is no signal."
        )
        if weak:
            text += f" Without signal: {', '.join(weak)}."
    return paragraph(text) + plain(columns, rows)


def _by_layer(record: Record) -> str:
    modules = record.measurements.signal.modules
    if not modules:
        return ""
    shown = {kind: words for kind, words in KINDS.items() if _any_of(modules, kind)}
    by_task = {t: {m: own[t] for m, own in modules.items() if t in own} for t in record.tasks}
    rows = {task: _layer_rows(own) for task, own in by_task.items() if own}
    values = known([v for own in rows.values() for _, kinds in own for v in kinds.values()])
    if not values:
        return ""
    margin = 0.03 * (max(values) - min(values))
    reach = min(values) - margin, max(values) + margin
    panels = {
        task: dots(own, title=f"Null-space ratio of {task} by layer", x_range=reach)
        for task, own in rows.items()
    }
    table = [
        (task, label, *(fixed(kinds.get(kind), 4) for kind in shown))
        for task, own in rows.items()
        for label, kinds in own
    ]
    return (
        "<h3>By layer</h3>"
        + paragraph(
            "Of every task at the modules that entered its ratio; the mean over a block where these are many."
        )
        + legend(shown)
        + figures(panels)
        + details("Numbers", plain(("task", "layer", *shown), table))
    )


def _any_of(modules: Mapping[str, Mapping[str, Mapping[str, float | None]]], kind: str) -> bool:
    return any(known([k.get(kind)]) for own in modules.values() for k in own.values())


def _layer_rows(
    modules: Mapping[str, Mapping[str, float | None]],
) -> list[tuple[str, dict[str, float | None]]]:
    """One row a module, or one a block where there are many modules."""
    blocks = by_block(modules)
    if len(modules) <= _ROWS:
        numbers = {block: block.rpartition(".")[2] for block in blocks}
        return [
            (name if name == module else f"{numbers[block]} {name}", dict(modules[module]))
            for block, members in blocks.items()
            for module, name in members
        ]
    return [
        (block, {kind: mean([modules[m].get(kind) for m, _ in members]) for kind in KINDS})
        for block, members in blocks.items()
    ]


def _sees(record: Record) -> str:
    sees = record.measurements.signal.sees
    if not sees:
        return ""
    rows = [(j, [sees[j].get(k) for k in record.tasks]) for j in record.tasks if j in sees]
    values = [v for _, row in rows for v in row]
    return (
        "<h3>Who sees whose activations</h3>"
        + paragraph(
            "Share of the energy of the row's activations inside the row space of the column's adapter, with "
            "the row's adapter alone in the model. What an adapter does not see it does not change."
        )
        + matrix(
            record.tasks,
            [Group(None, rows)],
            Shading.of(values, low=0.0),
            caption="Share of the activations of a task (row) that an adapter (column) sees",
            corner="activations of",
            decimals=2 if len(record.tasks) > 12 else 3,
        )
    )
