"""MergedLinear: a frozen base layer and K adapters under trainable merge coefficients.

``install`` puts one around every adapted module of a model, ``remove`` takes them out again and leaves the
model as it was. The merged weight is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from . import ops
from .coefficients import Coefficients, Granularity
from .dense import bind, release
from .dtypes import compute_dtype
from .factors import LowRankUpdate, Stack, stack
from .memory import EndOfPass
from .monitor import RatioMonitor
from .ops import buffers, dispatch

if TYPE_CHECKING:
    from .siblings import Siblings

__all__ = [
    "Installation",
    "MergedLinear",
    "features",
    "install",
    "layer_device",
    "model_device",
    "remove",
    "stack_adapters",
]


def features(layer: nn.Module) -> tuple[int, int] | None:
    """``(d_out, d_in)`` of a linear-like layer; None for anything else.

    Knows ``nn.Linear`` and its quantised relatives by ``in_features``/``out_features`` and transformers'
    ``Conv1D`` by ``nx``/``nf``.
    """
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return int(layer.out_features), int(layer.in_features)
    if hasattr(layer, "nx") and hasattr(layer, "nf"):
        return int(layer.nf), int(layer.nx)
    return None


class AroundLayer(nn.Module):
    """Stands in the place of a layer, ``base``, and shows its weight and bias."""

    base: nn.Module

    @property
    def weight(self) -> Tensor:
        """The base layer's; some models (T5) ask a layer for the dtype of its weight."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        return self.base.bias


