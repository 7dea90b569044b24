"""Anchors: what each adapter alone makes of its own task's rows, as the values a merge should reproduce.

For task k let ``h*`` be the states that leave the model (before its head) under adapter k alone, ``h`` those
under the merge and ``h0`` those of the base model, on the same rows. The distance of task k is

    D_k = 1/2 sum_v E_v[(h - h*)^T W_v (h - h*)] / E_v[(h0 - h*)^T W_v (h0 - h*)]

over two views v of the states: every token, which tagging and generation read, and the mean of a sequence,
which answers about a whole text or image read and in which the noise of single tokens is gone. D is 0 for the
adapter itself and 1 for the base model. Not all directions of the states matter: a head reads few. It is not
known here, but the adapter was trained against it, and where the adapter moves the states tells: W is
described in :mod:`nsc_fast.objectives.metric`.

No label, no head and no ratio is involved, and a lower distance cannot be had by anything but agreeing with
the adapter. What is optimised is, on request, half this distance and half that of the waypoints, see
:mod:`nsc_fast.objectives.waypoints`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Batch, rows, token_batch
from ..dtypes import compute_dtype
from ..errors import MergeError
from ..factors import LowRankUpdate
from ..packing import parts
from .metric import Metric, metric_of
from .running import adapted, evaluating, watched
from .states import StatesRunner, kept, leaving
from .waypoints import Passing, candidates, directions, project

__all__ = ["Anchor", "Anchors", "Place", "anchors"]

# Tokens of a task from which the directions of its waypoints are taken.
_SAMPLE = 2048


@dataclass(frozen=True)
class Anchor:
    """One batch and the states that its adapter gives.

    Attributes:
        inputs: the batch.
        states: ``(N, d)`` on the CPU, tokens without padding, in the model's dtype.
        keep: ``(B, S)`` bool, which tokens those are; ``(B,)`` where a sequence has one state.
        whole: of a part of a batch: tokens and sequences of the batch.
        way: block -> ``(N, m)`` on the CPU, its states in the directions of the waypoints.
    """

    inputs: Mapping[str, Tensor]
    states: Tensor
    keep: Tensor
    whole: tuple[int, int] | None = None
    way: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def counts(self) -> tuple[int, int]:
        """Tokens and sequences of the batch that this is, or is a part of."""
        return self.whole or (len(self.states), len(self.keep))

    def parts(self, micro_batch: int | None) -> list[Anchor]:
        """In parts of at most ``micro_batch`` sequences, whose distances add up to that of the whole.

        Raises:
            MergeError: as :func:`nsc_fast.packing.parts`.
        """
        pieces = parts(self.inputs, micro_batch)
        if len(pieces) == 1:
            return [self]
        keeps = self.keep.split(micro_batch)
        sizes = [int(keep.sum()) for keep in keeps]
        own = self.states.split(sizes)
        ways = {name: way.split(sizes) for name, way in self.way.items()}
        return [
            Anchor(*one, self.counts, {name: way[i] for name, way in ways.items()})
            for i, one in enumerate(zip(pieces, own, keeps, strict=True))
        ]

    def tokens(self, found: Tensor) -> Tensor:
        """``(N, d)``, without padding, of the states ``found (B, ..., d)`` of this batch alone."""
        return Place(self, range(len(self.keep)), len(self.keep)).tokens(found)

    def views(self, tokens: Tensor) -> list[Tensor]:
        """Differences to the anchor: ``(N, d)`` of tokens and, where there are several, ``(B, d)`` of means.

        Args:
            tokens: ``(N, d)``, the states to compare; differentiable.
        """
        wide = compute_dtype(tokens.dtype)
        off = tokens.to(wide) - self.states.to(tokens.device).to(wide)
        if self.keep.ndim == 1:
            return [off]
        count = self.keep.sum(1).to(off.device)
        sequence = torch.arange(len(count), device=off.device)
        # Told the size, a device need not be waited for.
        owner = sequence.repeat_interleave(count, output_size=len(off)) == sequence[:, None]
        # A product, so that the order of the sums is fixed on every device.
        return [off, (owner.to(wide) / count.clamp(min=1).to(wide)[:, None]) @ off]


@dataclass
class Place:
    """Where one task's tokens are among those of a pass, whose sequences are padded on the right.

    Worked out on the host, which does not have to wait for the device then.

    Attributes:
        anchor: of the task's batch.
        rows: its sequences among those of the pass.
        sequences: how many the pass has.
    """

    anchor: Anchor
    rows: Sequence[int]
    sequences: int
    _known: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)

    def tokens(self, found: Tensor) -> Tensor:
        """``(N, d)``, without padding, of the states ``found (B, ..., d)`` of the pass."""
        flat = found.flatten(0, -2)
        key = len(flat), flat.device
        if key not in self._known:
            self._known[key] = self._index(len(flat)).to(flat.device)
        return flat.index_select(0, self._known[key])

    def _index(self, count: int) -> Tensor:
        keep = self.anchor.keep
        if len(self.rows) == self.sequences:
            return keep.flatten().nonzero().squeeze(1)
        own = keep.reshape(len(self.rows), -1)
        first = torch.tensor(self.rows)[:, None] * (count // self.sequences)
        return (first + torch.arange(own.shape[1]))[own]


@dataclass(frozen=True)
class Anchors:
    """Of one task.

    Attributes:
        task: its name.
        batches: anchors of the fitted rows.
        metrics: W of every view.
        directions: block -> F ``(d, m)``, scaled so that the base model has distance 1; empty without
            waypoints.
        sampled: rows that the directions were taken from.
    """

    task: str
    batches: tuple[Anchor, ...]
    metrics: tuple[Metric, ...]
    directions: Mapping[str, Tensor] = field(default_factory=dict)
    sampled: int = 0

    @property
    def rows(self) -> int:
        """Sequences in all batches."""
        return sum(rows(a.inputs) for a in self.batches)

    def to(self, device: torch.device) -> Anchors:
        """With what every batch needs, metrics and directions, on a device."""
        there = {name: f.to(device) for name, f in self.directions.items()}
        return replace(self, metrics=tuple(w.to(device) for w in self.metrics), directions=there)

    def of_views(self, anchor: Anchor, tokens: Tensor) -> list[Tensor]:
        """Distances of every token and of every sequence's mean; differentiable in ``tokens (N, d)``."""
        return [w.of(off) for off, w in zip(anchor.views(tokens), self.metrics, strict=True)]

    def distance(self, anchor: Anchor, tokens: Tensor) -> Tensor:
        """Mean distance of the last states on one batch, or what a part of it has in that mean."""
        views = self.of_views(anchor, tokens)
        return sum(view.sum() / count for view, count in zip(views, anchor.counts, strict=False)) / len(views)

    def way(self, anchor: Anchor, block: str, tokens: Tensor) -> Tensor:
        """What a block with directions has in the mean distance of the waypoints; ``tokens (N, d)``."""
        got = project(tokens, self.directions[block])
        off = got - anchor.way[block].to(got.device).to(got)
        return off.square().sum() / (anchor.counts[0] * len(self.directions))


