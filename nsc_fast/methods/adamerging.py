"""AdaMerging (Yang et al., 2024): coefficients that minimise the entropy of the merged model's predictions.

    min_lambda  sum_k pi_k mean_x H(softmax(f(x; W0 + sum_k lambda_k D_k))),    H(p) = -sum_c p_c log p_c

on unlabeled data. Coefficients per module ("layer-wise" in the paper) or per task. AdaMerging++ takes what
TIES keeps of every update instead of the update.

For models that generate text: the entropy of the first answer token, or of all tokens of the greedy answer.
The tokens are not differentiated, so the answer is generated first, and one pass over prompt and answer gives
the entropy at every token at once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from ..driver import optimise
from ..factors import LowRankUpdate
from ..parameters import Descent
from ..result import MergeResult
from ..sharding import is_sharded
from .algebra import compress, energy_notice
from .base import MergeInputs, Method, linear_result, modules_of, require_model_and_data
from .elementwise import Election, Entries, selected
from .entropy import EntropyObjective


class Parameters(Descent):
    """How the coefficients are optimised; the paper's values by default.

    Attributes:
        granularity: "module" (the paper's layer-wise form), "task", "layer" (block) or "rank".
        entropy: of a "classification" head, of the "first_token" or of "all_tokens" of a generated answer.
        max_new_tokens: of the generated answer.
        token_reduction: "mean" or "sum" over the tokens of an answer.
        bounds: interval that the coefficients are kept in; None leaves them free.
        plus_plus: AdaMerging++, which takes what TIES keeps of every update.
        density: of that election, one threshold per task over the whole model.
        max_rank: of the kept parts, which are dense. Default: full rank.
    """

    granularity: Literal["task", "layer", "module", "rank"] = "module"
    entropy: Literal["classification", "first_token", "all_tokens"] = "classification"
    max_new_tokens: int = Field(128, ge=1)
    token_reduction: Literal["mean", "sum"] = "mean"
    steps: int = Field(500, ge=1)
    init: float = 0.3
    bounds: tuple[float, float] | None = (0.0, 1.0)
    plus_plus: bool = False
    density: float = Field(0.2, gt=0, le=1)
    max_rank: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Parameters:
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds {self.bounds}: the lower bound must be below the upper one")
        if self.max_rank is not None and not self.plus_plus:
            raise ValueError("max_rank truncates the kept parts of plus_plus only")
        return self


def run(inputs: MergeInputs, parameters: Parameters) -> MergeResult:
    require_model_and_data("adamerging", inputs)
    EntropyObjective.check(inputs.model, parameters.entropy)
    if is_sharded(inputs.model):
        EntropyObjective.check_shardable(parameters.entropy)
    modules_of(inputs)
    updates, notices = inputs.updates, ()
    if parameters.plus_plus:
        updates, notices = kept_parts(inputs, parameters)
    coefficients, history, interrupted = optimise(
        inputs.model,
        updates,
        inputs.data,
        parameters,
        init={task: float(inputs.weights.get(task, parameters.init)) for task in inputs.tasks},
        seed=inputs.seed,
        impl=inputs.impl,
        on_step=inputs.on_step,
        checkpoints=inputs.checkpoints,
        processes=inputs.processes,
        objective=lambda model, installation: EntropyObjective(
            model,
            installation,
            mode=parameters.entropy,
            max_new_tokens=parameters.max_new_tokens,
            token_reduction=parameters.token_reduction,
            preferences=parameters.preferences,
            bounds=parameters.bounds,
            heads=inputs.heads,
        ),
    )
    if parameters.bounds is not None:
        coefficients = {module: c.clamp(*parameters.bounds) for module, c in coefficients.items()}
    result = linear_result(
        "adamerging",
        replace(inputs, updates=updates),
        parameters,
        coefficients,
        history=tuple(history),
        interrupted=interrupted,
        notices=notices,
        measure="prediction entropy",
    )
    # Coefficients of the kept parts say nothing about the adapters themselves.
    return replace(result, coefficients=None, stack_tasks=None) if parameters.plus_plus else result


def kept_parts(
    inputs: MergeInputs, parameters: Parameters
) -> tuple[dict[str, dict[str, LowRankUpdate]], tuple[str, ...]]:
    """Task -> module -> what TIES keeps of the update, and what a truncation lost."""
    matrices = {
        module: {task: Entries.of(own[module]) for task, own in inputs.updates.items() if module in own}
        for module in modules_of(inputs)
    }
    parts: dict[str, dict[str, LowRankUpdate]] = {task: {} for task in inputs.tasks}
    kept: dict[str, float] = {}
    for module, own in selected(matrices, Election(density=parameters.density)):
        for task, matrix in own.items():
            parts[task][module], share = compress(matrix, parameters.max_rank)
            kept[module] = min(share, kept.get(module, 1.0))
    return parts, energy_notice(kept, parameters.max_rank)


METHOD = Method(
    name="adamerging",
    parameters=Parameters,
    run=run,
    needs_data=True,
    paper="AdaMerging: Adaptive Model Merging for Multi-Task Learning, ICLR 2024",
    output_rank="sum of ranks",
    cost="forward and backward passes of the whole model over unlabeled data",
    sharded_base=True,
)
