"""Which token belongs to which task, and the loss that the target modules add up while a model runs.

The loss of one step is

    L = sum_k pi_k / |J_k|  sum_{m in J_k}  sum_n w_n omega_k^m(z_n) / sum_n w_n

over the target modules J_k of task k and the tokens n of its batch, with w the attention mask. The weight
``a_n = pi_k w_n / (|J_k| sum w)`` of a token is the same at every module, so each module adds
``sum_n a_n omega_n`` and nothing has to be kept for later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["RatioMonitor", "TokenBatch"]


@dataclass(frozen=True)
class TokenBatch:
    """Tasks and padding of the sequences that go through the model together.

    Attributes:
        task: ``(B,)`` int64, index of each sequence's task.
        mask: ``(B, S)`` attention mask, or None when every token counts.
    """

    task: Tensor
    mask: Tensor | None = None

    def tokens(self, leading: torch.Size, module: str) -> tuple[Tensor, Tensor]:
        """Task index (int64) and weight (float32) of every token of activations of shape ``(*leading, d)``.

        Raises:
            ValueError: the shape cannot be related to the batch; names the module.
        """
        b = self.task.shape[0]
        if (
            self.mask is not None
            and leading.numel() == self.mask.numel()
            and leading[0] in (b, leading.numel())
        ):
            weight = self.mask.reshape(-1).to(torch.float32)
        elif len(leading) >= 1 and leading[0] == b and (self.mask is None or len(leading) == 1):
            weight = torch.ones(leading.numel(), dtype=torch.float32, device=self.task.device)
        else:
            mask = "no mask" if self.mask is None else f"a mask of shape {tuple(self.mask.shape)}"
            raise ValueError(
                f"module {module!r} receives activations of leading shape {tuple(leading)}, which do not fit "
                f"{b} sequences with {mask}; leave the module out of the target modules"
            )
        return self.task.repeat_interleave(leading.numel() // b), weight


@dataclass
class RatioMonitor:
    """Collects the null-space ratios of the target modules during one forward pass.

    Attributes:
        tasks: names of all tasks.
        preferences: pi_k, summing to 1.
        targets: module path -> names of the tasks that adapt it.
        stopped: names of tasks whose ratios are still measured but no longer enter the loss.
    """

    tasks: tuple[str, ...]
    preferences: tuple[float, ...]
    targets: Mapping[str, Sequence[str]]
    stopped: set[str] = field(default_factory=set)
    loss: Tensor | None = None
    ratios: dict[str, Tensor] = field(default_factory=dict)
    recording: bool = False
    _terms: dict[str, list[Tensor]] = field(default_factory=dict)
    _means: dict[str, list[Tensor]] = field(default_factory=dict)
    _batch: TokenBatch | None = None
    _cache: dict = field(default_factory=dict)

    @property
    def active(self) -> bool:
        """Whether target modules form their ratios.

        Still so after the forward pass, until ``clear``: activation checkpointing runs the modules again in
        the backward pass and must find them doing the same, only nothing is recorded then.
        """
        return self._batch is not None

    def begin(self, batch: TokenBatch) -> None:
        """Starts a forward pass over ``batch``; forgets the previous one."""
        self._batch, self.loss, self.ratios, self.recording = batch, None, {}, True
        self._terms, self._means = {}, {}
        self._cache.clear()

    def end(self) -> None:
        """Ends the forward pass: forms ``loss`` and ``ratios``.

        A module that ran several times (shared blocks) counts with the mean of its calls.
        """
        self.recording = False
        for module, terms in self._terms.items():
            term = torch.stack(terms).mean() if len(terms) > 1 else terms[0]
            self.loss = term if self.loss is None else self.loss + term.to(self.loss.device)
            self.ratios[module] = torch.stack(self._means[module]).mean(0)

    def clear(self) -> None:
        """Ends the step: the modules compute their outputs alone from now on."""
        self._batch, self.loss, self.recording, self._terms = None, None, False, {}
        self._cache.clear()

    def own_segment(self, module: str, z: Tensor) -> Tensor:
        """``(N,)`` int32: position of each token's task in the module's stack, -1 where it has none there."""
        present = tuple(self.targets[module])
        leading, device = z.shape[:-1], z.device
        key = (present, leading, device)
        if key not in self._cache:
            task, weight = self._batch.tokens(leading, module)
            order = torch.full((len(self.tasks),), -1, dtype=torch.int32)
            for position, name in enumerate(present):
                order[self.tasks.index(name)] = position
            own = order.to(device)[task.to(device)]
            wide = torch.float64 if z.dtype == torch.float64 else torch.float32
            self._cache[key] = own, *self._weights(task.to(device), weight.to(device, wide), own)
        return self._cache[key][0]

    def _weights(self, task: Tensor, weight: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """``a (N,)`` and the ``(K, N)`` averaging matrix for the per-task means."""
        k = len(self.tasks)
        member = torch.nn.functional.one_hot(task, k).t().to(weight.dtype) * weight
        total = member.sum(1, keepdim=True)
        average = member / total.clamp(min=torch.finfo(weight.dtype).tiny)
        scale = torch.tensor(
            [
                0.0 if name in self.stopped else pi / max(sum(name in n for n in self.targets.values()), 1)
                for name, pi in zip(self.tasks, self.preferences, strict=True)
            ],
            dtype=weight.dtype,
            device=weight.device,
        )
        return (scale @ average).masked_fill_(own < 0, 0.0), average

    def record(self, module: str, z: Tensor, omega: Tensor, p: Tensor) -> None:
        """Takes one call's ``omega (N,)``: its part of the loss, and its per-task means ``(K,)``."""
        _, a, average = self._cache[(tuple(self.targets[module]), z.shape[:-1], z.device)]
        # Padding has weight 0 and may hold anything.
        term = torch.where(a > 0, a * omega, 0.0).sum()
        if not self.recording:
            return
        self._terms.setdefault(module, []).append(term)
        # Element by element: in a product, one task's NaN would reach the means of all.
        mean = torch.where(average > 0, average * omega.detach(), 0.0).sum(1)
        self._means.setdefault(module, []).append(mean)

    def task_means(self) -> dict[str, float]:
        """Mean ratio of each task over its target modules, of the pass that ended last."""
        out = {}
        for k, name in enumerate(self.tasks):
            values = [r[k] for m, r in self.ratios.items() if name in self.targets[m]]
            if values:
                out[name] = float(torch.stack([v.to("cpu") for v in values]).mean())
        return out
