"""Anchors: what each adapter alone makes of its own task's rows, as the values a merge should reproduce.

For task k let ``h*`` be the states that leave the model (before its head) under adapter k alone, ``h`` those
under the merge and ``h0`` those of the base model, on the same rows. The distance of task k is

    D_k = 1/2 sum_v E_v[(h - h*)^T W_v (h - h*)] / E_v[(h0 - h*)^T W_v (h0 - h*)]

over two views v of the states: every token, which tagging and generation read, and the mean of a sequence,
which answers about a whole text or image read and in which the noise of single tokens is gone. D is 0 for the
adapter itself and 1 for the base model. Not all directions of the states matter: a head reads few. It is not
known here, but the adapter was trained against it, and where the adapter moves the states tells:

    W = S^1/2 / tr S^1/2 + I / (10 d),        S = E[(h* - h0)(h* - h0)^T].

No label, no head and no ratio is involved, and a lower distance cannot be had by anything but agreeing with
the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Batch, rows, token_batch
from ..driver import backbone, forward_options
from ..errors import MergeError
from ..factors import LowRankUpdate
from ..layers import model_device
from ..monitor import TokenBatch
from .running import adapted, evaluating, on_device

__all__ = ["Anchor", "AnchoredObjective", "Anchors", "anchors", "states"]

# Share of W that is the same in all directions: what the adapter hardly moves must stay where it is.
_FLOOR = 0.1


@dataclass(frozen=True)
class Anchor:
    """One batch and the states that its adapter gives.

    Attributes:
        inputs: the batch.
        states: ``(N, d)`` on the CPU, tokens without padding, in the model's dtype.
        keep: ``(B, S)`` bool, which tokens those are; ``(B,)`` where a sequence has one state.
    """

    inputs: Mapping[str, Tensor]
    states: Tensor
    keep: Tensor

    def views(self, found: Tensor) -> list[Tensor]:
        """Differences to the anchor: ``(N, d)`` of tokens and, where there are several, ``(B, d)`` of means.

        Args:
            found: ``(B, ..., d)``, the states to compare; differentiable.
        """
        wide = torch.float64 if found.dtype == torch.float64 else torch.float32
        keep = self.keep.to(found.device)
        off = found.reshape(*keep.shape, -1)[keep].to(wide) - self.states.to(found.device, wide)
        if keep.ndim == 1:
            return [off]
        # A product, so that the order of the sums is fixed on every device.
        count = keep.sum(1)
        owner = torch.nn.functional.one_hot(
            torch.arange(len(count), device=found.device).repeat_interleave(count), len(count)
        )
        return [off, (owner.to(wide) / count.clamp(min=1).to(wide)).T @ off]


@dataclass(frozen=True)
class Anchors:
    """Of one task.

    Attributes:
        task: its name.
        batches: anchors of the fitted rows.
        metrics: W of every view, ``(d, d)`` on the CPU, scaled so that the base model has distance 1.
    """

    task: str
    batches: tuple[Anchor, ...]
    metrics: tuple[Tensor, ...]

    @property
    def rows(self) -> int:
        """Sequences in all batches."""
        return sum(rows(a.inputs) for a in self.batches)

    def of_views(self, anchor: Anchor, found: Tensor) -> list[Tensor]:
        """Distances of every token and of every sequence's mean; differentiable in ``found (B, ..., d)``."""
        views = anchor.views(found)
        return [((off @ w.to(off)) * off).sum(1) for off, w in zip(views, self.metrics, strict=True)]

    def distance(self, anchor: Anchor, found: Tensor) -> Tensor:
        """Mean distance on one batch."""
        views = self.of_views(anchor, found)
        return torch.stack([view.mean() for view in views]).mean()


def states(output: Any) -> Tensor:
    """The last states in what a model returns.

    Raises:
        MergeError: there is no tensor in it.
    """
    found = getattr(output, "last_hidden_state", None)
    if found is None:
        found = output[0] if isinstance(output, tuple | list) and output else output
    if found is None or not isinstance(found, Tensor):
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise MergeError(f"the model returns a {type(output).__name__} without states to compare")
    return found


