"""What the null-space ratio can tell on the data at hand, measured before anything is optimised.

The objective of null-space compression trusts that an adapter's row space holds more of the activations of
its own task than a subspace of the same size would by chance. For every task k this module measures the mean
ratio on the task's own unlabeled rows

    base       in the base model
    alone      under adapter k alone: the level that training reached
    initial    under the merge that the optimisation starts from
    final      under the merge that it ends with

beside ``random = sqrt(1 - r / d)``, the expectation for a random subspace of rank r in d dimensions, and

    strength = (1 - alone^2) / (1 - random^2)

the energy of the activations inside the row space, in units of what chance puts there. At strength 1 the
ratio says nothing about the task; a final ratio below ``alone`` is lower than training itself made it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch, length_of, token_batch
from .driver import backbone, forward_options
from .dtypes import compute_dtype
from .factors import LowRankUpdate
from .layers import model_device
from .objectives.running import adapted, evaluating, on_device, watched

__all__ = ["WEAK", "Signal", "SignalProbe", "signal_lines"]

WEAK = 2.0
"""Strength below which a task's ratio is reported as weak: less than twice what chance gives.

A convention, not a law: of the demo's adapters three have 2.5 to 3.5 and one, trained least, 1.4.
"""

# Mean ratios and shares of energy of one task's rows at one module, one value per task of the module.
_Means = dict[str, dict[str, tuple[float, float]]]


@dataclass(frozen=True)
class Signal:
    """Mean ratios over each task's target modules and its sampled rows.

    Attributes:
        random, base, alone, initial, final: task -> ratio; ``final`` is empty until the merge is made.
        modules: module -> task -> kind -> ratio.
        sees: task j -> adapter k -> mean share of the energy of j's activations, under adapter j alone, that
            lies inside the row space of adapter k.
        tokens: task -> tokens that were measured, without padding.
    """

    random: Mapping[str, float]
    base: Mapping[str, float]
    alone: Mapping[str, float]
    initial: Mapping[str, float]
    modules: Mapping[str, Mapping[str, Mapping[str, float]]]
    sees: Mapping[str, Mapping[str, float]]
    tokens: Mapping[str, int]
    final: Mapping[str, float] = field(default_factory=dict)

    @property
    def strength(self) -> dict[str, float]:
        """``(1 - alone^2) / (1 - random^2)`` per task."""
        return {
            task: (1 - alone**2) / (1 - self.random[task] ** 2) if self.random[task] < 1 else float("nan")
            for task, alone in self.alone.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts of numbers, for :attr:`nsc_fast.result.MergeResult.signal`."""
        return {
            "random": dict(self.random),
            "base": dict(self.base),
            "alone": dict(self.alone),
            "initial": dict(self.initial),
            "final": dict(self.final),
            "strength": self.strength,
            "modules": {m: {t: dict(kinds) for t, kinds in own.items()} for m, own in self.modules.items()},
            "sees": {task: dict(own) for task, own in self.sees.items()},
            "tokens": dict(self.tokens),
        }

    def notices(self) -> tuple[str, ...]:
        """What the user should know: weak signals, ratios below what training reached, by task."""
        out = [
            f"none of the modules that are looked at runs on the rows of task {task!r}: its ratio is "
            "unknown, and minimising ratios does not serve it; check its data, or choose other modules "
            "(parameters.scope)"
            for task in self.tokens
            if task not in self.alone
        ]
        for task, strength in self.strength.items():
            if strength < WEAK:
                out.append(
                    f"the null-space ratio says little about task {task!r}: its adapter alone has "
                    f"{self.alone[task]:.3f}, a random subspace {self.random[task]:.3f} (strength "
                    f"{strength:.2f}). Minimising it is no evidence that the merge serves this task; compare "
                    "with 'task_arithmetic'"
                )
        low = [
            f"{task!r} ({self.final[task]:.3f}, alone {alone:.3f})"
            for task, alone in self.alone.items()
            if self.final.get(task, 1.0) < alone - _MARGIN
        ]
        if low:
            out.append(
                f"the ratio of {', '.join(low)} went below that of the adapter alone: the coefficients "
                "serve the objective more than the task. Use a smaller learning rate, fewer steps, or "
                "stop_at_alone: true"
            )
        return tuple(out)


def signal_lines(signal: Mapping[str, Any]) -> list[str]:
    """What :meth:`Signal.to_dict` gave, one line a task, for people."""
    kinds = [kind for kind in ("random", "base", "alone", "initial", "final") if signal[kind]]
    return [
        f"{task}: "
        + ", ".join(f"{kind} {signal[kind][task]:.3f}" for kind in kinds)
        + f", strength {strength:.2f}"
        for task, strength in signal["strength"].items()
    ]


# Differences of mean ratios smaller than this are taken for noise of the sample.
_MARGIN = 0.002