def anchors(
    model: nn.Module,
    updates: Mapping[str, Mapping[str, LowRankUpdate]],
    batches: Mapping[str, Sequence[Batch]],
    *,
    micro_batch: int | None = None,
    waypoints: bool = False,
) -> dict[str, Anchors]:
    """Two forward passes over every task's rows: the base model, and the task's adapter alone.

    The states of all rows stay in memory: ``tokens x width`` numbers a task. Waypoints take two passes more
    over some of the rows, and ``tokens x blocks x DIRECTIONS`` numbers.

    Args:
        micro_batch: sequences in one pass at most.
        waypoints: whether what leaves the blocks is compared, too.

    Raises:
        MergeError: an adapter that changes nothing on its own rows, states that are not finite, or waypoints
            whose tokens are those of the last states in some batches only.
    """
    out = {}
    modules = tuple(dict.fromkeys(m for own in updates.values() for m in own))
    runner = StatesRunner(model, modules, micro_batch)
    blocks = candidates(model, modules) if waypoints else ()
    for task, own in updates.items():
        with evaluating(model):
            ways, sampled = _directions(runner, own, batches[task], task, blocks) if blocks else ({}, 0)
            with adapted(model, own):
                there = [_anchor(runner, batch, task, ways) for batch in batches[task]]
            metrics = _metrics(runner, task, there)
        out[task] = Anchors(task, tuple(there), tuple(metrics), ways, sampled)
    return out


def _anchor(
    runner: StatesRunner, inputs: Mapping[str, Tensor], task: str, ways: Mapping[str, Tensor]
) -> Anchor:
    """What the model gives as it stands now; ``ways``: block -> directions."""
    seen: dict[str, list[Tensor]] = {name: [] for name in ways}

    def see(block: str, _: Any, output: Any) -> None:
        seen[block].append(project(leaving(output).flatten(0, -2), ways[block]).cpu())

    with watched(runner.model, ways, see):
        found = runner.states(inputs)
    keep = kept(token_batch(inputs, 0, torch.device("cpu")), found, task)
    for name, own in seen.items():
        if (count := sum(map(len, own))) != keep.numel():
            raise MergeError(
                f"task {task!r}: block {name!r} has the last states' tokens in some batches, but not in "
                f"one ({count} of {keep.numel()}); set waypoints (auto: anchored_waypoints) to false"
            )
    way = {name: torch.cat(own)[keep.flatten()] for name, own in seen.items()}
    return Anchor(inputs, found.reshape(*keep.shape, -1).cpu()[keep], keep, way=way)


def _metrics(runner: StatesRunner, task: str, there: Sequence[Anchor]) -> list[Metric]:
    """Of every view; the model is the base model now."""
    sums: list[Tensor] = []
    for anchor in there:
        views = anchor.views(anchor.tokens(runner.states(anchor.inputs)))
        more = [(off.T @ off).cpu().double() for off in views]
        sums = [a + b for a, b in zip(sums, more, strict=True)] if sums else more
    counts = map(sum, zip(*(anchor.counts for anchor in there), strict=True))
    return [metric_of(task, s / n, views[0].dtype) for s, n in zip(sums, counts, strict=False)]


def _directions(
    runner: StatesRunner,
    own: Mapping[str, LowRankUpdate],
    batches: Sequence[Batch],
    task: str,
    blocks: Sequence[str],
) -> tuple[dict[str, Tensor], int]:
    """Of one task's waypoints, from some of its rows, and how many these are."""
    moved: dict[str, list[Tensor]] = {}
    count = sampled = 0
    # Rows may come sorted.
    for i in torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist():
        for part in runner.parts(batches[i]):
            base, there = Passing(), Passing()
            with watched(runner.model, blocks, base.see):
                last = runner.run(part)
            with adapted(runner.model, own), watched(runner.model, blocks, there.see):
                runner.run(part)
            keep = kept(token_batch(part, 0, last.device), last, task)
            before = base.below(last)
            for name, states in there.below(last).items():
                shift = (states.float() - before[name].float()).reshape(*keep.shape, -1)
                moved.setdefault(name, []).append(shift[keep])
            count += int(keep.sum())
        sampled += rows(batches[i])
        if count >= _SAMPLE:
            break
    found = directions({name: torch.cat(shifts) for name, shifts in moved.items()})
    return {name: f.to(runner.device) for name, f in found.items()}, sampled