def anchors(
    model: nn.Module,
    updates: Mapping[str, Mapping[str, LowRankUpdate]],
    batches: Mapping[str, Sequence[Batch]],
) -> dict[str, Anchors]:
    """Two forward passes over every task's rows: the base model, and the task's adapter alone.

    The states of all rows stay in memory: ``tokens x width`` numbers a task.

    Raises:
        MergeError: an adapter that changes nothing on its own rows, or states that are not finite.
    """
    out = {}
    for task, own in updates.items():
        runner = StatesRunner(model, tuple(own))
        with evaluating(model):
            with adapted(model, own):
                there = [runner.anchor(batch, task) for batch in batches[task]]
            moved = [anchor.views(runner.states(anchor.inputs).cpu()) for anchor in there]
        metrics = tuple(_metric(task, torch.cat(view)) for view in zip(*moved, strict=True))
        out[task] = Anchors(task, tuple(there), metrics)
    return out


def _metric(task: str, moved: Tensor) -> Tensor:
    """W, divided by the mean distance that the adapter moves the states ``(N, d)``."""
    d = moved.shape[1]
    second = (moved.T @ moved).double() / len(moved)
    trace = float(second.diagonal().sum())
    if not trace < float("inf"):
        raise MergeError(f"the states of task {task!r} are not finite; load the base model in float32")
    if trace == 0:
        raise MergeError(
            f"the adapter of task {task!r} changes nothing on its own rows; leave it out, or check its data"
        )
    values, vectors = torch.linalg.eigh(second)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    metric = root / root.diagonal().sum()
    metric.diagonal().add_(_FLOOR / d)
    # E[D^T W D] = tr(W S).
    return (metric / (metric * second).sum()).to(moved.dtype)


class StatesRunner:
    """Runs a model up to its head and returns the states."""

    def __init__(self, model: nn.Module, modules: Sequence[str]) -> None:
        self._runner = backbone(model, modules)
        self._options = forward_options(self._runner)
        self.device = model_device(model)

    def states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """``(B, ..., d)``."""
        return states(self._runner(**on_device(inputs, self.device), **self._options))

    def anchor(self, inputs: Mapping[str, Tensor], task: str) -> Anchor:
        """What the model gives as it stands now."""
        found = self.states(inputs)
        keep = _kept(token_batch(inputs, 0, torch.device("cpu")), found, task)
        return Anchor(inputs, found.reshape(*keep.shape, -1).cpu()[keep], keep)


def _kept(tokens: TokenBatch, found: Tensor, task: str) -> Tensor:
    try:
        _, weight = tokens.tokens(found.shape[:-1], "output states")
    except ValueError:
        raise MergeError(
            f"task {task!r}: the model's states have shape {tuple(found.shape)}, which does not fit the batch"
        ) from None
    kept = (weight > 0).cpu()
    if found.ndim < 3 or kept.numel() % found.shape[0]:
        return kept
    return kept.reshape(found.shape[0], -1)


@dataclass
class AnchoredObjective:
    """Mean over the tasks of their distance on one batch each; see :mod:`nsc_fast.objectives.anchored`.

    Attributes:
        model: the base model with merged layers in it.
        installation: what put them there; its coefficients get the gradients.
        tasks: anchors of every task.
        preferences: weight per task, normalised to sum 1. Default: equal.
    """

    model: nn.Module
    installation: Any
    tasks: Mapping[str, Anchors]
    preferences: Mapping[str, float] | None = None
    finished: bool = False
    _share: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self._runner = StatesRunner(self.model, self.installation.modules)
        weight = {t: 1.0 if self.preferences is None else self.preferences[t] for t in self.tasks}
        self._share = {task: w / sum(weight.values()) for task, w in weight.items()}

    def losses(self, batches: Mapping[str, Anchor]) -> tuple[float, dict[str, float]]:
        """Forward and backward for one batch of every task; gradients add up in the coefficients.

        Raises:
            MergeError: a distance that is not finite.
        """
        total, parts = 0.0, {}
        for task, anchor in batches.items():
            loss = self.tasks[task].distance(anchor, self._runner.states(anchor.inputs))
            parts[task] = float(loss.detach())
            if not torch.isfinite(loss):
                raise MergeError(
                    f"the distance of task {task!r} is {parts[task]}: lower the learning rate or load the "
                    "base model in float32"
                )
            (self._share[task] * loss).backward()
            total += self._share[task] * parts[task]
        return total, parts
