"""Null-space compression merging (Lee, Jeong, Yoon; CVPR 2026): coefficients that minimise the mean
null-space ratio of the merged model's activations on unlabeled data."""

from ..driver import optimise
from ..errors import MergeError
from ..parameters import NSCParameters
from ..result import MergeResult
from .base import MergeInputs, Method, linear_result


def run(inputs: MergeInputs, parameters: NSCParameters) -> MergeResult:
    if inputs.model is None or inputs.data is None:
        raise MergeError("method 'nsc' needs the base model and unlabeled data of every task")
    init = {task: float(inputs.weights.get(task, parameters.init)) for task in inputs.tasks}
    coefficients, history, interrupted = optimise(
        inputs.model,
        inputs.updates,
        inputs.data,
        parameters,
        init=init,
        seed=inputs.seed,
        impl=inputs.impl,
        on_step=inputs.on_step,
    )
    return linear_result(
        "nsc", inputs, parameters, coefficients, history=tuple(history), interrupted=interrupted
    )


METHOD = Method(
    name="nsc",
    parameters=NSCParameters,
    run=run,
    needs_data=True,
    paper="Label-Free Cross-Task LoRA Merging with Null-Space Compression, CVPR 2026",
    output_rank="sum of ranks",
    cost="forward and backward passes over unlabeled data, up to the last target module",
)
