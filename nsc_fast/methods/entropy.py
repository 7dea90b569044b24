"""Entropy of the merged model's predictions, as an objective for the coefficients."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..batches import Batch
from ..errors import MergeError
from ..layers import Installation
from ..sharding import InStep

__all__ = ["EntropyObjective", "Kind", "answer", "entropy", "pack_left"]

Kind = Literal["classification", "first_token", "all_tokens"]


def entropy(logits: Tensor) -> Tensor:
    """``-sum_c p_c log p_c`` over the last dimension, in nats and at least float32."""
    wide = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
    log_p = wide.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@dataclass
class EntropyObjective:
    """Mean entropy of every task's predictions on its own batch.

    Attributes:
        model: the base model with merged layers in it.
        installation: what ``install`` returned.
        mode: of a classification head, or of the "first_token" or "all_tokens" of a generated answer.
        max_new_tokens: of the answer.
        token_reduction: "mean" or "sum" over the tokens of an answer.
        preferences: weight per task, normalised to sum 1. Default: equal.
        bounds: interval that the coefficients are put back into before each step.
        heads: task -> tensors that replace those of the model for that task's batches.
        in_step: keeps the passes of all processes in step, where the base model is sharded over them.
    """

    model: nn.Module
    installation: Installation
    mode: Kind = "classification"
    max_new_tokens: int = 128
    token_reduction: Literal["mean", "sum"] = "mean"
    preferences: Mapping[str, float] | None = None
    bounds: tuple[float, float] | None = None
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    in_step: InStep | None = None
    finished: bool = False

    def __post_init__(self) -> None:
        accepted = inspect.signature(self.model.forward).parameters
        self._options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        tasks = self.installation.coefficients.tasks
        weight = {task: 1.0 if self.preferences is None else self.preferences[task] for task in tasks}
        self._share = {task: w / sum(weight.values()) for task, w in weight.items()}

    @staticmethod
    def check(model: nn.Module, mode: Kind) -> None:
        """Whether the model has predictions of that kind.

        Raises:
            MergeError: it has a regression head, or generates where it should classify, or the reverse.
        """
        config = getattr(model, "config", None)
        regression = getattr(config, "problem_type", None) == "regression"
        if mode == "classification" and (regression or getattr(config, "num_labels", 2) == 1):
            raise MergeError(_REGRESSION.format(f"the head of {type(model).__name__}"))
        if mode == "classification" and hasattr(model, "can_generate") and model.can_generate():
            raise MergeError(_TOKENS)
        if mode != "classification" and not callable(getattr(model, "generate", None)):
            raise MergeError(
                f"entropy={mode!r} needs a model that generates text, and {type(model).__name__} does not; "
                "use entropy='classification'"
            )
        if mode != "classification" and getattr(config, "is_encoder_decoder", False):
            raise MergeError(f"entropy={mode!r} is made for decoder-only models, not {type(model).__name__}")

    @staticmethod
    def check_shardable(mode: Kind) -> None:
        """Whether the passes of a step can be kept in step where the base model is sharded.

        Raises:
            MergeError: whole answers.
        """
        if mode == "all_tokens":
            raise MergeError(
                "entropy='all_tokens' takes as many passes as an answer has tokens, and a sharded base model "
                "the same number in all processes: use entropy='first_token', or leave the base whole"
            )

    def losses(self, batches: Mapping[str, Batch]) -> tuple[float, dict[str, float]]:
        """Forward and backward for one batch of every task; gradients add up in the coefficients.

        Args:
            batches: task -> batch; none is for sharded base models.

        Raises:
            MergeError: predictions that have no entropy, or an entropy that is not finite.
        """
        coefficients = self.installation.coefficients
        if self.bounds is not None:
            with torch.no_grad():
                for value in coefficients.parameters():
                    value.clamp_(*self.bounds)
        device = next(coefficients.parameters()).device
        total, parts = 0.0, {}
        passes = [({k: v.to(device) for k, v in batch.items()}, (t, True)) for t, batch in batches.items()]
        if self.in_step is not None:
            passes = self.in_step(passes, lambda one: (one[0], (one[1][0], False)))
        for batch, (task, counts) in passes:
            loss = self._task_entropy(task, batch)
            if not counts:
                (0.0 * loss).backward()
                continue
            parts[task] = float(loss.detach())
            if not torch.isfinite(loss):
                raise MergeError(
                    f"the entropy of task {task!r} is {parts[task]}: lower the learning rate or load the "
                    "base model in float32"
                )
            if loss.requires_grad:
                (self._share[task] * loss).backward()
            total += self._share[task] * parts[task]
        return total, parts

    def _task_entropy(self, task: str, batch: dict[str, Tensor]) -> Tensor:
        if self.mode == "classification":
            return self._classification(task, batch)
        if "input_ids" not in batch:
            raise MergeError(f"task {task!r}: entropy={self.mode!r} needs input_ids; the batch has none")
        batch = pack_left(batch)
        lengths = batch["attention_mask"].sum(1)
        if self.mode == "first_token":
            h = entropy(self._logits(task, batch))
            return h.gather(1, lengths[:, None] - 1).mean()
        batch = self._answered(task, batch)
        h = entropy(self._logits(task, batch))
        # The prediction at position n is that of token n + 1.
        place = torch.arange(h.shape[1], device=h.device)
        predicts = (place >= lengths[:, None] - 1) & (place < batch["attention_mask"].sum(1)[:, None] - 1)
        per_row = torch.where(predicts, h, 0.0).sum(1)
        return (per_row if self.token_reduction == "sum" else per_row / predicts.sum(1)).mean()

    def _classification(self, task: str, batch: dict[str, Tensor]) -> Tensor:
        logits = self._logits(task, batch)
        if logits.shape[-1] == 1:
            raise MergeError(_REGRESSION.format(f"the head of task {task!r}"))
        vocabulary = getattr(getattr(self.model, "config", None), "vocab_size", None)
        if logits.ndim == 3 and logits.shape[-1] == vocabulary:
            raise MergeError(_TOKENS)
        h = entropy(logits)
        mask = batch.get("attention_mask")
        if mask is None or mask.shape != h.shape:
            return h.mean()
        return torch.where(mask > 0, h, 0.0).sum() / mask.sum()

    def _logits(self, task: str, batch: dict[str, Tensor]) -> Tensor:
        with _replaced(self.model, self.heads.get(task, {})):
            out = self.model(**batch, **self._options)
        return out.logits if hasattr(out, "logits") else out

    @torch.no_grad()
    def _answered(self, task: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with the greedy answers behind the prompts."""
        with _replaced(self.model, self.heads.get(task, {})):
            return answer(self.model, batch, self.max_new_tokens)


