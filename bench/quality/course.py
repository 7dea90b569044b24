"""Quality against the steps and the seconds that an optimisation is given.

    python -m bench.quality.course --suite text --out FOLDER [--methods NAME ...] [--steps N ...]
                                   [--batch ROWS] [--rate RATE]

Appends to ``FOLDER/course-SUITE.jsonl`` what ``bench.quality.run`` writes, and every row of a merge has two
fields more: ``course``, the method, and ``budget``, the steps it was allowed. Draws an SVG of the same name
(matplotlib) from all that the file holds, so that seeds and budgets can be added later.

With another ``--batch`` or ``--rate`` than the default the curve is one of its own, named after them. Every
budget is a merge of its own. ``anchored``, and ``auto`` with it, let the learning rate fall to zero
over all of their steps: what they have in the middle of a longer run is not what a shorter run gives. A
budget of 0 is task arithmetic with the coefficient that the optimisation begins at; ``auto`` then chooses
among its other candidates.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nsc_fast import methods
from nsc_fast.errors import MergeError

from . import suites
from .base import Base
from .command import cache_folder, ended, parsed
from .phenomenon import panels
from .run import record
from .table import Results, read, summarise
from .workshop import UNLABELED_BATCH, Configuration, Workshop, defaults

__all__ = ["BUDGETS", "METHODS", "budgets", "draw", "main"]

METHODS = ("auto", "anchored", "nsc")
BUDGETS = (0, 25, 50, 100, 200)


def budgets(method: str, steps: Sequence[int], base: Base, rate: float | None = None) -> list[Configuration]:
    """One configuration for every number of steps, labelled ``METHOD STEPS``; ``rate``: of learning.

    Raises:
        MergeError: the method takes no steps.
    """
    fields = methods.get(method).parameters.model_fields
    name = next((n for n in ("steps", "anchored_steps") if n in fields), None)
    if name is None:
        raise MergeError(f"method {method!r} takes no steps; choose others, such as {', '.join(METHODS)}")
    settings = defaults(method, base)
    if rate is not None:
        settings["learning_rate" if name == "steps" else "anchored_rate"] = rate
    out = []
    for count in steps:
        one = Configuration(f"{method} {count}", method, {**settings, name: count})
        if count == 0 and name == "steps":
            start = settings.get("init", fields["init"].default)
            one = replace(one, method="task_arithmetic", parameters={"scaling": start})
        out.append(one)
    return out


def course(rows: Results) -> dict[str, dict[str, list[Any]]]:
    """Method -> "budget", "average", "deviation" and "seconds", in the order of the budgets.

    The average over the tasks is in percent of fine-tuned, its mean and its standard deviation over the
    seeds (NaN for one seed); seconds are CPU seconds to prepare and to merge, in the mean over the seeds.
    """
    found: dict[str, dict[int, tuple[float, float, float]]] = {}
    for label, draws in rows.scores.items():
        firsts = [next(iter(own.values())) for own in draws.values()]
        if "course" not in firsts[0]:
            continue
        spent = [r["seconds"]["preparation"] + r["seconds"]["optimisation"] for r in firsts]
        at = (*summarise(rows, label).average, statistics.fmean(spent))
        found.setdefault(firsts[0]["course"], {})[firsts[0]["budget"]] = at
    out = {}
    for method, own in found.items():
        average, deviation, seconds = zip(*(own[b] for b in sorted(own)), strict=True)
        lists = (sorted(own), list(average), list(deviation), list(seconds))
        out[method] = dict(zip(("budget", "average", "deviation", "seconds"), lists, strict=True))
    return out


def draw(content: Mapping[str, Mapping[str, Sequence[float]]], title: str, target: Path) -> None:
    """Two panels, against steps and against seconds, as SVG; whiskers are standard deviations over seeds."""
    with panels(target, 1, 2, (10, 4)) as (a, b):
        for number, (method, own) in enumerate(content.items()):
            style = {"marker": "o", "markersize": 3, "color": f"C{number}", "capsize": 2}
            a.errorbar(own["budget"], own["average"], yerr=own["deviation"], label=method, **style)
            b.errorbar(own["seconds"], own["average"], yerr=own["deviation"], **style)
        a.set(title=title, xlabel="optimisation steps", ylabel="average, percent of fine-tuned")
        b.set(title="time to quality", xlabel="CPU seconds to prepare and to merge", xscale="log")
        a.legend(fontsize=7)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.course", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--steps", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=400, help="test rows per task, 0 for all")
    parser.add_argument("--adapter-seed", type=int, default=0)
    parser.add_argument(
        "--batch", type=int, default=UNLABELED_BATCH, help="unlabeled rows of a task in a step"
    )
    parser.add_argument("--rate", type=float, help="learning rate; default: the method's")
    options = parsed(parser, argv)
    if min(options.steps) < 0:
        raise MergeError(f"--steps {min(options.steps)}: no number of steps")
    chosen, cache = suites.suite(options.suite), cache_folder(options.cache)
    base = suites.base(chosen.base)
    curve = f", {options.batch} rows a step" * (options.batch != UNLABELED_BATCH)
    curve += f", rate {options.rate}" * (options.rate is not None)
    wanted = {}
    for method in dict.fromkeys(options.methods):
        own = budgets(method, options.steps, base, options.rate)
        wanted[method + curve] = [replace(one, label=one.label + curve) for one in own]
    of = {one.label: (m, n) for m, own in wanted.items() for n, one in zip(options.steps, own, strict=True)}
    how = {"adapter_seed": options.adapter_seed, "rows": options.rows or None, "batch": options.batch}
    shop = Workshop(chosen, cache, **how)
    target = options.out / f"course-{chosen.name}.jsonl"

    def budget(row: dict[str, Any]) -> dict[str, Any]:
        return (
            dict(zip(("course", "budget"), of[row["label"]], strict=True)) if row.get("label") in of else {}
        )

    every = [one for own in wanted.values() for one in own]
    status = record(target, shop, every, options.seeds, budget)
    (results,) = read([target])
    draw(course(results), chosen.name, target.with_suffix(".svg"))
    return status


if __name__ == "__main__":
    ended(main)
