"""Iso-CTS (Marczak et al., 2025): a flat spectrum over a common and every task's own subspace.

The common part are the leading directions of the sum of the updates; each task adds the leading directions of
its update outside of them; all are orthogonalised together and get the mean of their singular values. Counts
refer to the directions that the updates span together, at most ``min(R, d_out, d_in)``.
"""

from pydantic import Field

from ..parameters import Strict
from ..result import MergeResult
from . import spectral
from .algebra import joint_core, pairs_of
from .base import MergeInputs, Method, modules_of, plain_result, updates_at


class Parameters(Strict):
    """
    Attributes:
        common_fraction: share of the directions that belongs to the common part.
        scaling: lambda.
    """

    common_fraction: float = Field(0.8, ge=0, le=1)
    scaling: float = 1.0


def run(inputs: MergeInputs, parameters: Parameters) -> MergeResult:
    updates = {}
    for module in modules_of(inputs):
        core = joint_core(pairs_of(updates_at(inputs, module)))
        matrix = spectral.isotropic_task_aware(
            list(core.matrices.values()), core.side, parameters.common_fraction
        )
        updates[module] = core.embed(parameters.scaling * matrix)
    return plain_result("iso_cts", inputs, parameters, updates)


METHOD = Method(
    name="iso_cts",
    parameters=Parameters,
    run=run,
    needs_data=False,
    paper="No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, ICML 2025",
    output_rank="sum of ranks at most",
    cost="O(d R^2 + K R^3) per module, R the sum of the ranks",
)
