"""Merged layers that receive the same activations and are computed together.

Queries, keys and values read one tensor, gate and up another. Names do not tell which layers do (the queries
of a cross-attention read something else than its keys), so :func:`share` looks at a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import ops
from .layers import MergedLinear
from .ops.dispatch import MAX_RANK

__all__ = ["Siblings", "share"]


class Siblings:
    """Computes the outputs of all its layers when the first of them is called.

    The outputs of the others wait for their calls with the same tensor. A call with another tensor starts
    anew: results do not depend on the layers being called together, only the time does.

    Args:
        layers: at least two, of the same tasks and input features, on one device.
    """

    def __init__(self, layers: Sequence[MergedLinear]) -> None:
        self.layers = tuple(layers)
        self._z: Tensor | None = None
        self._version = 0
        self._waiting: dict[MergedLinear, ops.Merged] = {}
        self._stack()

    def __call__(self, layer: MergedLinear, z: Tensor) -> ops.Merged:
        """Output of ``layer``, one of these, for ``z``."""
        if self._z is not z or self._version != _version(z) or layer not in self._waiting:
            self._compute(z)
        done = self._waiting.pop(layer)
        if not self._waiting:
            self._z = None
        return done

    def forget(self) -> None:
        """Drops the outputs that were not called for, because the pass ended before."""
        self._z = None
        self._waiting.clear()

    def _compute(self, z: Tensor) -> None:
        first = self.layers[0]
        if self.basis.device != first.basis.device or self.basis.dtype != first.basis.dtype:
            self._stack()
        target = next((one for one in self.layers if one.measures), first)
        done = ops.merged_siblings(
            z,
            self.basis,
            self.segment,
            [one.factors(z) for one in self.layers],
            num_tasks=len(first.tasks),
            task=target.own_segment(z),
            impl=first.impl,
        )
        self._z, self._version = z, _version(z)
        self._waiting = dict(zip(self.layers, done, strict=True))

    def _stack(self) -> None:
        self.basis = torch.cat([one.basis for one in self.layers])
        count = len(self.layers[0].tasks)
        self.segment = torch.cat([one.segment + s * count for s, one in enumerate(self.layers)])
        # The layers keep views of the shared matrix instead of second copies.
        ranks = [one.basis.shape[0] for one in self.layers]
        for one, basis in zip(self.layers, self.basis.split(ranks), strict=True):
            one.basis = basis


def share(model: nn.Module, run: Callable[[], object]) -> list[Siblings]:
    """From now on, merged layers that receive the same tensor one after the other are computed together.

    Args:
        model: with merged layers in it (:func:`nsc_fast.layers.install`).
        run: one forward pass of the model; its gradients are not recorded.

    Returns:
        The groups that were found. Layers that are in one already, that have other tasks than their
        neighbours, or that do not always receive the same tensor, stay alone.
    """
    layers = [m for m in model.modules() if isinstance(m, MergedLinear) and m.siblings is None]
    calls: list[list[MergedLinear]] = []
    latest: list[Tensor] = []

    def look(layer: nn.Module, args: tuple) -> None:
        # Only the tensor of the latest call is held.
        if not (latest and latest[0] is args[0]):
            calls.append([])
        calls[-1].append(layer)
        latest[:] = args[:1]

    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    partners: dict[MergedLinear, set[tuple[MergedLinear, ...]]] = {}
    for call in calls:
        for layer in call:
            partners.setdefault(layer, set()).add(tuple(call))
    found = []
    for call in dict.fromkeys(map(tuple, calls)):
        if len(set(call)) == len(call) and all(partners[layer] == {call} for layer in call):
            found += [Siblings(alike) for alike in _alike(call)]
    for group in found:
        for layer in group.layers:
            layer.siblings = group
    return found


def _alike(call: Sequence[MergedLinear]) -> list[list[MergedLinear]]:
    """The layers that can be computed together, in groups of at least two."""
    groups: dict[tuple, list[MergedLinear]] = {}
    for layer in call:
        basis = layer.basis
        groups.setdefault((layer.tasks, layer.impl, basis.device, basis.dtype), []).append(layer)
    return [
        group
        for group in groups.values()
        if len(group) > 1
        and (group[0].basis.device.type == "cpu" or sum(len(one.basis) for one in group) <= MAX_RANK)
    ]


def _version(z: Tensor) -> int:
    """Changes when the tensor is written to; tensors of inference mode do not tell."""
    return 0 if z.is_inference() else z._version
