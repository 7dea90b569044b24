"""Merges in closed form from second moments of the projected activations.

At one module, with the stacked canonical factors C ``(d_out, R)`` and Q ``(R, d_in)``, ``P = Q z`` and
``M_k = E[P P^T]`` over task k's tokens under adapter k alone, the merged update ``C X Q`` that is nearest to
what every adapter does on its own task's inputs minimises

    sum_k w_k E || C X P - C_k P_k ||^2,     w_k = 1 / E || C_k P_k ||^2.

E_k keeps block k, so that ``C_k P_k = C E_k P``. A minimiser, with a ridge that pulls toward X_0, is

    X = (sum_k w_k E_k M_k + rho X_0) (sum_k w_k M_k + rho I)^-1.

This is RegMean (Jin et al., ICLR 2023) restricted to the span of the adapters: nothing of size d_in x d_in is
formed. With X diagonal and one value per task it is a K x K system for the merge coefficients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Batch, token_batch
from ..driver import backbone, forward_options
from ..dtypes import compute_dtype
from ..errors import MergeError
from ..factors import LowRankUpdate, Stack
from ..layers import model_device, stack_adapters
from ..packing import parts
from ..targets import routed, tokens_of
from .running import evaluating, on_device

__all__ = ["Moments", "Projections", "coefficients", "core", "second_moments"]


@dataclass(frozen=True)
class Moments:
    """Of the projections at every module.

    Attributes:
        stacks: module path -> stacked factors, float64.
        values: module path -> task -> ``E[P P^T]``, ``(R, R)`` float64 on the CPU, for the tasks that adapt
            the module. A task has none at an expert to which no token of it was routed, nor, without images,
            at a vision tower.
        passes: forward passes over the sampled rows: one.
    """

    stacks: Mapping[str, Stack]
    values: Mapping[str, Mapping[str, Tensor]]
    passes: float = 1.0

    def energy(self, module: str, task: str) -> float:
        """``E ||C_k P_k||^2``: what adapter k alone adds to the module's output on its own inputs."""
        part = self.block(module, task)
        gram = _gram(self.stacks[module])[part, part]
        return float((gram * self.values[module][task][part, part]).sum())

    def block(self, module: str, task: str) -> slice:
        """Rows of the stack that belong to a task."""
        stacked = self.stacks[module]
        k = stacked.tasks.index(task)
        start = sum(stacked.ranks[:k])
        return slice(start, start + stacked.ranks[k])


def second_moments(
    model: nn.Module,
    updates: Mapping[str, Mapping[str, LowRankUpdate]],
    batches: Mapping[str, Iterable[Batch]],
    *,
    micro_batch: int | None = None,
) -> Moments:
    """One forward pass over every task's rows with the task's own adapter; no gradient.

    Args:
        model: base model; unchanged when the function returns.
        updates: task -> module path -> canonical update.
        batches: task -> batches; padding does not count.
        micro_batch: sequences in one pass at most.

    Which of the tokens that come to an expert of a mixture are padding is not known: all count there.

    Raises:
        MergeError: activations that are not finite, or a module that did not run; names it.
    """
    stacks = stack_adapters(updates)
    device = model_device(model)
    runner = backbone(model, tuple(stacks))
    options = forward_options(runner)
    values: dict[str, dict[str, Tensor]] = {module: {} for module in stacks}
    for task in updates:
        own = Projections(task, stacks)
        with evaluating(model), own.installed(model):
            for part in (part for batch in batches[task] for part in parts(batch, micro_batch)):
                moved = on_device(part, device)
                own.tokens = token_batch(moved, 0, device)
                runner(**moved, **options)
        for module, stacked in stacks.items():
            if task in stacked.tasks and (own.ran(module) or not own.may_idle(module)):
                values[module][task] = own.moment(module)
    return Moments(stacks, values)


