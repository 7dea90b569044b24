"""What a method gets, and what it says about itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..factors import LowRankUpdate
from ..parameters import Strict
from ..result import MergeResult

if TYPE_CHECKING:
    from ..adapters import LoraFactors
    from ..batches import Batch
    from ..driver import StepRecord

__all__ = ["MergeInputs", "Method"]


@dataclass(frozen=True)
class MergeInputs:
    """Everything a method may use.

    Attributes:
        updates: task -> module path -> canonical update; scaling (alpha/r, rslora, patterns) is inside.
        factors: task -> module path -> the adapter's own down and up projections and scaling, for rules that
            are defined on them and not on the update.
        weights: task -> weight the user gave the task, for tasks with one.
        model: base model, for methods that need data.
        data: task -> unlabeled batches, for methods that need data.
        seed: for methods that draw random numbers; always through a generator of their own.
        impl: "auto", "triton" or "torch".
        on_step: called after each optimisation step.
    """

    updates: Mapping[str, Mapping[str, LowRankUpdate]]
    factors: Mapping[str, Mapping[str, LoraFactors]] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    model: nn.Module | None = None
    data: Mapping[str, Iterable[Batch]] | None = None
    seed: int = 0
    impl: str = "auto"
    on_step: Callable[[StepRecord], None] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.updates)


@dataclass(frozen=True)
class Method:
    """One merging method.

    Attributes:
        name: as in the recipe's ``merge_method``.
        parameters: frozen pydantic model with the defaults; validates before anything is loaded.
        run: from inputs and parameters to the result.
        needs_data: whether it runs the base model on unlabeled data.
        paper: where the rule comes from.
        output_rank: rank of the merged update in words, "sum of ranks" for example.
        cost: what it costs in words.
    """

    name: str
    parameters: type[Strict]
    run: Callable[[MergeInputs, Any], MergeResult]
    needs_data: bool
    paper: str
    output_rank: str
    cost: str


def linear_result(
    name: str, inputs: MergeInputs, parameters: Strict, coefficients: Mapping[str, Tensor], **more: Any
) -> MergeResult:
    """Result of a method that only chooses coefficients: ``sum_k lambda_k s_k B_k A_k``, exact.

    Args:
        coefficients: module path -> ``(K_m,)`` or ``(R_m,)`` in the order of the module's stack.
    """
    from ..layers import stack_adapters

    stacks = stack_adapters(inputs.updates)
    return MergeResult(
        method=name,
        tasks=inputs.tasks,
        updates={module: stacked.merged(coefficients[module]) for module, stacked in stacks.items()},
        coefficients=coefficients,
        stack_tasks={module: stacked.tasks for module, stacked in stacks.items()},
        parameters=parameters.model_dump(mode="json"),
        **more,
    )


def per_task(inputs: MergeInputs, default: float) -> dict[str, Tensor]:
    """The same coefficient of a task at all modules: its weight, or ``default``."""
    import torch

    value = {task: float(inputs.weights.get(task, default)) for task in inputs.tasks}
    modules = dict.fromkeys(m for updates in inputs.updates.values() for m in updates)
    return {
        m: torch.tensor([value[t] for t in inputs.tasks if m in inputs.updates[t]], dtype=torch.float64)
        for m in modules
    }
