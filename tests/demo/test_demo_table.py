"""Normalisation and the verdict, on made-up scores."""

import io

import pytest
from rich.console import Console

from nsc_fast.demo.table import (
    FINE_TUNED,
    best,
    score_table,
    share_table,
    summarise,
    verdict,
)
from nsc_fast.demo.tasks import TASKS

NAMES = [task.name for task in TASKS]
RESULTS = {
    FINE_TUNED: dict(zip(NAMES, (0.5, 0.9, 0.8, 0.8), strict=True)),
    "sum": dict(zip(NAMES, (0.4, 0.9, 0.8, 0.4), strict=True)),
    "mean": dict(zip(NAMES, (0.5, 0.9, 0.8, 0.6), strict=True)),
    "ours": dict(zip(NAMES, (0.5, 0.9, 0.8, 0.72), strict=True)),
}


def test_scores_become_percent_of_fine_tuned():
    summary = summarise(RESULTS["sum"], RESULTS[FINE_TUNED])
    assert summary.shares == pytest.approx(dict(zip(NAMES, (80, 100, 100, 50), strict=True)))
    assert (summary.average, summary.worst) == pytest.approx((82.5, 50))
    assert summary.worst_task == NAMES[3]


def test_a_fine_tuned_score_of_zero_is_refused_by_name():
    with pytest.raises(ValueError, match="fine-tuned score of b is not positive"):
        summarise({"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.0})


def test_the_best_other_method_and_the_usual_ones_are_compared_with():
    assert best(RESULTS, ["sum", "mean"]) == "mean"
    text = verdict(RESULTS, "ours", ["sum", "mean"], usual=["sum"], rows=300)
    assert "ours keeps 97.5 % of fine-tuned on average, 90.0 % on its worst task" in text
    assert "The best other merge, mean" in text and "93.8 % and 75.0 %" in text
    assert "+15.0 to sum" in text


def test_a_method_that_loses_is_said_to_lose():
    text = verdict(RESULTS, "sum", ["mean", "ours"], usual=["mean", "ours"], rows=300)
    assert "-11.2 to mean and -15.0 to ours" in text


def test_tables_fit_a_terminal_of_eighty_columns():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(score_table(RESULTS, TASKS))
    console.print(share_table(RESULTS, TASKS))
    text = console.export_text()
    assert "0.720" in text and "97.5" in text and "…" not in text