_TOKENS = "the model predicts tokens, not classes; use entropy='first_token' or 'all_tokens'"
_REGRESSION = (
    "{} gives one number per example: entropy is not defined for regression. Leave the task out, or use "
    "method 'nsc', whose objective needs no outputs"
)


@contextmanager
def _replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values for some parameters of the model while the block runs."""
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for path, tensor in tensors.items():
            parent, _, name = path.rpartition(".")
            owner = model.get_submodule(parent)
            old = getattr(owner, name)
            before.append((owner, name, old))
            setattr(owner, name, nn.Parameter(tensor.to(old.device, old.dtype), requires_grad=False))
        yield
    finally:
        for owner, name, old in reversed(before):
            setattr(owner, name, old)


def pack_left(batch: Batch) -> dict[str, Tensor]:
    """The batch with all padding on the right, where it needs no position ids; adds a missing mask."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    order = mask.argsort(dim=1, descending=True, stable=True)
    return _permuted({**batch, "attention_mask": mask}, order)


def _permuted(batch: Batch, order: Tensor) -> dict[str, Tensor]:
    return {
        key: value.gather(1, order) if value.shape == order.shape else value
        for key, value in batch.items()
        if key != "position_ids"
    }


def answer(model: nn.Module, batch: Batch, max_new_tokens: int) -> dict[str, Tensor]:
    """Greedy answers behind the prompts, up to and with the end-of-sequence token; padding on the right."""
    mask = batch["attention_mask"]
    padded_left = _permuted(batch, mask.argsort(dim=1, stable=True))
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    ids = model.generate(
        **padded_left,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=ends[0] if ends else 0,
    )
    new = ids[:, mask.shape[1] :]
    stop = torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device)).to(mask.dtype)
    # Everything until the first stop, which itself is still predicted.
    lives = ((stop.cumsum(1) - stop) == 0).to(mask.dtype)
    more = torch.cat([padded_left["attention_mask"], lives], dim=1)
    return pack_left({**padded_left, "input_ids": ids, "attention_mask": more})
