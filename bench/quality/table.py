"""Tables of results as Markdown.

    python -m bench.quality.table RESULTS... [--out FILE]

Per suite: the absolute scores of the fine-tuned adapters, then every merge in percent of them, task by task,
with average and worst task; mean and standard deviation over the draws, each of which is a training of the
adapters and a seed of the merge. Where a file holds a label, draw and task more than once, the last counts.
A task whose own adapter is no better than always answering the commonest class, within two standard errors,
is shown but left out of average and worst.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsc_fast.errors import MergeError

from .run import BASE_LABEL, FINE_TUNED

__all__ = ["Results", "Summary", "main", "markdown", "read"]

Row = dict[str, Any]
Draw = tuple[int, int]
"""Seed of the adapters' training, and of the merge."""


@dataclass(frozen=True)
class Results:
    """The rows of one suite.

    Attributes:
        suite: its name.
        scores: label -> draw -> task -> row, in the order of the files.
        reasons: label -> why there is no score.
        runs: provenance of the runs that the scores come from.
    """

    suite: str
    scores: dict[str, dict[Draw, dict[str, Row]]]
    reasons: dict[str, str]
    runs: list[Row]

    @property
    def tasks(self) -> list[str]:
        """Tasks in the order of the file."""
        return list(dict.fromkeys(t for draws in self.scores.values() for own in draws.values() for t in own))

    @property
    def at_chance(self) -> list[str]:
        """Tasks whose own adapter has learned nothing that shows, in any draw's rows."""
        found = []
        for task in self.tasks:
            rows = [own[task] for own in self.scores.get(FINE_TUNED, {}).values() if task in own]
            if rows and all(_at_chance(row) for row in rows):
                found.append(task)
        return found


@dataclass(frozen=True)
class Summary:
    """One label over its draws, in percent of fine-tuned: pairs of mean and standard deviation.

    Attributes:
        tasks: task -> pair.
        average: of the mean over the tasks.
        worst: of the smallest of them.
        worst_task: where the means are smallest.
        draws: how many.
    """

    tasks: dict[str, tuple[float, float]]
    average: tuple[float, float]
    worst: tuple[float, float]
    worst_task: str
    draws: int


def _at_chance(row: Mapping[str, Any]) -> bool:
    share = row["majority"]
    if share is None:
        return False
    error = math.sqrt(share * (1 - share) / row["test_rows"])
    return row["score"] <= share + 2 * error


def read(files: Iterable[Path]) -> list[Results]:
    """The results in some files, by suite.

    Raises:
        MergeError: a file without results.
    """
    suites: dict[str, Results] = {}
    runs: dict[str, Row] = {}
    for path in files:
        with path.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
        if not any(row["kind"] == "score" for row in rows):
            raise MergeError(f"{path} holds no results; they are written by: python -m bench.quality.run")
        for row in rows:
            if row["kind"] == "run":
                runs[row["run"]] = row
                continue
            own = suites.setdefault(row["suite"], Results(row["suite"], {}, {}, []))
            if row["status"] != "ok":
                own.reasons[row["label"]] = f"{row['status']}: {row['reason']}"
                continue
            own.reasons.pop(row["label"], None)
            draw = runs[row["run"]]["adapter_seed"], row["seed"]
            own.scores.setdefault(row["label"], {}).setdefault(draw, {})[row["task"]] = row
    for own in suites.values():
        used = {row["run"] for draws in own.scores.values() for t in draws.values() for row in t.values()}
        own.runs.extend(run for name, run in runs.items() if name in used)
    return list(suites.values())


def summarise(results: Results, label: str) -> Summary:
    """Percent of fine-tuned of one label, over its draws."""
    draws = list(results.scores[label].values())
    counted = [t for t in results.tasks if t not in results.at_chance]
    shares = [{t: 100 * own[t]["normalised"] for t in results.tasks if t in own} for own in draws]
    tasks = {t: _spread([own[t] for own in shares if t in own]) for t in results.tasks}
    averages = [statistics.fmean(own[t] for t in counted) for own in shares if counted]
    worst = [min(own[t] for t in counted) for own in shares if counted]
    where = min(counted, key=lambda t: tasks[t][0], default="no task counts")
    return Summary(tasks, _spread(averages), _spread(worst), where, len(draws))


