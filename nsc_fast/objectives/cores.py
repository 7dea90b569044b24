"""A trainable core between the stacked factors: ``base(z) + C X Q z`` with X ``(R, R)`` at every module.

Merge coefficients are the special case of a diagonal X with one value per adapter. A full core can also take
away what one adapter does on the inputs of another; the merged update ``C X Q`` still has rank R at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..factors import LowRankUpdate, Stack, canonical
from ..layers import AroundLayer, layer_device, model_device, replace_module, stack_adapters

__all__ = ["CoreInstallation", "Cores", "install_cores", "remove_cores"]


class Cores(nn.Module):
    """The cores of all modules.

    Args:
        stacks: module path -> stacked factors.
        init: task -> merge coefficient on the diagonal at the start.
        dtype: float32, or float64 for a float64 model.
    """

    def __init__(self, stacks: Mapping[str, Stack], init: Mapping[str, float], dtype: torch.dtype) -> None:
        super().__init__()
        self._stacks = dict(stacks)
        # Parameter names may not hold dots.
        self._key = {module: module.replace(".", "/") for module in stacks}
        self.values = nn.ParameterDict(
            {self._key[m]: nn.Parameter(torch.diag(_start(s, init)).to(dtype)) for m, s in stacks.items()}
        )

    def of(self, module: str) -> Tensor:
        """X of one module."""
        return self.values[self._key[module]]

    def table(self) -> dict[str, dict[str, float]]:
        """Module -> task -> mean of the task's part of the diagonal, for logs."""
        return {
            module: {
                task: float(part.mean())
                for task, part in zip(
                    stacked.tasks, self.of(module).detach().diagonal().split(list(stacked.ranks)), strict=True
                )
            }
            for module, stacked in self._stacks.items()
        }

    def updates(self) -> dict[str, LowRankUpdate]:
        """Module -> merged update ``C X Q`` in canonical form."""
        return {
            module: canonical(
                stacked.basis,
                stacked.columns @ self.of(module).detach().to(stacked.columns.device, torch.float64),
            )
            for module, stacked in self._stacks.items()
        }


def _start(stacked: Stack, init: Mapping[str, float]) -> Tensor:
    return stacked.expand(torch.tensor([init[task] for task in stacked.tasks], dtype=torch.float64))


class CoreLinear(AroundLayer):
    """A frozen layer with the low-rank term added; gradients go to the input and to the core alone."""

    def __init__(self, base: nn.Module, stacked: Stack, core: nn.Parameter) -> None:
        super().__init__()
        self.base = base
        weight = getattr(base, "weight", None)
        device = core.device if weight is None else layer_device(base)
        self.register_buffer("basis", stacked.basis.to(device, core.dtype), persistent=False)
        self.register_buffer("columns", stacked.columns.to(device, core.dtype), persistent=False)
        # In a list: the parameter belongs to Cores.
        self._core = [core]

    def forward(self, z: Tensor) -> Tensor:
        y = self.base(z)
        core = self._core[0].to(z.device)
        low = ((z.to(core.dtype) @ self.basis.T) @ core.T) @ self.columns.T
        return y + low.to(y.dtype)


@dataclass(frozen=True)
class CoreInstallation:
    """What ``install_cores`` put into a model."""

    coefficients: Cores
    modules: tuple[str, ...]


def install_cores(
    model: nn.Module, updates: Mapping[str, Mapping[str, LowRankUpdate]], init: Mapping[str, float]
) -> CoreInstallation:
    """Puts a :class:`CoreLinear` around every adapted module; all parameters of the model are frozen."""
    stacks = stack_adapters(updates)
    sample = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    wide = torch.float64 if sample.dtype == torch.float64 else torch.float32
    cores = Cores(stacks, init, wide).to(model_device(model))
    model.requires_grad_(False)
    for module, stacked in stacks.items():
        replace_module(model, module, CoreLinear(model.get_submodule(module), stacked, cores.of(module)))
    return CoreInstallation(cores, tuple(stacks))


def remove_cores(model: nn.Module) -> None:
    """Takes every :class:`CoreLinear` out; the base layers are the same objects as before."""
    for name, module in list(model.named_modules()):
        if isinstance(module, CoreLinear):
            replace_module(model, name, module.base)
