"""What a method gets, and what it says about itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..errors import MergeError
from ..factors import LowRankUpdate, weighted_sum
from ..parameters import Strict
from ..result import MergeResult
from ..sharding import check_sharding

if TYPE_CHECKING:
    from ..adapters import LoraFactors
    from ..batches import Batch
    from ..checkpoint import Checkpoints
    from ..driver import StepRecord
    from ..processes import Processes

__all__ = [
    "MergeInputs",
    "Method",
    "ScaledFactors",
    "equal_ranks",
    "factors_at",
    "linear_result",
    "merged_updates",
    "modules_of",
    "per_task",
    "plain_result",
    "require_model_and_data",
    "updates_at",
]


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
        heads: task -> tensors of its own head by path in the base model, for methods that need its outputs.
        seed: for methods that draw random numbers; always through a generator of their own.
        impl: "auto", "triton" or "torch".
        on_step: called after each optimisation step.
        checkpoints: where an optimisation is kept, so that it can go on after an interruption.
        processes: among which the batches of a step are divided. Default: this one alone.
    """

    updates: Mapping[str, Mapping[str, LowRankUpdate]]
    factors: Mapping[str, Mapping[str, LoraFactors]] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    model: nn.Module | None = None
    data: Mapping[str, Iterable[Batch]] | None = None
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    seed: int = 0
    impl: str = "auto"
    on_step: Callable[[StepRecord], None] | None = None
    checkpoints: Checkpoints | None = None
    processes: Processes | None = None

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
        one_model: whether the result is one merged update; otherwise it keeps the adapters apart in some
            compressed form, and its result says how to get them back.
        sharded_base: whether it can run on a base model that is sharded over processes.
    """

    name: str
    parameters: type[Strict]
    run: Callable[[MergeInputs, Any], MergeResult]
    needs_data: bool
    paper: str
    output_rank: str
    cost: str
    one_model: bool = True
    sharded_base: bool = False


def linear_result(
    name: str, inputs: MergeInputs, parameters: Strict, coefficients: Mapping[str, Tensor], **more: Any
) -> MergeResult:
    """Result of a method that only chooses coefficients: ``sum_k lambda_k s_k B_k A_k``, exact.

    Args:
        coefficients: module path -> ``(K_m,)`` or ``(R_m,)`` in the order of the module's stack.
    """
    return MergeResult(
        method=name,
        tasks=inputs.tasks,
        updates=merged_updates(inputs, coefficients),
        coefficients=coefficients,
        stack_tasks={
            module: tuple(task for task, own in inputs.updates.items() if module in own)
            for module in _adapted(inputs)
        },
        parameters=parameters.model_dump(mode="json"),
        **more,
    )


def merged_updates(inputs: MergeInputs, coefficients: Mapping[str, Tensor]) -> dict[str, LowRankUpdate]:
    """Module path -> ``sum_k lambda_k s_k B_k A_k``, exact; arguments as for :func:`linear_result`."""
    out = {}
    for module in _adapted(inputs):
        named = [(task, own[module]) for task, own in inputs.updates.items() if module in own]
        out[module] = weighted_sum(named, coefficients[module])
    return out


def _adapted(inputs: MergeInputs) -> list[str]:
    """Modules that at least one task adapts, in the order of first appearance."""
    return list(dict.fromkeys(m for updates in inputs.updates.values() for m in updates))


def require_model_and_data(name: str, inputs: MergeInputs) -> None:
    """For methods that run the model.

    Raises:
        MergeError: the model or the data were not given, or the model is sharded in another way than ours.
    """
    if inputs.model is None or inputs.data is None:
        raise MergeError(f"method {name!r} needs the base model and unlabeled data of every task")
    check_sharding(inputs.model, _adapted(inputs), inputs.processes)


def per_task(inputs: MergeInputs, default: float) -> dict[str, Tensor]:
    """The same coefficient of a task at all modules: its weight, or ``default``."""
    value = {task: float(inputs.weights.get(task, default)) for task in inputs.tasks}
    return {
        m: torch.tensor([value[t] for t in inputs.tasks if m in inputs.updates[t]], dtype=torch.float64)
        for m in modules_of(inputs)
    }


def plain_result(
    name: str,
    inputs: MergeInputs,
    parameters: Strict,
    updates: Mapping[str, LowRankUpdate],
    notices: tuple[str, ...] = (),
) -> MergeResult:
    """Result of a method whose merged update is not a linear combination: it has no coefficients."""
    return MergeResult(
        method=name,
        tasks=inputs.tasks,
        updates=updates,
        parameters=parameters.model_dump(mode="json"),
        notices=notices,
    )


def modules_of(inputs: MergeInputs) -> list[str]:
    """Modules that at least one task adapts, in the order of first appearance.

    Raises:
        MergeError: no adapter, or a weight for a task that is none of them.
    """
    if not inputs.updates:
        raise MergeError("there is no adapter to merge")
    unknown = [task for task in inputs.weights if task not in inputs.updates]
    if unknown:
        raise MergeError(
            f"a weight was given for {unknown[0]!r}, which is no adapter ({', '.join(inputs.tasks)})"
        )
    return _adapted(inputs)


def updates_at(inputs: MergeInputs, module: str) -> dict[str, LowRankUpdate]:
    """Task -> update of one module times the task's weight, for the tasks that adapt it.

    Rules that are not linear take a weight for part of the update: the rule sees ``w_k D_k``, so a negative
    weight merges the negated adapter, and a weight 1 changes nothing.

    Raises:
        MergeError: the tasks' updates differ in shape.
    """
    own = {task: updates[module] for task, updates in inputs.updates.items() if module in updates}
    _same_shape(module, {task: update.shape for task, update in own.items()})
    return {
        task: update if (weight := inputs.weights.get(task, 1.0)) == 1.0 else update.scaled(weight)
        for task, update in own.items()
    }


@dataclass(frozen=True)
class ScaledFactors:
    """An adapter's own ``(down, up)`` at one module and their scales, converted only where they are read.

    Attributes:
        down, up: A, ``(r, d_in)``, and B, ``(d_out, r)``, as the adapter has them.
        down_scale, up_scale: what each is to be multiplied with.
    """

    down: Tensor
    up: Tensor
    down_scale: float
    up_scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def read_down(self) -> Tensor:
        """A times its scale, in float64."""
        return _times(self.down, self.down_scale)

    def read_up(self) -> Tensor:
        """B times its scale, in float64."""
        return _times(self.up, self.up_scale)


def _times(matrix: Tensor, scale: float) -> Tensor:
    matrix = matrix.detach().to(torch.float64)
    return matrix if scale == 1.0 else matrix * scale


def factors_at(inputs: MergeInputs, module: str, *, fold: Literal["up", "split"]) -> dict[str, ScaledFactors]:
    """Task -> the adapter's own factors of one module, with the scales that hold scaling and weight.

    Args:
        fold: where ``w_k s_k`` goes: "up", into B; "split", its square root into each and the sign into B.

    Raises:
        MergeError: the tasks' updates differ in shape, or the adapters' factors were not given.
    """
    own: dict[str, ScaledFactors] = {}
    for task, updates in inputs.updates.items():
        if module not in updates:
            continue
        if module not in inputs.factors.get(task, {}):
            raise MergeError(
                f"the factors A and B of task {task!r} at {module!r} are not known, and this method is "
                "defined on them; give MergeInputs.factors, or choose a method defined on the update"
            )
        factors = inputs.factors[task][module]
        scale = factors.scaling * inputs.weights.get(task, 1.0)
        root = abs(scale) ** 0.5
        scales = (1.0, scale) if fold == "up" else (root, root if scale >= 0 else -root)
        own[task] = ScaledFactors(factors.down, factors.up, *scales)
    _same_shape(module, {task: (f.up.shape[0], f.down.shape[1]) for task, f in own.items()})
    return own


def equal_ranks(method: str, module: str, factors: Mapping[str, ScaledFactors]) -> int:
    """The rank that all adapters share at a module.

    Raises:
        MergeError: they differ; names the adapters.
    """
    ranks = {task: own.rank for task, own in factors.items()}
    if len(set(ranks.values())) > 1:
        told = ", ".join(f"{task!r} has {rank}" for task, rank in ranks.items())
        raise MergeError(
            f"method {method!r} needs adapters of equal rank; at {module!r} {told}. Leave adapters out, or "
            "choose a method that takes mixed ranks, such as 'knots_ties', 'tsv' or 'lego'"
        )
    return next(iter(ranks.values()))


def _same_shape(module: str, shapes: Mapping[str, tuple[int, int]]) -> None:
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{task!r} {d_out} x {d_in}" for task, (d_out, d_in) in shapes.items())
        raise MergeError(f"the updates of module {module!r} differ in shape: {told}")