def _spread(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def _text(pair: tuple[float, float]) -> str:
    mean, deviation = pair
    if math.isnan(mean):
        return "–"
    return f"{mean:.1f}" if math.isnan(deviation) else f"{mean:.1f} ± {deviation:.1f}"


def markdown(results: Results) -> str:
    """Both tables of one suite, with what they were measured on."""
    if FINE_TUNED not in results.scores:
        raise MergeError(f"suite {results.suite!r}: the results lack the rows {FINE_TUNED!r}")
    return "\n".join([f"## Suite {results.suite}", "", _provenance(results), "", *_scores(results), ""])


def _provenance(results: Results) -> str:
    run = results.runs[-1]
    draws = {draw for own in results.scores.values() for draw in own}
    trainings, seeds = (", ".join(map(str, sorted({draw[i] for draw in draws}))) for i in (0, 1))
    rows = {t: row["test_rows"] for own in results.scores[FINE_TUNED].values() for t, row in own.items()}
    told = ", ".join(f"{t} {n}" for t, n in rows.items())
    revisions = ", ".join(sorted({str(r["revision"] or r["nsc_fast"]) for r in results.runs}))
    return (
        f"{run['date']}, {run['cpu']}, {run['threads']} thread, torch {run['torch']}, nsc_fast {revisions}; "
        f"adapters of training {trainings}, seeds {seeds}; test rows: {told}. Mean ± standard deviation over "
        "the merges; a seed varies unlabeled rows, random draws and sampled test rows."
    )


def _scores(results: Results) -> list[str]:
    tasks, chance = results.tasks, results.at_chance
    metrics = {t: row["metric"] for own in results.scores[FINE_TUNED].values() for t, row in own.items()}
    heads = [f"{t} ({metrics[t]})" for t in tasks]
    lines = [
        f"| | {' | '.join(heads)} |",
        "|---|" + "---:|" * len(tasks),
    ]
    for label in (FINE_TUNED, BASE_LABEL):
        if label in results.scores:
            draws = results.scores[label].values()
            pairs = [_spread([100 * own[t]["score"] for own in draws if t in own]) for t in tasks]
            lines.append(f"| {label}, absolute × 100 | {' | '.join(map(_text, pairs))} |")
    lines += [
        "",
        "Percent of fine-tuned:",
        "",
        f"| method | {' | '.join(tasks)} | average | worst | CPU s | MiB |",
        "|---|" + "---:|" * (len(tasks) + 4),
    ]
    summaries = {label: summarise(results, label) for label in results.scores if label != FINE_TUNED}
    for label, one in sorted(summaries.items(), key=lambda pair: -pair[1].average[0]):
        cells = [_text(one.tasks[t]) for t in tasks]
        lines.append(
            f"| {label} | {' | '.join(cells)} | {_text(one.average)} | {_text(one.worst)} ({one.worst_task}) "
            f"| {_seconds(results, label)} | {_memory(results, label)} |"
        )
    notes = [f"- {label}: {reason}" for label, reason in results.reasons.items()]
    if chance:
        notes.append(
            f"- Left out of average and worst, because the task's own adapter stays at the share of the "
            f"commonest class: {', '.join(chance)}."
        )
    notes.append("- CPU s: to prepare and to merge. MiB: growth of the process meanwhile. Both means.")
    return [*lines, "", *notes]


def _firsts(results: Results, label: str) -> list[Row]:
    """One row per draw: times and memory are those of the whole merge."""
    return [next(iter(own.values())) for own in results.scores[label].values()]


def _seconds(results: Results, label: str) -> str:
    parts = [row["seconds"] for row in _firsts(results, label)]
    if any("optimisation" not in p for p in parts):
        return ""
    return f"{statistics.fmean(p['preparation'] + p['optimisation'] for p in parts):.1f}"


def _memory(results: Results, label: str) -> str:
    peaks = [row.get("peak_mib") for row in _firsts(results, label)]
    return "" if any(p is None for p in peaks) else f"{statistics.fmean(peaks):.0f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.table", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("results", type=Path, nargs="+", help="files of bench.quality.run")
    parser.add_argument("--out", type=Path, help="default: the terminal")
    options = parser.parse_args(argv)
    text = "\n".join(markdown(one) for one in read(options.results))
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
