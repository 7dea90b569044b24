"""DARE followed by TIES: drop entries at random, rescale, then trim, elect and merge.

The order of Yu et al. (2024). ``order="trim_first"`` trims before it drops, as the baselines in the NSC paper
do.
"""

from typing import Literal

from pydantic import Field

from ..result import MergeResult
from . import ties
from .base import MergeInputs, Method
from .elementwise import Drop, Dropping, merged


class Parameters(ties.Parameters, Dropping):
    """
    Attributes:
        drop: probability of an entry to be dropped.
        order: what comes first. The rest as for "ties"; nothing is trimmed by default.
    """

    order: Literal["drop_first", "trim_first"] = "drop_first"
    density: float = Field(1.0, gt=0, le=1)
    scaling: float = 0.6


def run(inputs: MergeInputs, parameters: Parameters) -> MergeResult:
    drop = Drop(parameters.drop, inputs.seed, after_trim=parameters.order == "trim_first")
    return ties.dense_result(
        "dare_ties", inputs, parameters, merged(ties.matrices_of(inputs), parameters, drop)
    )


METHOD = Method(
    name="dare_ties",
    parameters=Parameters,
    run=run,
    needs_data=False,
    paper="Language Models are Super Mario: Absorbing Abilities from Homologous Models, ICML 2024",
    output_rank="full, or max_rank",
    cost="dense updates of one module at a time and one decomposition of each merged update",
)