class MergedLinear(AroundLayer):
    """``base(z) + sum_k lambda_k s_k B_k A_k z`` with trainable lambda.

    Args:
        base: the frozen layer; anything callable with in/out features. Its parameters stop requiring
            gradients.
        stacked: the updates of all tasks at this module.
        coefficients: returns the coefficients, ``(K,)`` per task or ``(R,)`` per singular direction.
        name: module path, for messages and the monitor.
        monitor: collects the null-space ratio when this is a target module.
        dtype: dtype of the stored factors. Default: the layer's, at least float32.
        impl: "auto", "triton" or "torch".

    Shape:
        ``(..., d_in)`` to ``(..., d_out)``.
    """

    def __init__(
        self,
        base: nn.Module,
        stacked: Stack,
        coefficients: Callable[[], Tensor],
        *,
        name: str = "",
        monitor: RatioMonitor | None = None,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        _check_fit(name, base, stacked)
        self.base = base.requires_grad_(False)
        weight = getattr(base, "weight", None)
        device = None if weight is None else layer_device(base)
        if dtype is None:
            dtype = torch.float32 if weight is None else compute_dtype(weight.dtype)
        self.register_buffer("basis", stacked.basis.to(device, dtype), persistent=False)
        self.register_buffer("columns", stacked.columns.to(device, dtype), persistent=False)
        self.register_buffer("segment", stacked.segment.to(device), persistent=False)
        self.tasks = stacked.tasks
        self.ranks = stacked.ranks
        self.name = name
        self.impl = impl
        self.monitor = monitor
        self.siblings: Siblings | None = None
        self._coefficients = coefficients
        # The plain layers, whose product can accumulate onto ours. Anything else (quantised, hooked, ...) is
        # called and stays in the autograd graph.
        self._plain = (type(base) is nn.Linear or type(base).__name__ == "Conv1D") and not _wrapped(weight)

    def forward(self, z: Tensor) -> Tensor:
        together = self.siblings is not None and not torch.compiler.is_compiling()
        layers = self.siblings.layers if together else (self,)
        if any(one.ends_pass for one in layers):
            _end_pass(z, layers)
        merged = self.siblings(self, z) if together else self._alone(z)
        if self.measures and merged.omega is not None:
            self.monitor.record(self.name, z, merged.omega)
            # A module that runs more than once passes its outputs on, all but the last time.
            if self.monitor.recording and self.monitor.latest_call == self.monitor.last:
                raise EndOfPass
        return merged.y

    @property
    def measures(self) -> bool:
        """Whether the null-space ratio is wanted here and now."""
        return self.monitor is not None and self.monitor.active

    @property
    def ends_pass(self) -> bool:
        """Whether nothing is wanted of a pass any more once the ratio of this module is known."""
        return self.measures and self.monitor.last == (self.name, 1)

    def own_segment(self, z: Tensor) -> Tensor | None:
        """``(N,)`` int32, position of each token's task in the stack; None where no ratio is wanted."""
        return self.monitor.own_segment(self.name, z) if self.measures else None

    def factors(self, z: Tensor) -> ops.Sibling:
        """What the operation needs beside the basis."""
        own = self.columns, self.segment, self._coefficients().to(z.device)
        if self._plain and not _hooked(self.base):
            weight = self.base.weight
            return ops.Sibling(*own, weight if type(self.base) is nn.Linear else weight.t(), self.base.bias)
        return ops.Sibling(*own, y=lambda: self.base(z))

    def _alone(self, z: Tensor) -> ops.Merged:
        how = {"num_tasks": len(self.tasks), "task": self.own_segment(z), "impl": self.impl}
        return ops.merged_siblings(z, self.basis, self.segment, (self.factors(z),), **how)[0]

    def extra_repr(self) -> str:
        return f"tasks={list(self.tasks)}, rank={self.basis.shape[0]}, impl={self.impl!r}"


def _end_pass(z: Tensor, layers: Sequence[MergedLinear]) -> NoReturn:
    """Records the ratios of layers that receive z, without their outputs, for which nothing waits."""
    for layer in layers:
        if layer.measures:
            own = layer.own_segment(z).long()[:, None]
            omega = ops.null_space_ratio(z, layer.basis, ranks=layer.ranks, impl=layer.impl)
            omega = omega.view(-1, len(layer.ranks)).gather(1, own.clamp(min=0)).masked_fill(own < 0, 1.0)
            layer.monitor.record(layer.name, z, omega.squeeze(1))
    raise EndOfPass


def _wrapped(weight: Tensor) -> bool:
    """Whether a weight is other tensors in the guise of one: torchao's quantised weights in a plain layer."""
    return hasattr(weight, "__tensor_flatten__")


def layer_device(layer: nn.Module) -> torch.device:
    """Where a layer computes. Weights that wait elsewhere (accelerate) are on "meta"; their hook knows."""
    device = layer.weight.device
    if device.type == "meta" and hasattr(layer, "_hf_hook"):
        device = torch.device(getattr(layer._hf_hook, "execution_device", None) or "cpu")
    return device


def _hooked(layer: nn.Module) -> bool:
    """Whether calling the layer does more than its class says: hooks, or a forward of its own (offload)."""
    return bool(
        layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_pre_hooks
        or layer._backward_hooks
        or "forward" in layer.__dict__
    )


def _check_fit(name: str, base: nn.Module, stacked: Stack) -> None:
    shape = features(base)
    update = (stacked.columns.shape[0], stacked.basis.shape[1])
    if shape is None:
        raise TypeError(
            f"module {name!r} ({type(base).__name__}) has no in/out features: it is not a linear layer"
        )
    if shape != update:
        raise ValueError(
            f"module {name!r} is {shape[0]} x {shape[1]} in the base model, "
            f"the adapters' updates are {update[0]} x {update[1]}"
        )


def _check_impl(impl: str, name: str, rank: int, device: torch.device, dtype: torch.dtype) -> None:
    try:
        dispatch.resolve(impl, device, dtype, rank)
    except RuntimeError as error:
        raise ValueError(f"module {name!r} ({rank} ranks of all adapters, {dtype}): {error}") from error


@dataclass(frozen=True)
class Installation:
    """What ``install`` put into a model: the trainable coefficients and the monitor of the ratios."""

    coefficients: Coefficients
    monitor: RatioMonitor
    modules: tuple[str, ...]


def stack_adapters(adapters: Mapping[str, Mapping[str, LowRankUpdate]]) -> dict[str, Stack]:
    """Task -> module -> update to module -> stack, in the order of first appearance."""
    modules = list(dict.fromkeys(m for updates in adapters.values() for m in updates))
    return {m: stack([(task, u[m]) for task, u in adapters.items() if m in u]) for m in modules}


def install(
    model: nn.Module,
    adapters: Mapping[str, Mapping[str, LowRankUpdate]],
    *,
    targets: Sequence[str] = (),
    granularity: Granularity = "layer",
    init: float | Mapping[str, float] = 0.4,
    preferences: Mapping[str, float] | None = None,
    impl: str = "auto",
) -> Installation:
    """Puts a :class:`MergedLinear` around every adapted module of ``model``.

    Args:
        model: the base model; all its parameters stop requiring gradients.
        adapters: task -> module path -> canonical update (``Adapter.canonical()``).
        targets: modules whose null-space ratio enters the loss.
        granularity, init: see :class:`nsc_fast.coefficients.Coefficients`.
        preferences: pi per task; normalised to sum 1. Default: equal.
        impl: "auto", "triton" or "torch".

    Raises:
        ValueError: a module is missing in the model, of another shape, already installed, or more than the
            kernels take where they were asked for; a target is not adapted, or the preferences name other
            tasks.
        TypeError: a module is not a linear layer. The model is unchanged after either.
    """
    stacks = stack_adapters(adapters)
    present = dict(model.named_modules())
    if any(isinstance(m, MergedLinear) for m in present.values()):
        raise ValueError("the model already holds merged layers: call remove(model) first")
    missing = [m for m in stacks if m not in present]
    if missing:
        raise ValueError(
            f"module {missing[0]!r} of adapter {stacks[missing[0]].tasks[0]!r} does not exist in "
            f"{type(model).__name__} ({len(missing)} missing in all)"
        )
    for target in targets:
        if target not in stacks:
            raise ValueError(f"target module {target!r} is adapted by no adapter")
    device = model_device(model)
    sample = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    wide = compute_dtype(sample.dtype)
    for name, stacked in stacks.items():
        _check_fit(name, present[name], stacked)
        if impl != "auto":
            _check_impl(impl, name, stacked.basis.shape[0], device, wide)
    tasks = tuple(adapters)
    if preferences is not None and set(preferences) != set(tasks):
        odd = sorted(set(preferences) ^ set(tasks))
        raise ValueError(f"preferences must name every task once; look at {', '.join(map(repr, odd))}")
    weights = [1.0 if preferences is None else float(preferences[t]) for t in tasks]
    monitor = RatioMonitor(
        tasks, tuple(w / sum(weights) for w in weights), {m: stacks[m].tasks for m in targets}
    )
    coefficients = Coefficients(stacks, tasks, granularity=granularity, init=init, dtype=wide)
    # Parameters on fake tensors, of which memory is planned, cannot be moved.
    if device.type != "cpu":
        coefficients.to(device)
    layers = {
        name: MergedLinear(
            present[name],
            stacked,
            lambda name=name: coefficients.of(name),
            name=name,
            monitor=monitor if name in monitor.targets else None,
            impl=impl,
        )
        for name, stacked in stacks.items()
    }
    model.requires_grad_(False)
    for name, layer in layers.items():
        replace_module(model, name, layer)
    bind(model, coefficients)
    return Installation(coefficients, monitor, tuple(layers))


def remove(model: nn.Module) -> None:
    """Takes every :class:`MergedLinear` out of ``model``; the base layers are the same objects as before."""
    release(model)
    buffers.release()
    for name, module in list(model.named_modules()):
        if isinstance(module, MergedLinear):
            replace_module(model, name, module.base)


def model_device(model: nn.Module) -> torch.device:
    """Where a model's inputs go: its first weight's device, leaving out those that are offloaded ("meta")."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module at a path of the model."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
