"""Least squares on the adapters' outputs: one forward pass over the data, no optimisation.

The merged update at every module is the one nearest, in the mean over all tasks, to what each adapter alone
does on its own task's inputs; see :mod:`nsc_fast.objectives.least_squares`.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from ..coefficients import group_of
from ..driver import check_data
from ..objectives.least_squares import Moments, coefficients, core, second_moments
from ..parameters import Strict
from ..result import MergeResult
from .base import MergeInputs, Method, linear_result, modules_of, plain_result, require_model_and_data
from .measured import sampled


class Parameters(Strict):
    """
    Attributes:
        granularity: "core", an R x R matrix a module between the stacked factors; or one coefficient per
            task and "module", "layer" (block) or "task" (the whole model).
        rows: unlabeled rows of every task.
        ridge: relative to the mean diagonal entry of the system.
        toward: what the ridge pulls to: this coefficient for every task without a weight of its own. With 0
            it shrinks.
        scale: factor on the solution. The least-squares solution is short where tasks disagree.
        micro_batch: sequences in one forward pass at most. Default: the batch.
    """

    granularity: Literal["core", "module", "layer", "task"] = "core"
    rows: int = Field(128, ge=1)
    ridge: float = Field(0.1, ge=0)
    toward: float = 0.4
    scale: float = 1.0
    micro_batch: int | None = Field(None, ge=1)


def run(inputs: MergeInputs, parameters: Parameters) -> MergeResult:
    require_model_and_data("closed_form", inputs)
    check_data(inputs.updates, inputs.data)
    modules_of(inputs)
    batches, inputs = sampled(inputs, parameters.rows)
    moments = second_moments(inputs.model, inputs.updates, batches, micro_batch=parameters.micro_batch)
    return solve(inputs, moments, parameters)


def solve(inputs: MergeInputs, moments: Moments, parameters: Parameters) -> MergeResult:
    """The merge from moments that are there already."""
    toward = {task: float(inputs.weights.get(task, parameters.toward)) for task in inputs.tasks}
    if parameters.granularity == "core":
        updates = {}
        for module, stacked in moments.stacks.items():
            x = core(moments, module, ridge=parameters.ridge, toward=toward).mul_(parameters.scale)
            updates[module] = stacked.merged(x)
        return plain_result("closed_form", inputs, parameters, updates)
    groups: dict[str, list[str]] = {}
    for module in moments.stacks:
        groups.setdefault(group_of(module, parameters.granularity), []).append(module)
    values = {}
    for modules in groups.values():
        found = coefficients(moments, modules, ridge=parameters.ridge, toward=toward)
        for module in modules:
            own = [found[task] for task in moments.stacks[module].tasks]
            values[module] = torch.tensor(own, dtype=torch.float64) * parameters.scale
    return linear_result("closed_form", inputs, parameters, values)


METHOD = Method(
    name="closed_form",
    parameters=Parameters,
    run=run,
    needs_data=True,
    paper="RegMean (Dataless Knowledge Fusion, ICLR 2023) in the span of the adapters",
    output_rank="sum of ranks",
    cost="one forward pass over unlabeled data, O(K R^3) per module",
    sharded_base=True,
)
