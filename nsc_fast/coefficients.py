"""Merge coefficients: the only trainable tensors of a merge.

One value per (group, task), where the granularity decides the groups: the whole model (``task``), each block
(``layer``), each adapted module (``module``), or each singular direction of each module (``rank``). Or a core
between the stacked factors of each module (``core``): ``base(z) + C X Q z`` with X ``(R, R)``, of which all
others are special cases with a diagonal X. A full core can also take away what one adapter does on the inputs
of another; the merged update still has rank R at most.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from statistics import fmean
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .factors import Stack

__all__ = ["Coefficients", "Granularity", "block_of", "group_of"]

Granularity = Literal["task", "layer", "module", "rank", "core"]

_BLOCK = re.compile(r"^(.*?\.)?(\d+)(\.|$)")


def block_of(module: str) -> tuple[str, int] | None:
    """``("encoder.layer", 3)`` for ``"encoder.layer.3.attention.self.query"``; None outside blocks."""
    found = _BLOCK.match(module)
    return None if found is None else ((found[1] or "").rstrip("."), int(found[2]))


class Coefficients(nn.Module):
    """Trainable merge coefficients of a set of stacked modules.

    Args:
        stacks: module path -> stacked updates.
        tasks: all task names; the order of the coefficients.
        granularity: "task", "layer", "module", "rank" or "core".
        init: initial value, one for all or one per task; of a core, on its diagonal.
        dtype: float32, or float64 for a float64 model.

    A task that does not adapt a module has no coefficient there: with "module" and "rank" the tensors are
    ragged, with "task" and "layer" the entry is not read by that module.
    """

    def __init__(
        self,
        stacks: Mapping[str, Stack],
        tasks: Sequence[str],
        *,
        granularity: Granularity = "layer",
        init: float | Mapping[str, float] = 0.4,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if granularity not in get_args(Granularity):
            raise ValueError(f"granularity={granularity!r}: choose one of {', '.join(get_args(Granularity))}")
        self.granularity = granularity
        self.tasks = tuple(tasks)
        self._group = {module: group_of(module, granularity) for module in stacks}
        start = {t: float(init[t] if isinstance(init, Mapping) else init) for t in self.tasks}
        values = {}
        self._present = {m: [self.tasks.index(t) for t in s.tasks] for m, s in stacks.items()}
        self._ranks = {m: list(s.ranks) for m, s in stacks.items()}
        for module, group in self._group.items():
            stack = stacks[module]
            if granularity in ("task", "layer"):
                names: Sequence[str] = self.tasks
            elif granularity == "module":
                names = stack.tasks
            else:
                names = [t for t, r in zip(stack.tasks, stack.ranks, strict=True) for _ in range(r)]
            if group not in values:
                value = torch.tensor([start[t] for t in names], dtype=dtype)
                values[group] = nn.Parameter(torch.diag(value) if granularity == "core" else value)
        # Parameter names may not hold dots.
        self._key = {group: group.replace(".", "/") for group in values}
        self.values = nn.ParameterDict({self._key[g]: v for g, v in values.items()})
        self._picks: dict[tuple, Tensor] = {}

    def of(self, module: str) -> Tensor:
        """Of one module in the order of its stack: ``(K_m,)``; ``(R_m,)`` for "rank", square for "core"."""
        value = self.values[self._key[self._group[module]]]
        present = self._present[module]
        if self.granularity in ("module", "rank", "core") or len(present) == len(self.tasks):
            return value
        # One product per module: unlike indexing, its gradient is summed in a fixed order on every device.
        return self._pick(present, value) @ value

    def _pick(self, present: Sequence[int], value: Tensor) -> Tensor:
        """``(K_m, K)`` rows of the identity, kept for each device: making it anew waits for the host."""
        key = (*present, value.dtype, value.device)
        if key not in self._picks:
            # Made in inference mode, it could not be used in training.
            with torch.inference_mode(False):
                rows = torch.eye(len(self.tasks), dtype=value.dtype)[list(present)]
                self._picks[key] = rows.to(value.device)
        return self._picks[key]

    def of_task(self, task: str) -> list[Tensor]:
        """One task's coefficients at every module that it adapts, each ``(1,)``, or ``(r,)`` for "rank".

        Of a core, its part of the diagonal, ``(r,)``.
        """
        index = self.tasks.index(task)
        out = []
        for module, present in self._present.items():
            if index in present:
                out.append(_diagonal(self.of(module)).split(self._sizes(module))[present.index(index)])
        return out

    def _sizes(self, module: str) -> list[int]:
        """How many coefficients, or entries of a core's diagonal, each task has at the module."""
        if self.granularity in ("rank", "core"):
            return self._ranks[module]
        return [1] * len(self._present[module])

    def by_module(self) -> dict[str, Tensor]:
        """Detached copies for every module, on the CPU."""
        return {module: self.of(module).detach().cpu().clone() for module in self._group}

    def table(self) -> dict[str, dict[str, float]]:
        """Module -> task -> coefficient (mean over singular directions for "rank" and "core"), for logs."""
        # One copy to the host for all modules, of the numbers that are told.
        numbers = iter(torch.cat([_diagonal(self.of(module).detach()) for module in self._group]).tolist())
        out = {}
        for module in self._group:
            names = [self.tasks[i] for i in self._present[module]]
            means = [fmean(islice(numbers, size)) for size in self._sizes(module)]
            out[module] = dict(zip(names, means, strict=True))
        return out


def _diagonal(value: Tensor) -> Tensor:
    return value.diagonal() if value.ndim == 2 else value


def group_of(module: str, granularity: str) -> str:
    """Name of the group of modules that share their coefficients."""
    if granularity == "task":
        return "all"
    if granularity == "layer":
        block = block_of(module)
        # Modules outside the numbered blocks, a pooler for example, stand for themselves.
        return module if block is None else f"{block[0]}.{block[1]}".lstrip(".")
    return module