class Projections:
    """Runs one adapter and adds up the outer products of all adapters' projections: P is formed once."""

    def __init__(self, task: str, stacks: Mapping[str, Stack]) -> None:
        self.task = task
        self.tokens: Any = None
        self._stacks = {m: s for m, s in stacks.items() if task in s.tasks}
        self.experts = frozenset(routed(self._stacks))
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._handles: list[Any] = []
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    def installed(self, model: nn.Module) -> Projections:
        for module in self._stacks:
            hook = self._hook(module)
            self._handles.append(model.get_submodule(module).register_forward_hook(hook, with_kwargs=True))
        return self

    def __enter__(self) -> Projections:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def held(self) -> list[Tensor]:
        """What stays on the device until all rows have passed: factors and sums."""
        return [*(factor for pair in self._factors.values() for factor in pair), *self._sums.values()]

    def ran(self, module: str) -> bool:
        """Whether any token came to a module."""
        return module in self._sums

    def may_idle(self, module: str) -> bool:
        """Whether it is nothing unusual that no token comes to a module."""
        return module in self.experts or tokens_of(module) == "other"

    def moment(self, module: str) -> Tensor:
        """``(R, R)`` float64 on the CPU."""
        if module not in self._sums:
            raise MergeError(f"module {module!r} did not run on the data of task {self.task!r}")
        value = (self._sums[module] / self._weights[module]).cpu()
        if not bool(torch.isfinite(value).all()):
            raise MergeError(
                f"the activations of task {self.task!r} at {module!r} are not finite; load the base model in "
                "float32, and look for damaged rows in the data"
            )
        return value

    def _hook(self, module: str) -> Any:
        stacked = self._stacks[module]
        k = stacked.tasks.index(self.task)
        own = slice(sum(stacked.ranks[:k]), sum(stacked.ranks[: k + 1]))

        def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
            z = args[0] if args else next(iter(kwargs.values()))
            wide = compute_dtype(z.dtype)
            if module not in self._factors:
                self._factors[module] = (
                    stacked.basis.to(z.device, wide),
                    stacked.columns[:, own].to(z.device, wide),
                )
            basis, columns = self._factors[module]
            p = z.to(wide) @ basis.T
            rows = p.reshape(-1, p.shape[-1])
            if module not in self.experts:
                _, weight = self.tokens.tokens(z.shape[:-1], module)
                rows = rows[weight.to(p.device) > 0]
            if not len(rows):
                return output
            rows = rows.to(torch.float64)
            product = rows.T @ rows
            if module in self._sums:
                self._sums[module] += product
            else:
                self._sums[module] = product
            self._weights[module] = self._weights.get(module, 0.0) + len(rows)
            return output + (p[..., own] @ columns.T).to(output.dtype)

        return hook


def _gram(stacked: Stack) -> Tensor:
    """``C^T C``, ``(R, R)`` float64 on the CPU."""
    return (stacked.columns.T @ stacked.columns).cpu()


def _weights(moments: Moments, module: str) -> dict[str, float]:
    """w_k; a task whose adapter adds nothing here has no wish either."""
    energies = {task: moments.energy(module, task) for task in moments.values[module]}
    return {task: 1 / energy if energy > 0 else 0.0 for task, energy in energies.items()}


def core(moments: Moments, module: str, *, ridge: float, toward: Mapping[str, float]) -> Tensor:
    """X of the merged update ``C X Q``, ``(R, R)`` float64.

    Args:
        ridge: rho relative to the mean diagonal entry of ``sum_k w_k M_k``.
        toward: task -> merge coefficient on the diagonal of X_0.
    """
    stacked, own = moments.stacks[module], moments.values[module]
    weights = _weights(moments, module)
    size = sum(stacked.ranks)
    total = torch.zeros(size, size, dtype=torch.float64)
    wished = torch.zeros_like(total)
    for task, moment in own.items():
        part = moments.block(module, task)
        total += weights[task] * moment
        wished[part] += weights[task] * moment[part]
    rho = ridge * float(total.diagonal().mean())
    start = stacked.expand(torch.tensor([toward[t] for t in stacked.tasks], dtype=torch.float64))
    if not own:
        # No token came here: nothing is known.
        return torch.diag(start)
    if rho == 0:
        # Without a ridge the system may be singular: the shortest minimiser.
        return wished @ torch.linalg.pinv(total, hermitian=True)
    wished += rho * torch.diag(start)
    total += rho * torch.eye(size, dtype=torch.float64)
    return torch.linalg.solve(total, wished, left=False)


def coefficients(
    moments: Moments, modules: Sequence[str], *, ridge: float, toward: Mapping[str, float]
) -> dict[str, float]:
    """Task -> merge coefficient, the same at all ``modules``.

    Args:
        ridge: relative to the mean diagonal entry of the system.
        toward: task -> value that the ridge pulls toward.
    """
    tasks = list(dict.fromkeys(t for m in modules for t in moments.stacks[m].tasks))
    total = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    wished = torch.zeros(len(tasks), dtype=torch.float64)
    for module in modules:
        stacked = moments.stacks[module]
        gram, weights = _gram(stacked), _weights(moments, module)
        place = [tasks.index(t) for t in stacked.tasks]
        for task, moment in moments.values[module].items():
            products = (gram * moment).split(list(stacked.ranks))
            inner = torch.stack(
                [
                    torch.stack([part.sum() for part in row.split(list(stacked.ranks), dim=1)])
                    for row in products
                ]
            )
            for i, a in enumerate(place):
                for j, b in enumerate(place):
                    total[a, b] += weights[task] * inner[i, j]
                wished[a] += weights[task] * inner[i, stacked.tasks.index(task)]
    start = torch.tensor([toward[t] for t in tasks], dtype=torch.float64)
    if not any(moments.values[module] for module in modules):
        return dict(zip(tasks, start.tolist(), strict=True))
    rho = ridge * float(total.diagonal().mean())
    if rho == 0:
        return dict(zip(tasks, (torch.linalg.pinv(total, hermitian=True) @ wished).tolist(), strict=True))
    total += rho * torch.eye(len(tasks), dtype=torch.float64)
    return dict(zip(tasks, torch.linalg.solve(total, wished + rho * start).tolist(), strict=True))
