"""Uniform average of the updates: ``1/K sum_k s_k B_k A_k``."""

from ..parameters import Strict
from ..result import MergeResult
from .base import MergeInputs, Method, linear_result, per_task


class Parameters(Strict):
    """No parameters."""


def run(inputs: MergeInputs, parameters: Parameters) -> MergeResult:
    return linear_result("uniform", inputs, parameters, per_task(inputs, 1.0 / len(inputs.tasks)))


METHOD = Method(
    name="uniform",
    parameters=Parameters,
    run=run,
    needs_data=False,
    paper="Model Soups, ICML 2022",
    output_rank="sum of ranks",
    cost="the canonical factors only",
)
