"""The demo's tables: absolute scores, and scores as a share of what the task's own adapter reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from nsc_fast.demo.tasks import Task

__all__ = ["FINE_TUNED", "Summary", "best", "score_table", "share_table", "summarise", "verdict"]

FINE_TUNED = "fine-tuned, alone"
"""Row that everything is normalised to."""

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Summary:
    """Scores of one method in percent of the fine-tuned ones.

    Attributes:
        shares: task -> percent.
        average: mean over the tasks.
        worst: smallest of them.
        worst_task: where that is.
    """

    shares: dict[str, float]
    average: float
    worst: float
    worst_task: str


def summarise(scores: Scores, fine_tuned: Scores) -> Summary:
    """Normalises scores task by task.

    Raises:
        ValueError: a fine-tuned score that is not positive, so that a share of it says nothing.
    """
    bad = [task for task in scores if fine_tuned[task] <= 0]
    if bad:
        raise ValueError(f"the fine-tuned score of {', '.join(bad)} is not positive")
    shares = {task: 100 * score / fine_tuned[task] for task, score in scores.items()}
    worst = min(shares, key=shares.__getitem__)
    return Summary(shares, sum(shares.values()) / len(shares), shares[worst], worst)


def score_table(results: Mapping[str, Scores], tasks: Sequence[Task]) -> Table:
    """Absolute scores, one row per method."""
    table = Table(title="Score on test rows", title_justify="left")
    table.add_column("method", no_wrap=True)
    for task in tasks:
        table.add_column(f"{task.name}\n{task.metric_name}", justify="right")
    for method, scores in results.items():
        table.add_row(method, *(f"{scores[task.name]:.3f}" for task in tasks))
    return table


def share_table(results: Mapping[str, Scores], tasks: Sequence[Task]) -> Table:
    """Scores in percent of the fine-tuned ones, with average and worst task."""
    table = Table(title="Percent of fine-tuned", title_justify="left")
    table.add_column("method", no_wrap=True)
    for name in (*(task.name for task in tasks), "average", "worst"):
        table.add_column(name, justify="right")
    for method, scores in results.items():
        summary = summarise(scores, results[FINE_TUNED])
        table.add_row(
            method,
            *(f"{summary.shares[task.name]:.1f}" for task in tasks),
            f"{summary.average:.1f}",
            f"{summary.worst:.1f}",
        )
    return table


def best(results: Mapping[str, Scores], methods: Sequence[str]) -> str:
    """The method with the highest normalised average."""
    return max(methods, key=lambda m: summarise(results[m], results[FINE_TUNED]).average)


def verdict(
    results: Mapping[str, Scores],
    method: str,
    others: Sequence[str],
    *,
    usual: Sequence[str],
    rows: int,
) -> str:
    """One paragraph: how ``method`` compares with the other merges, without taking sides.

    Args:
        results: method -> task -> score.
        method: the one to judge.
        others: what it is compared with; the best of them is picked with the labels of the test rows.
        usual: those of ``others`` that one would take without labels.
        rows: test rows per task.
    """
    fine_tuned = results[FINE_TUNED]
    mine = summarise(results[method], fine_tuned)
    top = best(results, others)
    theirs = summarise(results[top], fine_tuned)
    averages = " and ".join(
        f"{mine.average - summarise(results[m], fine_tuned).average:+.1f} to {m}" for m in usual
    )
    return (
        f"{method} keeps {mine.average:.1f} % of fine-tuned on average, {mine.worst:.1f} % on its worst "
        f"task ({mine.worst_task}). The best other merge, {top}, picked with the labels of the test "
        f"rows: {theirs.average:.1f} % and {theirs.worst:.1f} % ({theirs.worst_task}). Points on "
        f"average against the coefficients that one would take without labels: {averages}. {rows} test "
        "rows per task, one seed: differences of a point or two are noise."
    )
