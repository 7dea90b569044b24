"""Sum of the factors, ``(sum_k B_k) (sum_k A_k)``: the "linear" combination of PEFT.

It keeps the rank r, at the price of the cross terms ``B_j A_k`` that no adapter has learnt, and it depends on
how the adapters' factors are scaled. A reference for comparisons; "task_arithmetic" is the sum of updates.
"""

from ..parameters import Strict
from ..result import MergeResult
from .algebra import product
from .base import MergeInputs, Method, equal_ranks, factors_at, modules_of, plain_result


class Parameters(Strict):
    """``scaling``: lambda."""

    scaling: float = 1.0


def run(inputs: MergeInputs, parameters: Parameters) -> MergeResult:
    updates = {}
    for module in modules_of(inputs):
        factors = factors_at(inputs, module, fold="split")
        equal_ranks("linear", module, factors)
        down = sum(own.read_down() for own in factors.values())
        up = sum(own.read_up() for own in factors.values())
        updates[module] = product(parameters.scaling * up, down)
    return plain_result("linear", inputs, parameters, updates)


METHOD = Method(
    name="linear",
    parameters=Parameters,
    run=run,
    needs_data=False,
    paper="Composing Parameter-Efficient Modules with Arithmetic Operations, NeurIPS 2023",
    output_rank="the adapters' rank",
    cost="one sum",
)