@dataclass
class SignalProbe:
    """Measures the ratios of all tasks on a fixed sample of their rows.

    Args:
        model: base model.
        updates: task -> module path -> canonical update.
        targets: modules that are looked at; each task's mean runs over those that it adapts.
        batches: task -> sampled batches.
    """

    model: nn.Module
    updates: Mapping[str, Mapping[str, LowRankUpdate]]
    targets: Sequence[str]
    batches: Mapping[str, Sequence[Batch]]

    def __post_init__(self) -> None:
        self._device = model_device(self.model)
        self._bases: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._runner = backbone(self.model, self.targets)
        self._options = forward_options(self._runner)

    def before(self, initial: Mapping[str, LowRankUpdate]) -> Signal:
        """Everything but ``final``.

        Args:
            initial: the merge that the optimisation starts from.
        """
        tasks = tuple(self.updates)
        base = {task: self._means(task, {}) for task in tasks}
        alone = {task: self._means(task, self.updates[task]) for task in tasks}
        first = {task: self._means(task, initial) for task in tasks}
        modules: dict[str, dict[str, dict[str, float]]] = {}
        for module in self.targets:
            # A task without images never comes to a vision tower that its adapter adapts.
            own = [task for task in tasks if module in self.updates[task] and module in base[task]]
            modules[module] = {
                task: {
                    "random": _chance(self.updates[task][module]),
                    "base": base[task][module][task][0],
                    "alone": alone[task][module][task][0],
                    "initial": first[task][module][task][0],
                }
                for task in own
            }
        return Signal(
            modules=modules,
            sees={task: _shares(alone[task], tasks) for task in tasks},
            tokens={task: self._tokens(task) for task in tasks},
            **{kind: _over_modules(modules, tasks, kind) for kind in ("random", "base", "alone", "initial")},
        )

    def after(self, signal: Signal, final: Mapping[str, LowRankUpdate]) -> Signal:
        """The same with the ratios under the finished merge."""
        modules = {m: {t: dict(kinds) for t, kinds in own.items()} for m, own in signal.modules.items()}
        for task in self.updates:
            means = self._means(task, final)
            for module, own in modules.items():
                if task in own:
                    own[task]["final"] = means[module][task][0]
        return replace(signal, modules=modules, final=_over_modules(modules, tuple(self.updates), "final"))

    def _means(self, task: str, updates: Mapping[str, LowRankUpdate]) -> _Means:
        """Module -> adapter -> mean ratio and mean share of energy, on the rows of one task."""
        sums: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        tokens = None

        def see(module: str, z: Tensor, _: Any) -> None:
            _, weight = tokens.tokens(z.shape[:-1], module)
            wide = compute_dtype(z.dtype)
            flat = z.reshape(-1, z.shape[-1]).to(wide)
            inside = (flat @ self._basis(module, flat).T).square()
            ranks = [u.rank for u in self._own(module).values()]
            norm = flat.square().sum(1, keepdim=True)
            share = torch.stack([part.sum(1) for part in inside.split(ranks, dim=1)], dim=1)
            # A token of zeros lies in no row space: share 0, ratio 1.
            share = torch.where(norm > 0, share / norm, 0.0).clamp(0.0, 1.0)
            both = torch.stack([(1 - share).sqrt(), share]).to(torch.float64)
            weight = weight.to(both)
            # Padding has weight 0 and may hold anything.
            found = torch.where(weight[:, None] > 0, both * weight[:, None], 0.0).sum(1)
            sums[module] = sums.get(module, 0.0) + found
            weights[module] = weights.get(module, 0.0) + float(weight.sum())

        with evaluating(self.model), adapted(self.model, updates), watched(self.model, self.targets, see):
            for batch in self.batches[task]:
                moved = on_device(batch, self._device)
                tokens = token_batch(moved, 0, self._device)
                self._runner(**moved, **self._options)
        return {
            module: dict(zip(self._own(module), (total / weights[module]).T.tolist(), strict=True))
            for module, total in sums.items()
        }

    def _own(self, module: str) -> dict[str, LowRankUpdate]:
        return {task: own[module] for task, own in self.updates.items() if module in own}

    def _basis(self, module: str, like: Tensor) -> Tensor:
        key = module, like.device, like.dtype
        if key not in self._bases:
            self._bases[key] = torch.cat([u.basis for u in self._own(module).values()]).to(like)
        return self._bases[key]

    def _tokens(self, task: str) -> int:
        count = 0
        for batch in self.batches[task]:
            mask = token_batch(batch, 0, torch.device("cpu")).mask
            first = next(iter(batch.values()))
            count += int(mask.sum()) if mask is not None else first.shape[0] * (length_of(batch) or 1)
        return count


def _chance(update: LowRankUpdate) -> float:
    """Root of the mean squared ratio for a random subspace of the update's rank."""
    return max(0.0, 1 - update.rank / update.shape[1]) ** 0.5


def _over_modules(
    modules: Mapping[str, Mapping[str, Mapping[str, float]]], tasks: Sequence[str], kind: str
) -> dict[str, float]:
    out = {}
    for task in tasks:
        values = [own[task][kind] for own in modules.values() if task in own]
        if values:
            out[task] = sum(values) / len(values)
    return out


def _shares(means: _Means, tasks: Sequence[str]) -> dict[str, float]:
    out = {}
    for task in tasks:
        values = [own[task][1] for own in means.values() if task in own]
        if values:
            out[task] = sum(values) / len(values)
    return out
