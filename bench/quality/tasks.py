"""The text tasks, and how rows are read and divided.

The data files are ``STEM.train.jsonl.gz`` and ``STEM.test.jsonl.gz``, one JSON object a line. Some test
splits of the published sets serve as train files here, so scores are not comparable with published ones.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from nsc_fast.demo.tasks import UPOS, read_rows
from nsc_fast.errors import MergeError

from .base import Split, Task

__all__ = ["DATA_VARIABLE", "TASKS", "data_folder", "divide", "file_rows"]

T = TypeVar("T")

DATA_VARIABLE = "NSC_FAST_DATA"
"""Environment variable with the folder of the data files; the option ``--data`` sets it."""

HELD_OUT = 300
"""Rows of a train file that no adapter sees, at most a fifth of the file."""

PAIR = ("premise", "hypothesis")
THREE = ("entailment", "neutral", "contradiction")
TWO = ("entailment", "not_entailment")
QUESTIONS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")

# name, kind, source, inputs, targets, labels, max_length, steps, metric
_ROWS = (
    ("sick_e", "classification", "sick", PAIR, ("entailment",), THREE, 64, 400, "accuracy"),
    ("sick_r", "regression", "sick", PAIR, ("relatedness",), (), 64, 250, "Pearson r"),
    ("trec", "classification", "trec", ("text",), ("label",), QUESTIONS, 32, 350, "accuracy"),
    (
        "emobank",
        "regression",
        "emobank",
        ("text",),
        ("valence", "arousal", "dominance"),
        (),
        64,
        350,
        "mean Pearson r",
    ),
    ("ewt_pos", "tagging", "ewt_pos", ("tokens",), ("tags",), UPOS, 96, 400, "tag accuracy"),
    ("snips", "generation", "snips", ("text",), ("frame",), (), 48, 450, "token accuracy"),
    ("snli", "classification", "nli_snli", PAIR, ("label",), THREE, 64, 400, "accuracy"),
    ("mnli", "classification", "nli_mnli_xnli_en", PAIR, ("label",), THREE, 64, 250, "accuracy"),
    ("qnli", "classification", "nli_qnli", PAIR, ("label",), TWO, 64, 400, "accuracy"),
    ("scitail", "classification", "nli_scitail", PAIR, ("label",), THREE[:2], 64, 400, "accuracy"),
    ("rte", "classification", "nli_rte", PAIR, ("label",), TWO, 96, 300, "accuracy"),
)

TASKS: tuple[Task, ...] = tuple(
    Task(name, "minilm", kind, source, inputs, targets, labels, max_length, steps, metric=metric)
    for name, kind, source, inputs, targets, labels, max_length, steps, metric in _ROWS
)


def data_folder() -> Path:
    """Folder of the data files: the environment variable, else ``shared/data`` beside the checkout.

    Raises:
        MergeError: it does not exist.
    """
    default = Path(__file__).resolve().parents[2] / "../shared/data"
    folder = Path(os.environ.get(DATA_VARIABLE) or default).resolve()
    if not folder.is_dir():
        raise MergeError(
            f"there is no data folder {folder}; give --data FOLDER or set {DATA_VARIABLE} to the folder that "
            "holds the files STEM.train.jsonl.gz and STEM.test.jsonl.gz"
        )
    return folder


def file_rows(source: str, part: str) -> list[dict[str, Any]]:
    """Rows of ``SOURCE.PART.jsonl.gz`` in the data folder.

    Raises:
        MergeError: there is no such file.
    """
    path = data_folder() / f"{source}.{part}.jsonl.gz"
    if not path.is_file():
        raise MergeError(f"there is no data file {path}; give --data FOLDER or set {DATA_VARIABLE}")
    return read_rows(path)


def divide(rows: Sequence[T], split: Split, limit: int | None = None, seed: int = 0) -> list[T]:
    """The rows of one split, in the order of the file.

    Args:
        rows: all rows of the train file, or for "test" of the test file.
        split: which of them; the held-out rows are always the same.
        limit: take a random sample of so many; None for all.
        seed: of that sample.
    """
    if split == "test":
        chosen = list(range(len(rows)))
    else:
        held = random.Random(0).sample(range(len(rows)), min(HELD_OUT, len(rows) // 5))
        held_set = set(held)
        chosen = [i for i in range(len(rows)) if (i in held_set) == (split == "held_out")]
    if limit is not None and limit < len(chosen):
        chosen = sorted(random.Random(seed).sample(chosen, limit))
    return [rows[i] for i in chosen]
