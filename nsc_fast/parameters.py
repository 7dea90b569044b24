"""Parameters of NSC merging, with the paper's defaults; frozen and validated."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["Descent", "EarlyStopping", "Memory", "NSCParameters", "Scope"]


class Strict(BaseModel):
    """Frozen; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Scope(Strict):
    """Target modules: whose null-space ratio enters the loss (see ``nsc_fast.targets``)."""

    filter: str | tuple[str, ...] | None = None
    # YAML reads the number of a single block as one.
    layers: str = Field("last_quarter", coerce_numbers_to_str=True)


class EarlyStopping(Strict):
    """Stop after ``patience`` steps without a loss lower than the best by ``min_delta``."""

    patience: int = Field(20, ge=1)
    min_delta: float = Field(0.0, ge=0)


class Descent(Strict):
    """Descent on merge coefficients, or on cores: what all methods that optimise have in common.

    Attributes:
        steps: optimisation steps, each with one batch of every task.
        learning_rate, weight_decay: of AdamW, or of SOAP where cores are optimised (:mod:`nsc_fast.soap`).
        schedule, warmup_steps: of the learning rate.
        preferences: weight of every task, normalised.
        log_coefficients_every: steps between two records of the coefficients in the history.
    """

    steps: int = Field(100, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    early_stopping: EarlyStopping | None = None
    preferences: dict[str, float] | None = None
    log_coefficients_every: int = Field(10, ge=1)

    @field_validator("preferences")
    @classmethod
    def _positive(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None and (any(v < 0 for v in value.values()) or sum(value.values()) <= 0):
            raise ValueError("preferences must not be negative and must not all be zero")
        return value

    def rate_at(self, step: int) -> float:
        """Factor on the learning rate at a step (from 0)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        return 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


class Memory(Strict):
    """How much of a step is in memory at once; none of it changes what is minimised.

    Attributes:
        batching: "auto" joins the tasks' batches in one forward pass where that saves time, "always" insists,
            "never" runs them one after another.
        checkpointing: what is computed again in the backward pass instead of kept: whole blocks ("always"),
            their feed-forward parts, or neither. "auto" is neither, or what a memory budget asks for.
        offload: what a checkpointed block keeps waits in the host's memory.
        micro_batch: sequences of each task in one forward pass at most. Default: the batch.
    """

    batching: Literal["auto", "always", "never"] = "auto"
    checkpointing: Literal["auto", "never", "feed_forward", "always"] = "auto"
    offload: bool = False
    micro_batch: int | None = Field(None, ge=1)

    @property
    def recompute(self) -> Literal["never", "feed_forward", "always"]:
        """``checkpointing`` with "auto" decided: no part is computed again unless a plan said so."""
        return "never" if self.checkpointing == "auto" else self.checkpointing

    @model_validator(mode="after")
    def _offloaded(self) -> Memory:
        if self.offload and self.recompute == "never":
            raise ValueError("offload moves what checkpointed blocks keep: set checkpointing to 'always'")
        return self


class NSCParameters(Descent, Memory):
    """How the coefficients are optimised.

    The paper: AdamW from 0.4, learning rate 1e-3 and 100 steps for vision models, 3e-4 and 500 steps for
    language models, target modules in the last quarter of the blocks.

    Attributes:
        stop_at_alone: a task whose ratio has come down to that of its adapter alone gets no more gradient
            until it is above again. Below that level the ratio is lower than training made it, and a lower
            ratio is no longer a sign of a better merge. Not in the paper; off by default.
        signal_rows: unlabeled rows of every task on which the signal is measured before and after, see
            ``nsc_fast.signal``; 0 for no measurement. It changes nothing about the coefficients.
        packing: whether sequences go through the model in one row without padding.
    """

    granularity: Literal["task", "layer", "module", "rank"] = "layer"
    init: float = 0.4
    scope: Scope = Scope()
    stop_at_alone: bool = False
    signal_rows: int = Field(32, ge=0)
    packing: Literal["auto", "always", "never"] = "never"

    @model_validator(mode="after")
    def _measured(self) -> NSCParameters:
        if self.stop_at_alone and self.signal_rows == 0:
            raise ValueError("stop_at_alone needs the ratios of the adapters alone: set signal_rows above 0")
        return self
