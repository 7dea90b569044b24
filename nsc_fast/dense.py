"""Modules that were trained whole (PEFT's ``modules_to_save``), merged as dense updates.

    W = W0 + sum_k c_k (W_k - W0)        for every parameter of the module, biases too

c_k is the task's coefficient: the mean of its coefficients over the modules that its LoRA adapts. While
coefficients are optimised the module runs with their present values and its gradient reaches them, so that
the merge that is written is the one that was optimised. Heads are never merged: their outputs mean something
else in every task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .coefficients import Coefficients
from .dtypes import compute_dtype
from .errors import MergeError

if TYPE_CHECKING:
    from .factors import LowRankUpdate

__all__ = ["DenseMerge", "bind", "dense_applied", "merge_dense", "release", "without_coefficients"]

Deltas = Mapping[str, Mapping[str, Tensor]]
"""Task -> parameter path -> ``W_k - W0``."""


@dataclass(frozen=True)
class DenseMerge:
    """Merged modules as they are written.

    Attributes:
        modules: path -> name below it -> merged value of every tensor; none inside another.
        coefficients: task -> c_k.
    """

    modules: Mapping[str, Mapping[str, Tensor]]
    coefficients: Mapping[str, float]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Path in the base model -> merged tensor."""
        return {f"{m}.{name}": tensor for m, own in self.modules.items() for name, tensor in own.items()}

    def notice(self) -> str:
        """What was done, for people."""
        told = ", ".join(f"{task} {value:.3g}" for task, value in self.coefficients.items())
        return (
            f"{len(self.modules)} modules that were trained whole ({', '.join(list(self.modules)[:3])}"
            f"{', ...' if len(self.modules) > 3 else ''}) are merged as dense updates with the coefficients "
            f"{told} and written as modules_to_save, which PEFT loads and most LoRA servers do not"
        )


class _Present:
    """The coefficients of the moment: those of an installation, or the last known ones."""

    def __init__(self, start: Mapping[str, float]) -> None:
        self.values = {task: torch.tensor(value) for task, value in start.items()}
        self.live: Coefficients | None = None

    def of(self, task: str) -> Tensor:
        if self.live is None:
            return self.values[task]
        # In an installation of one task alone, the others are not there.
        return mean_coefficient(self.live, task) if task in self.live.tasks else torch.zeros(())


def mean_coefficient(coefficients: Coefficients, task: str) -> Tensor:
    """Mean of a task's coefficients over the modules that it adapts; differentiable."""
    return torch.stack([part.mean() for part in coefficients.of_task(task)]).mean()


class _Merged(nn.Module):
    """Parametrisation ``W0 -> W0 + sum_k c_k (W_k - W0)``."""

    def __init__(self, deltas: Mapping[str, Tensor], present: _Present) -> None:
        super().__init__()
        self.tasks = tuple(deltas)
        self.present = present
        for i, delta in enumerate(deltas.values()):
            self.register_buffer(f"delta_{i}", delta, persistent=False)

    def forward(self, base: Tensor) -> Tensor:
        merged = base.to(self.delta_0.dtype)
        for i, task in enumerate(self.tasks):
            delta = getattr(self, f"delta_{i}")
            merged = merged + self.present.of(task).to(delta) * delta
        return merged.to(base.dtype)


@contextmanager
def dense_applied(
    model: nn.Module | None, deltas: Deltas, start: Mapping[str, float]
) -> Iterator[nn.Module | None]:
    """The model with the dense updates in it, while the block runs; unchanged afterwards.

    Args:
        model: the base model.
        deltas: of :func:`nsc_fast.adapters.dense_updates`; nothing happens without any.
        start: coefficient of each task until an installation's are bound.
    """
    paths = dict.fromkeys(path for own in deltas.values() for path in own)
    present = _Present({task: float(start[task]) for task in deltas})
    done: list[tuple[nn.Module, str, list[str]]] = []
    try:
        for path in paths:
            owner, _, name = path.rpartition(".")
            module = model.get_submodule(owner)
            own = {task: tensors[path] for task, tensors in deltas.items() if path in tensors}
            order = list(module._parameters)
            parametrize.register_parametrization(module, name, _Merged(own, present), unsafe=True)
            done.append((module, name, order))
        yield model
    finally:
        for module, name, order in reversed(done):
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            # It comes back as the last parameter of its module.
            for other in order:
                module._parameters[other] = module._parameters.pop(other)


