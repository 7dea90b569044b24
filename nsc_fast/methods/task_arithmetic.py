"""Task arithmetic (Ilharco et al., 2023): ``sum_k lambda s_k B_k A_k`` with one coefficient for all."""

from ..parameters import Strict
from ..result import MergeResult
from .base import MergeInputs, Method, linear_result, per_task


class Parameters(Strict):
    """``scaling``: lambda of every task that has no weight of its own."""

    scaling: float = 0.3


def run(inputs: MergeInputs, parameters: Parameters) -> MergeResult:
    return linear_result("task_arithmetic", inputs, parameters, per_task(inputs, parameters.scaling))


METHOD = Method(
    name="task_arithmetic",
    parameters=Parameters,
    run=run,
    needs_data=False,
    paper="Editing Models with Task Arithmetic, ICLR 2023",
    output_rank="sum of ranks",
    cost="the canonical factors only",
)
