"""Anchored merging: the merged model reproduces what each adapter alone makes of its own task's rows.

What is minimised is the distance of :mod:`nsc_fast.objectives.anchors`, half of it on the way
(:mod:`nsc_fast.objectives.waypoints`), over merge coefficients, by AdamW, or over the cores between the
stacked factors, by SOAP (:mod:`nsc_fast.soap`). It starts at task arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field

from ..checkpoint import digest
from ..driver import check_data, minimise, restored
from ..layers import install, model_device, remove, stack_adapters
from ..memory import checkpointed
from ..objectives.anchored import AnchoredObjective
from ..objectives.anchors import Anchor, Anchors, anchors
from ..parameters import Descent, Memory
from ..result import MergeResult
from ..sharding import InStep, is_sharded
from .base import MergeInputs, Method, linear_result, modules_of, plain_result, require_model_and_data
from .measured import sampled, with_signal


class Parameters(Descent, Memory):
    """How the distance is minimised.

    Attributes:
        granularity: "core", an R x R matrix a module between the stacked factors, or merge coefficients per
            "task", "layer" (block), "module" or "rank".
        rows: unlabeled rows of every task; the states of all of them stay in memory.
        waypoints: whether the states between the blocks are compared, too, and not only the last ones
            (:mod:`nsc_fast.objectives.waypoints`).
        init: merge coefficient at the start, for tasks without a weight.
        signal_rows: rows of every task on which the null-space signal is measured (``nsc_fast.signal``), for
            the report alone; 0 for no measurement.
    """

    granularity: Literal["core", "rank", "module", "layer", "task"] = "core"
    rows: int = Field(256, ge=1)
    steps: int = Field(200, ge=1)
    learning_rate: float = Field(1e-2, gt=0)
    waypoints: bool = True
    init: float = 0.4
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    signal_rows: int = Field(32, ge=0)


def run(inputs: MergeInputs, parameters: Parameters) -> MergeResult:
    require_model_and_data("anchored", inputs)
    check_data(inputs.updates, inputs.data)
    modules_of(inputs)
    batches, inputs = sampled(inputs, parameters.rows)
    fixed = anchors(
        inputs.model,
        inputs.updates,
        batches,
        micro_batch=parameters.micro_batch,
        waypoints=parameters.waypoints,
    )
    result = fit(inputs, fixed, parameters)
    return with_signal(inputs, result, parameters.init, parameters.signal_rows, parameters.micro_batch)


def fit(inputs: MergeInputs, fixed: dict[str, Anchors], parameters: Parameters) -> MergeResult:
    """The merge from anchors that are there already."""
    model = inputs.model
    init = {task: float(inputs.weights.get(task, parameters.init)) for task in inputs.tasks}
    streams = {task: AnchorStream(own, inputs.seed) for task, own in fixed.items()}
    in_step = InStep(inputs.processes, model_device(model)) if is_sharded(model) else None
    more = {"measure": "distance to the adapter alone"}
    with restored(model):
        try:
            installation = install(
                model, inputs.updates, granularity=parameters.granularity, init=init, impl=inputs.impl
            )
            how = parameters.preferences, parameters.batching, parameters.micro_batch
            objective = AnchoredObjective(model, installation, fixed, *how, in_step)
            again, kept = parameters.recompute, (inputs.checkpoints, inputs.processes)
            with checkpointed(model, installation.modules, again, offload=parameters.offload):
                history, interrupted = minimise(objective, streams, parameters, inputs.on_step, *kept)
            more |= {"history": tuple(history), "interrupted": interrupted}
        finally:
            remove(model)
    values = installation.coefficients.by_module()
    if parameters.granularity == "core":
        stacks = stack_adapters(inputs.updates)
        updates = {module: stacks[module].merged(value) for module, value in values.items()}
        return replace(plain_result("anchored", inputs, parameters, updates), **more)
    return linear_result("anchored", inputs, parameters, values, **more)


class AnchorStream:
    """Endless anchors of one task, in an order that a seed fixes.

    All tasks are shuffled alike, so that where lists were sorted alike, batches of like length meet.
    """

    def __init__(self, fixed: Anchors, seed: int) -> None:
        self._fixed = fixed
        self._generator = torch.Generator().manual_seed(seed)
        self._order: list[int] = []

        self.seen = ""

    def watch(self) -> str:
        """Digest of the rows."""
        inputs = [item for anchor in self._fixed.batches for item in sorted(anchor.inputs.items())]
        return digest(inputs)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"generator": self._generator.get_state(), "order": list(self._order)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Back to what ``state_dict`` returned."""
        self._generator.set_state(state["generator"])
        self._order = list(state["order"])

    def next(self) -> Anchor:
        if not self._order:
            count = len(self._fixed.batches)
            self._order = torch.randperm(count, generator=self._generator).tolist()
        return self._fixed.batches[self._order.pop()]


METHOD = Method(
    name="anchored",
    parameters=Parameters,
    run=run,
    needs_data=True,
    paper="the adapters' own states as targets, without labels; see nsc_fast.objectives.anchors",
    output_rank="sum of ranks",
    cost="forward and backward passes over unlabeled data, two forward passes for the anchors",
    sharded_base=True,
)