def _presents(model: nn.Module) -> list[_Present]:
    return list({id(m.present): m.present for m in model.modules() if isinstance(m, _Merged)}.values())


def bind(model: nn.Module, coefficients: Coefficients) -> None:
    """Dense updates in the model follow these coefficients, as far as they are of the same tasks."""
    for present in _presents(model):
        if any(task in present.values for task in coefficients.tasks):
            present.live = coefficients


def release(model: nn.Module) -> None:
    """They keep the last values of the coefficients of all tasks."""
    for present in _presents(model):
        live, present.live = present.live, None
        if live is not None and set(present.values) <= set(live.tasks):
            present.values = {task: mean_coefficient(live, task).detach() for task in present.values}


def merge_dense(
    model: nn.Module,
    deltas: Deltas,
    method: str,
    coefficients: Mapping[str, Tensor] | None,
    stack_tasks: Mapping[str, tuple[str, ...]] | None,
    updates: Mapping[str, Mapping[str, LowRankUpdate]],
) -> DenseMerge:
    """The merged modules, with the coefficients that a method found.

    Args:
        model: the base model.
        deltas: of :func:`nsc_fast.adapters.dense_updates`.
        method: its name, for messages.
        coefficients, stack_tasks: of its result.
        updates: task -> module path -> update that the method merged.

    Raises:
        MergeError: the method has no coefficients.
    """
    if not coefficients or not stack_tasks:
        raise without_coefficients(method, deltas)
    parts: dict[str, list[Tensor]] = {task: [] for task in deltas}
    for module, value in coefficients.items():
        tasks = stack_tasks[module]
        each = len(value) == len(tasks)
        sizes = [1] * len(tasks) if each else [updates[t][module].rank for t in tasks]
        for task, part in zip(tasks, value.split(sizes), strict=True):
            if task in parts:
                parts[task].append(part.mean())
    chosen = {task: float(torch.stack(own).mean()) for task, own in parts.items()}
    modules: dict[str, dict[str, Tensor]] = {}
    for owner in _owners(model, deltas):
        modules[owner] = {}
        for name, tensor in model.get_submodule(owner).state_dict().items():
            path = f"{owner}.{name}"
            merged = tensor.detach().to("cpu", copy=True)
            if any(path in own for own in deltas.values()):
                wide = merged.to(torch.float64)
                for task, own in deltas.items():
                    if path in own:
                        wide += chosen[task] * own[path].to("cpu", torch.float64)
                merged = wide.to(compute_dtype(merged.dtype))
            modules[owner][name] = merged
    return DenseMerge(modules, chosen)


def without_coefficients(method: str, deltas: Deltas) -> MergeError:
    """The error that a method gives no coefficients for whole modules."""
    return MergeError(
        f"method {method!r} has no coefficients, with which modules trained whole could be merged "
        f"(modules_to_save = merge-dense: {_first(deltas)}); choose 'nsc', 'task_arithmetic' or 'anchored' "
        "with granularity: module, or keep-separate or drop"
    )


def _owners(model: nn.Module, deltas: Deltas) -> tuple[str, ...]:
    """The modules whose parameters are merged, the outermost of nested ones."""
    owners = dict.fromkeys(path.rpartition(".")[0] for own in deltas.values() for path in own)
    return tuple(o for o in owners if not any(o.startswith(other + ".") for other in owners))


def _first(deltas: Deltas) -> str:
    return next(path for own in deltas.values() for path in own).rpartition(".")[0]
