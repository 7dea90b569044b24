"""Parameters of NSC merging, with the paper's defaults; frozen and validated."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

__all__ = ["EarlyStopping", "NSCParameters", "Scope"]


class Strict(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Scope(Strict):
    """Target modules: whose null-space ratio enters the loss (see ``nsc_fast.targets``)."""

    filter: str | tuple[str, ...] | None = None
    layers: str = "last_quarter"


class EarlyStopping(Strict):
    """Stop after ``patience`` steps without a loss lower than the best by ``min_delta``."""

    patience: int = Field(20, ge=1)
    min_delta: float = Field(0.0, ge=0)


class NSCParameters(Strict):
    """How the coefficients are optimised.

    The paper: AdamW from 0.4, learning rate 1e-3 and 100 steps for vision models, 3e-4 and 500 steps for
    language models, target modules in the last quarter of the blocks.
    """

    granularity: Literal["task", "layer", "module", "rank"] = "layer"
    steps: int = Field(100, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    init: float = 0.4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    early_stopping: EarlyStopping | None = None
    preferences: dict[str, float] | None = None
    scope: Scope = Scope()
    batching: Literal["auto", "always", "never"] = "auto"
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
