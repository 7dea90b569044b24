"""DARE (Yu et al., 2024): drop entries at random, rescale the rest, add up.

    DW = lambda sum_k M_k * D_k / (1 - p),    M_k ~ Bernoulli(1 - p) for each entry

Updates of LoRA adapters are less redundant than those of full fine-tuning: the drop probability of the paper,
0.9, harms them. The defaults are those used for adapters by KnOTS (Stoica et al., 2025).
"""

from pydantic import Field

from ..result import MergeResult
from .base import MergeInputs, Method
from .elementwise import Drop, Dropping, dropped_sum
from .ties import dense_result, matrices_of


class Parameters(Dropping):
    """
    Attributes:
        drop: probability p of an entry to be dropped.
        scaling: lambda.
        max_rank: of the merged updates. Default: full rank.
    """

    scaling: float = 0.3
    max_rank: int | None = Field(None, ge=1)


def run(inputs: MergeInputs, parameters: Parameters) -> MergeResult:
    drop = Drop(parameters.drop, inputs.seed)
    return dense_result("dare", inputs, parameters, dropped_sum(matrices_of(inputs), drop))


METHOD = Method(
    name="dare",
    parameters=Parameters,
    run=run,
    needs_data=False,
    paper="Language Models are Super Mario: Absorbing Abilities from Homologous Models, ICML 2024",
    output_rank="full, or max_rank",
    cost="dense updates of one module at a time and one decomposition of each merged update",
)
