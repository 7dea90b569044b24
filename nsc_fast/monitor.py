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
from typing import NamedTuple

import torch
from torch import Tensor

from .dtypes import compute_dtype
from .targets import tokens_of

__all__ = ["RatioMonitor", "TokenBatch", "Whole"]


class Whole(NamedTuple):
    """Sizes of a batch whose parts are run: weight of its tokens, its sequences, patches of its images."""

    weight: float
    sequences: float
    patches: float = 0


@dataclass(frozen=True)
class TokenBatch:
    """Tasks and padding of the sequences that go through the model together.

    Attributes:
        task: ``(B,)`` int64, index of each sequence's task; ``(1, N)``, of each token's, in a packed row.
        mask: ``(B, S)`` attention mask, or None when every token counts.
        one_task: whether all sequences are of one task. Activations may then have any shape: the patches of
            all images in one list, for example.
        decoder: whether a decoder has inputs of its own, with ``decoder_mask`` in place of ``mask``.
        decoder_mask: ``(B, S')``, or None when every token of the decoder counts.
        frames: whether ``mask`` is one of sound, of which an encoder may make fewer tokens.
        patches: of all images, where they come in one list.
        whole: where these are parts of batches: task -> sizes of its batch.
    """

    task: Tensor
    mask: Tensor | None = None
    one_task: bool = False
    decoder: bool = False
    decoder_mask: Tensor | None = None
    frames: bool = False
    patches: int = 0
    whole: Mapping[int, Whole] | None = None

    def tokens(self, leading: torch.Size, module: str) -> tuple[Tensor, Tensor]:
        """Task index (int64) and weight (float32) of every token of activations of shape ``(*leading, d)``.

        Raises:
            ValueError: the shape cannot be related to the batch; names the module.
        """
        b, count = self.task.shape[0], leading.numel()
        first = leading[0] if leading else 0
        mask = self._mask_at(module)
        if mask is not None and self.frames and len(leading) == 2 and mask.shape[1] % leading[1] == 0:
            mask = mask[:, :: mask.shape[1] // leading[1]]
        ones = torch.ones(count, dtype=torch.float32, device=self.task.device)
        if self.task.ndim == 2 and count == self.task.numel():
            return self.task.reshape(-1), ones
        if self.task.ndim == 1 and mask is not None and count == mask.numel() and first in (b, count):
            return self.task.repeat_interleave(count // b), mask.reshape(-1).to(torch.float32)
        if self.task.ndim == 1 and (mask is None or len(leading) == 1) and first == b:
            return self.task.repeat_interleave(count // b), ones
        if self.task.ndim == 1 and mask is None and self.one_task:
            return self.task[:1].expand(count), ones
        told = "no mask" if mask is None else f"a mask of shape {tuple(mask.shape)}"
        raise ValueError(
            f"module {module!r} receives activations of leading shape {tuple(leading)}, which do not fit "
            f"{b} sequences with {told}; leave the module out of the target modules"
        )

    def totals(self, leading: torch.Size, module: str) -> dict[int, float] | None:
        """Sum of the token weights over each task's whole batch, where this is a part of it."""
        if self.whole is None:
            return None
        if self.patches and tokens_of(module) == "other":
            return {k: own.patches * leading.numel() / self.patches for k, own in self.whole.items()}
        b, counted = self.task.shape[0], self._mask_at(module) is not None and len(leading) > 1
        if self.task.ndim == 1 and leading[0] == b and not counted:
            return {k: own.sequences * leading.numel() / b for k, own in self.whole.items()}
        return {k: own.weight for k, own in self.whole.items()}

    def _mask_at(self, module: str) -> Tensor | None:
        kind = tokens_of(module)
        if kind == "other":
            return None
        return self.decoder_mask if self.decoder and kind == "decoder" else self.mask


@dataclass
class RatioMonitor:
    """Collects the null-space ratios of the target modules during one forward pass.

    Attributes:
        tasks: names of all tasks.
        preferences: pi_k, summing to 1.
        targets: module path -> names of the tasks that adapt it.
        stopped: names of tasks whose ratios are still measured but no longer enter the loss.
        latest: the module that was recorded last.
        last: the module and which of its calls end the pass; None where the pass goes on.
    """

    tasks: tuple[str, ...]
    preferences: tuple[float, ...]
    targets: Mapping[str, Sequence[str]]
    stopped: set[str] = field(default_factory=set)
    loss: Tensor | None = None
    ratios: dict[str, Tensor] = field(default_factory=dict)
    recording: bool = False
    latest: str = ""
    last: tuple[str, int] | None = None
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

    def begin(self, batch: TokenBatch, last: tuple[str, int] | None = None) -> None:
        """Starts a forward pass over ``batch``, to end at the call ``last``; forgets the previous one."""
        self._batch, self.loss, self.ratios, self.recording, self.last = batch, None, {}, True, last
        self.latest, self._terms, self._means = "", {}, {}
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
        self._batch, self.loss, self.recording, self.last, self._terms = None, None, False, None, {}
        self._cache.clear()

    def _key(self, module: str, z: Tensor) -> tuple:
        """What the tasks and weights of the tokens of ``z`` depend on."""
        return tuple(self.targets[module]), tokens_of(module), z.shape[:-1], z.device

    def own_segment(self, module: str, z: Tensor) -> Tensor:
        """``(N,)`` int32: position of each token's task in the module's stack, -1 where it has none there."""
        present = tuple(self.targets[module])
        leading, device = z.shape[:-1], z.device
        key = self._key(module, z)
        if key not in self._cache:
            task, weight = self._batch.tokens(leading, module)
            order = torch.full((len(self.tasks),), -1, dtype=torch.int32)
            for position, name in enumerate(present):
                order[self.tasks.index(name)] = position
            own = order.to(device)[task.to(device)]
            wide = compute_dtype(z.dtype)
            totals = self._batch.totals(leading, module)
            self._cache[key] = own, *self._weights(task.to(device), weight.to(device, wide), own, totals)
        return self._cache[key][0]

    def _weights(
        self, task: Tensor, weight: Tensor, own: Tensor, totals: Mapping[int, float] | None
    ) -> tuple[Tensor, Tensor]:
        """``a (N,)`` and the ``(K, N)`` averaging matrix for the per-task means."""
        k = len(self.tasks)
        member = torch.nn.functional.one_hot(task, k).t().to(weight.dtype) * weight
        total = member.sum(1, keepdim=True)
        if totals is not None:
            total = total.new_tensor([[totals.get(i, 0.0)] for i in range(k)])
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

    def record(self, module: str, z: Tensor, omega: Tensor) -> None:
        """Takes one call's ``omega (N,)``: its part of the loss, and its per-task means ``(K,)``."""
        _, a, average = self._cache[self._key(module, z)]
        # Padding has weight 0 and may hold anything.
        term = torch.where(a > 0, a * omega, 0.0).sum()
        if not self.recording:
            return
        self.latest = module
        self._terms.setdefault(module, []).append(term)
        # Element by element: in a product, one task's NaN would reach the means of all.
        mean = torch.where(average > 0, average * omega.detach(), 0.0).sum(1)
        self._means.setdefault(module, []).append(mean)

    @property
    def latest_call(self) -> tuple[str, int]:
        """The module that was recorded last in this pass, and how often it was."""
        return self.latest, len(self._terms.get(self.latest, ()))

    def task_means(self) -> dict[str, float]:
        """Mean ratio of each task over its target modules, of the pass that ended last.

        Where the pass held a part of a batch, the part's share of the mean.
        """
        ratios = self.ratios
        if not ratios:
            return {}
        device = next(iter(ratios.values())).device
        # One copy to the host for all modules.
        table = torch.stack([r.to(device) for r in ratios.values()]).cpu()
        out = {}
        for k, name in enumerate(self.tasks):
            own = [i for i, m in enumerate(ratios) if name in self.targets[m]]
            if own:
                out[name] = float(table[own, k].mean())
        return out
