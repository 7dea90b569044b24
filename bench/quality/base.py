"""What a task, a suite and a base model are to the quality benchmark.

Everything that differs between base models stands behind :class:`Base`; everything that differs between
tasks of one base model is data in its :class:`Task`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Base", "GenerativeBase", "Kind", "Lora", "Split", "Suite", "Task"]

Kind = Literal["classification", "regression", "tagging", "generation", "segmentation", "edges"]
Split = Literal["train", "held_out", "test"]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: key in tables, file names and folders; unique within a base model.
        base: name of the base model, see ``suites.base``.
        kind: decides head, loss and score.
        source: stem of the data files, or name of an archive, in the data folder.
        inputs: fields of a row that the model reads.
        targets: fields that hold the answer.
        labels: class names in the order of the head's outputs; empty where there are no classes.
        max_length: longest input in tokens, the rest is cut off.
        steps: optimisation steps of its adapter.
        batch: rows of one training batch.
        metric: name of the score in tables.
    """

    name: str
    base: str
    kind: Kind
    source: str
    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    labels: tuple[str, ...] = ()
    max_length: int = 64
    steps: int = 600
    batch: int = 32
    metric: str = ""


@dataclass(frozen=True)
class Lora:
    """How the adapters of one base model are trained.

    Attributes:
        rank: of every adapter.
        alpha: LoRA's alpha; the scaling is ``alpha / rank``.
        modules: ends of the paths of the adapted modules, as PEFT's ``target_modules``.
        rate: peak learning rate of the adapter.
        head_rate: peak learning rate of the head.
    """

    rank: int
    alpha: int
    modules: tuple[str, ...]
    rate: float
    head_rate: float


@dataclass(frozen=True)
class Suite:
    """Tasks of one base model whose adapters are merged into one.

    Attributes:
        name: on the command line.
        base: name of the base model.
        tasks: names of its tasks, in the order of the tables.
        title: in words, for tables.
    """

    name: str
    base: str
    tasks: tuple[str, ...]
    title: str


class Base(Protocol):
    """One base model with its data; every module of base models has one object of this kind, ``BASE``.

    Attributes:
        name: key in folders and on the command line.
        lora: how its adapters are trained.
        target_scope: fields of ``nsc_fast.parameters.Scope``: the modules whose null-space ratio counts.
    """

    name: str
    lora: Lora
    target_scope: dict[str, Any]

    def load(self) -> nn.Module:
        """A fresh base model: frozen, in evaluation mode, float32."""
        ...

    def examples(self, task: Task, split: Split, limit: int | None, seed: int) -> Sequence[Any]:
        """Encoded rows with their targets; the same for the same arguments.

        Args:
            task: one of this base's.
            split: "train" are the rows of the train file without the 300 that are held out, "held_out" are
                those, "test" the rows of the test file.
            limit: take a sample of so many rows, drawn with ``seed``; None for all.
            seed: of that sample. Which rows are held out does not depend on it.
        """
        ...

    def batches(
        self, task: Task, examples: Sequence[Any], size: int, seed: int | None
    ) -> Iterator[tuple[dict[str, Tensor], Any]]:
        """Pairs of model inputs and targets.

        Args:
            task: one of this base's.
            examples: from :meth:`examples`.
            size: rows of a batch.
            seed: None for a fixed order of all rows; else one epoch in an order drawn with it, in batches of
                rows of similar length.
        """
        ...

    def new_head(self, task: Task) -> nn.Module:
        """An untrained head; it belongs to the task and is never merged."""
        ...

    def predict(self, task: Task, model: nn.Module, head: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Outputs of the head on one batch; differentiable."""
        ...

    def loss(self, task: Task, outputs: Tensor, targets: Any) -> Tensor:
        """Training loss of one batch; scalar."""
        ...

    def score(self, task: Task, outputs: list[Tensor], targets: list[Any]) -> float:
        """Score over all batches; larger is better."""
        ...


class GenerativeBase(Base, Protocol):
    """A base model with tasks of the kind "generation"."""

    def answered(self, task: Task, model: nn.Module, head: nn.Module, examples: Sequence[Any]) -> list[Any]:
        """The same rows with the model's own greedy answers in place of the reference answers.

        Of the examples only the prompts are read.

        Args:
            task: a generation task of this base.
            model: the base model with the task's adapter in it.
            head: of the task.
            examples: from :meth:`Base.examples`.

        Returns:
            Rows of the same form in the same order, for :meth:`Base.batches`.
        """
        ...


def correlation(outputs: Tensor, targets: Tensor) -> float:
    """Pearson's, over all entries of two tensors of equal size."""
    return float(torch.corrcoef(torch.stack([outputs.flatten(), targets.flatten()]).double())[0, 1])
