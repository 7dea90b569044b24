"""The tasks of the demo: what goes in, what comes out, how it is scored, where the rows come from.

A task is a frozen :class:`Task`; everything that differs between tasks is data in it or a branch on
its ``kind`` in this file. The head of a task belongs to its adapter and is never merged.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = [
    "ADAPTERS",
    "DATA",
    "IGNORED",
    "TASKS",
    "Task",
    "batches",
    "collate",
    "collate_targets",
    "encode",
    "loss",
    "metric",
    "new_head",
    "predict",
    "read_rows",
    "targets",
    "task_named",
]

Row = dict[str, Any]

DATA = Path(__file__).parent / "data"
ADAPTERS = Path(__file__).parent / "adapters"

IGNORED = -100
"""Target of a token that is not scored: padding, special tokens, a word's later pieces."""

HIDDEN = 384

UPOS = tuple("ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X".split())


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: key in tables, file names and folders.
        kind: decides head position, loss and metric.
        inputs: fields of a row that the encoder reads: a text, a pair of texts, or a list of words.
        targets: fields that hold the answer; the bundled unlabeled rows do not have them.
        labels: class names, in the order of the head's outputs; empty for regression.
        max_length: longest input in word pieces, the rest is cut off.
        stem: name of the full data files that ``prepare.py`` and ``train.py`` read.
        source: what the rows were made from.
        license: SPDX identifier of the rows.
    """

    name: str
    kind: Literal["classification", "regression", "tagging"]
    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    labels: tuple[str, ...]
    max_length: int
    stem: str
    source: str
    license: str

    @property
    def outputs(self) -> int:
        """Width of the head."""
        return len(self.labels) or len(self.targets)

    @property
    def metric_name(self) -> str:
        """What :func:`metric` returns for this task; always larger is better, at most 1."""
        return {
            "classification": "accuracy",
            "regression": "Pearson r",
            "tagging": "tag accuracy",
        }[self.kind]

    def rows(self, split: Literal["unlabeled", "test"]) -> list[Row]:
        """The bundled rows."""
        return read_rows(DATA / f"{self.name}.{split}.jsonl.gz")

    @property
    def adapter(self) -> Path:
        """Folder of the bundled adapter: PEFT's two files and ``head.safetensors``."""
        return ADAPTERS / self.name


TASKS: tuple[Task, ...] = (
    Task(
        name="emobank",
        kind="regression",
        inputs=("text",),
        targets=("valence", "arousal", "dominance"),
        labels=(),
        max_length=64,
        stem="emobank",
        source="EmoBank",
        license="CC-BY-SA-4.0",
    ),
    Task(
        name="ewt_pos",
        kind="tagging",
        inputs=("tokens",),
        targets=("tags",),
        labels=UPOS,
        max_length=96,
        stem="ewt_pos",
        source="UD English EWT",
        license="CC-BY-SA-4.0",
    ),
    Task(
        name="snli",
        kind="classification",
        inputs=("premise", "hypothesis"),
        targets=("label",),
        labels=("entailment", "neutral", "contradiction"),
        max_length=64,
        stem="nli_snli",
        source="SNLI",
        license="CC-BY-SA-4.0",
    ),
    Task(
        name="scitail",
        kind="classification",
        inputs=("premise", "hypothesis"),
        targets=("label",),
        labels=("entailment", "neutral"),
        max_length=64,
        stem="nli_scitail",
        source="SciTail",
        license="Apache-2.0",
    ),
)


def task_named(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    for task in TASKS:
        if task.name == name:
            return task
    raise ValueError(f"no demo task {name!r}; there are {', '.join(t.name for t in TASKS)}")


def read_rows(path: Path) -> list[Row]:
    """Rows of a gzipped JSON-lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def encode(task: Task, tokenizer: Any, rows: Sequence[Row]) -> list[dict[str, list[int]]]:
    """Model inputs of the rows, unpadded; for tagging also ``word_ids`` (-1: no word starts)."""
    columns = [[row[field] for row in rows] for field in task.inputs]
    encoded = tokenizer(
        *columns,
        truncation=True,
        max_length=task.max_length,
        is_split_into_words=task.kind == "tagging",
        return_token_type_ids=True,
    )
    keys = ("input_ids", "token_type_ids", "attention_mask")
    examples = [{key: encoded[key][i] for key in keys} for i in range(len(rows))]
    if task.kind == "tagging":
        for i, example in enumerate(examples):
            words = encoded.word_ids(i)
            previous = [None, *words[:-1]]
            example["word_ids"] = [
                w if w is not None and w != p else -1 for w, p in zip(words, previous, strict=True)
            ]
    return examples


def targets(task: Task, rows: Sequence[Row], examples: Sequence[Mapping[str, list[int]]]) -> list:
    """Answers of the rows.

    Returns:
        per row a class index, a list of floats, or one tag index per word piece (``IGNORED`` where
        no word starts).
    """
    if task.kind == "regression":
        return [[float(row[field]) for field in task.targets] for row in rows]
    index = {label: i for i, label in enumerate(task.labels)}
    field = task.targets[0]
    if task.kind == "classification":
        return [index[row[field]] for row in rows]
    return [
        [IGNORED if w < 0 else index[row[field][w]] for w in example["word_ids"]]
        for row, example in zip(rows, examples, strict=True)
    ]


def collate(examples: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    """Model inputs of one batch, padded on the right with zeros (this encoder's pad token)."""
    keys = ("input_ids", "token_type_ids", "attention_mask")
    return {key: _pad([e[key] for e in examples], 0) for key in keys}


def collate_targets(task: Task, values: Sequence[Any]) -> Tensor:
    """Targets of one batch as a tensor."""
    if task.kind == "tagging":
        return _pad(values, IGNORED)
    return torch.tensor(values, dtype=torch.float32 if task.kind == "regression" else torch.int64)


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return out


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, so that little is spent on padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def new_head(task: Task) -> nn.Linear:
    """An untrained head: one linear layer on the pooled sentence, or on every token for tagging."""
    return nn.Linear(HIDDEN, task.outputs)


def predict(task: Task, head: nn.Linear, states: Tensor, attention_mask: Tensor) -> Tensor:
    """Head outputs from the encoder's last hidden states ``(batch, tokens, HIDDEN)``."""
    if task.kind == "tagging":
        return head(states)
    weight = attention_mask.unsqueeze(-1).to(states.dtype)
    return head((states * weight).sum(1) / weight.sum(1))


def loss(task: Task, outputs: Tensor, target: Tensor) -> Tensor:
    """Training loss; scalar. Regression targets are expected standardised."""
    if task.kind == "regression":
        return nn.functional.mse_loss(outputs, target)
    return nn.functional.cross_entropy(outputs.flatten(0, -2), target.flatten(), ignore_index=IGNORED)


def metric(task: Task, outputs: Sequence[Tensor], target: Sequence[Tensor]) -> float:
    """Score over all batches: accuracy over rows or words, or the mean Pearson r of the fields."""
    if task.kind == "regression":
        x = torch.cat(list(outputs)).double()
        y = torch.cat(list(target)).double()
        x, y = x - x.mean(0), y - y.mean(0)
        return float(((x * y).sum(0) / (x.norm(dim=0) * y.norm(dim=0))).mean())
    right = total = 0
    for x, y in zip(outputs, target, strict=True):
        scored = y != IGNORED
        right += int(((x.argmax(-1) == y) & scored).sum())
        total += int(scored.sum())
    return right / total
