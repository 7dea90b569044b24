"""The objective of anchored merging: the distance to each adapter alone, and its gradients.

What the distance is stands in :mod:`nsc_fast.objectives.anchors`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MergeError
from ..layers import Installation
from ..packing import passes
from ..sharding import InStep, Pass
from ..siblings import Siblings, share
from .anchors import Anchor, Anchors, Place
from .running import on_device, watched
from .states import StatesRunner, leaving

__all__ = ["AnchoredObjective"]


@dataclass
class AnchoredObjective:
    """Mean over the tasks of their distance on one batch each; see :mod:`nsc_fast.objectives.anchors`.

    Attributes:
        model: the base model with merged layers in it.
        installation: what put them there; its coefficients get the gradients.
        tasks: anchors of every task.
        preferences: weight per task, normalised to sum 1. Default: equal.
        batching, micro_batch: see :class:`nsc_fast.parameters.Memory`.
        in_step: keeps the passes of all processes in step, where the base model is sharded over them.
    """

    model: nn.Module
    installation: Installation
    tasks: Mapping[str, Anchors]
    preferences: Mapping[str, float] | None = None
    batching: str = "auto"
    micro_batch: int | None = None
    in_step: InStep | None = None
    finished: bool = False
    _share: dict[str, float] = field(init=False)
    _waypoints: tuple[str, ...] = field(init=False)
    _siblings: list[Siblings] = field(default_factory=list)
    _seen: set[frozenset[str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._runner = StatesRunner(self.model, self.installation.modules)
        self.tasks = {task: own.to(self._runner.device) for task, own in self.tasks.items()}
        weight = {t: 1.0 if self.preferences is None else self.preferences[t] for t in self.tasks}
        self._share = {task: w / sum(weight.values()) for task, w in weight.items()}
        self._waypoints = tuple(dict.fromkeys(b for own in self.tasks.values() for b in own.directions))

    def losses(self, batches: Mapping[str, Anchor]) -> tuple[float, dict[str, float]]:
        """Forward and backward for one batch of every task; gradients add up in the coefficients.

        Args:
            batches: task -> anchors; none is for sharded base models.

        Raises:
            MergeError: a distance that is not finite, or batches that cannot be joined though they must.
        """
        pieces = {task: anchor.parts(self.micro_batch) for task, anchor in batches.items()}
        distances = dict.fromkeys(batches, 0.0)
        todo: list[Pass] = []
        for i in range(max(map(len, pieces.values()), default=0)):
            todo += self._passes({t: own[i] for t, own in pieces.items() if i < len(own)})
        if self.in_step is not None:
            todo = self.in_step(todo, lambda one: (one[0], None))
        try:
            for inputs, own in todo:
                self._pass(inputs, own, distances)
        finally:
            for group in self._siblings:
                group.forget()
        return sum(self._share[task] * value for task, value in distances.items()), distances

    def _passes(self, anchors: Mapping[str, Anchor]) -> list[Pass]:
        """Inputs of every pass, and task -> where its tokens are."""
        tasks, device = list(anchors), self._runner.device
        moved = {k: on_device(anchors[task].inputs, device) for k, task in enumerate(tasks)}
        out = []
        for inputs, tokens in passes(moved, device, together=self.batching):
            rows_of: dict[int, list[int]] = {}
            for row, k in enumerate(order := tokens.task.tolist()):
                rows_of.setdefault(k, []).append(row)
            own = {tasks[k]: Place(anchors[tasks[k]], at, len(order)) for k, at in rows_of.items()}
            out.append((inputs, own))
        return out

    def _pass(
        self,
        inputs: Mapping[str, Tensor],
        own: Mapping[str, Place] | None,
        distances: dict[str, float],
    ) -> None:
        self._look(inputs)
        way: dict[str, Tensor] = {}

        def see(block: str, _: Any, output: Any) -> None:
            for task, place in own.items():
                if block in self.tasks[task].directions:
                    tokens = place.tokens(leaving(output))
                    part = self.tasks[task].way(place.anchor, block, tokens)
                    way[task] = part + way[task].to(part) if task in way else part

        with watched(self.model, self._waypoints if own else (), see):
            found = self._runner.run(inputs)
        if own is None:
            found.backward(torch.zeros_like(found))
            return
        parts = {}
        for task, place in own.items():
            distance = self.tasks[task].distance(place.anchor, place.tokens(found))
            parts[task] = (distance + way[task].to(distance)) / 2 if task in way else distance
        sum(self._share[task] * part for task, part in parts.items()).backward()
        for task, value in zip(parts, torch.stack([*parts.values()]).tolist(), strict=True):
            if not math.isfinite(value):
                raise MergeError(
                    f"the distance of task {task!r} is {value}: lower the learning rate or load the base "
                    "model in float32"
                )
            distances[task] += value

    def _look(self, inputs: Mapping[str, Tensor]) -> None:
        """Which layers receive the same activations, found out before the first pass with such inputs."""
        if frozenset(inputs) not in self._seen:
            self._seen.add(frozenset(inputs))
            self._siblings += share(self.model, lambda: self._runner.run(inputs))
