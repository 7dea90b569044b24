"""Iso-C (Marczak et al., 2025): the sum of the updates with a flat spectrum.

    sum_k D_k = U S V^T,    DW = lambda mean(S) U V^T

For LoRA the sum has at most rank R = sum r_k, and the rule is restricted to its range: the mean runs over
the singular values of a core, ``min(R, d_out, d_in)`` of them unless the adapters share directions, and no
null-space direction is touched.
"""

import torch

from ..parameters import Strict
from ..result import MergeResult
from . import spectral
from .algebra import joint_core, pairs_of
from .base import MergeInputs, Method, modules_of, plain_result, updates_at


class Parameters(Strict):
    """``scaling``: lambda."""

    scaling: float = 1.0


def run(inputs: MergeInputs, parameters: Parameters) -> MergeResult:
    updates = {}
    for module in modules_of(inputs):
        core = joint_core(pairs_of(updates_at(inputs, module)))
        total = torch.stack(list(core.matrices.values())).sum(0)
        updates[module] = spectral.isotropic(core.embed(parameters.scaling * total), core.side)
    return plain_result("iso_c", inputs, parameters, updates)


METHOD = Method(
    name="iso_c",
    parameters=Parameters,
    run=run,
    needs_data=False,
    paper="No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, ICML 2025",
    output_rank="sum of ranks at most",
    cost="O(d R^2 + R^3) per module, R the sum of the ranks",
)
