"""KnOTS-DARE-TIES (Stoica et al., 2025): random drops on the aligned representations, then KnOTS-TIES."""

from typing import Literal

from pydantic import Field

from ..result import MergeResult
from . import knots_ties
from .base import MergeInputs, Method
from .elementwise import Drop, Dropping


class Parameters(knots_ties.Parameters, Dropping):
    """
    Attributes:
        drop: probability of an entry of the aligned representation to be dropped.
        order: what comes first. The rest as for "knots_ties"; nothing is trimmed by default.
    """

    drop: float = Field(0.1, ge=0, lt=1)
    order: Literal["drop_first", "trim_first"] = "drop_first"
    density: float = Field(1.0, gt=0, le=1)
    scaling: float = 0.7


def run(inputs: MergeInputs, parameters: Parameters) -> MergeResult:
    drop = Drop(parameters.drop, inputs.seed, after_trim=parameters.order == "trim_first")
    return knots_ties.merge("knots_dare_ties", inputs, parameters, drop)


METHOD = Method(
    name="knots_dare_ties",
    parameters=Parameters,
    run=run,
    needs_data=False,
    paper="Model Merging with SVD to Tie the Knots, ICLR 2025",
    output_rank="sum of ranks at most",
    cost="O(d R^2 + K R r d) per module, R the sum of the ranks",
)
