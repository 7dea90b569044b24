"""Unlabeled text from JSONL files, tokenised into batches for the base model."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import MergeError
from .recipe import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["read_rows", "text_batches"]


def read_rows(task: str, spec: DataSpec, seed: int) -> list[tuple[str, ...]]:
    """The text columns of ``spec.num_samples`` rows, drawn with ``seed``; nothing else is kept.

    Raises:
        MergeError: missing file, a line that is not JSON, a missing column, no rows.
    """
    path = Path(spec.path)
    if not path.is_file():
        raise MergeError(f"task {task!r}: there is no data file {spec.path!r}")
    columns = (spec.text,) if isinstance(spec.text, str) else spec.text
    rows = []
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise MergeError(f"task {task!r}: {path.name}, line {number}: not JSON: {error}") from error
            if not isinstance(row, dict) or any(column not in row for column in columns):
                have = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise MergeError(
                    f"task {task!r}: {path.name}, line {number}: no column {' and '.join(columns)} (it has "
                    f"{have}); name the text column with data.text"
                )
            rows.append(tuple(str(row[column]) for column in columns))
    rows = [row for row in rows if any(part.strip() for part in row)]
    if not rows:
        raise MergeError(f"task {task!r}: {path.name} holds no text")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[i] for i in order[: spec.num_samples].tolist()]


def text_batches(
    task: str, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[dict[str, Tensor]]:
    """Batches of ``spec.batch_size`` rows of similar length, padded to the longest of each."""
    rows = sorted(read_rows(task, spec, seed), key=lambda row: sum(map(len, row)))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batches = []
    for start in range(0, len(rows), spec.batch_size):
        columns = [list(column) for column in zip(*rows[start : start + spec.batch_size], strict=True)]
        encoded = tokenizer(
            *columns, truncation=True, max_length=spec.max_length, padding=True, return_tensors="pt"
        )
        batches.append(dict(encoded))
    return batches
