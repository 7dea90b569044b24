"""LoRE-Merging (Liu et al., 2025): an approximate common update and low-rank differences of the tasks to it.

    min  sum_k ||T + E_k - D_k||_F^2 + mu ||E_k||_*,        DW = T + lambda mean_k E_k

by turns: T is the mean of ``D_k - E_k``, and E_k is ``D_k - T`` with its singular values reduced by tau.
Means and singular values commute with orthonormal bases, so the iteration runs on the cores and is exact.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..parameters import Strict
from ..result import MergeResult
from .algebra import joint_core, pairs_of
from .base import MergeInputs, Method, modules_of, plain_result, updates_at
from .spectral import soft_threshold


class Parameters(Strict):
    """
    Attributes:
        tau: how much singular values are reduced.
        tau_unit: "absolute", or "largest": in units of the largest singular value among the tasks' updates of
            the module, which makes the result follow their scale.
        iterations: of the alternation.
        scaling: lambda on the differences.
    """

    tau: float = Field(0.01, ge=0)
    tau_unit: Literal["absolute", "largest"] = "absolute"
    iterations: int = Field(20, ge=1)
    scaling: float = 1.0


def run(inputs: MergeInputs, parameters: Parameters) -> MergeResult:
    updates = {}
    for module in modules_of(inputs):
        own = updates_at(inputs, module)
        core = joint_core(pairs_of(own))
        tau = parameters.tau
        if parameters.tau_unit == "largest":
            tau *= max(float(u.singular_values[:1].sum()) for u in own.values())
        common, differences = decompose(torch.stack(list(core.matrices.values())), tau, parameters.iterations)
        updates[module] = core.embed(common + parameters.scaling * differences.mean(0))
    return plain_result("lore", inputs, parameters, updates)


def decompose(matrices: Tensor, tau: float, iterations: int) -> tuple[Tensor, Tensor]:
    """T, ``(m, n)``, and the differences E, ``(K, m, n)``, of matrices ``(K, m, n)``."""
    differences = torch.zeros_like(matrices)
    common = matrices.mean(0)
    for _ in range(iterations):
        differences = torch.stack([soft_threshold(matrix - common, tau) for matrix in matrices])
        common = (matrices - differences).mean(0)
    return common, differences


METHOD = Method(
    name="lore",
    parameters=Parameters,
    run=run,
    needs_data=False,
    paper="LoRE-Merging: Exploring Low-Rank Estimation For Large Language Model Merging, EMNLP Findings 2025",
    output_rank="sum of ranks at most",
    cost="O(d R^2 + iterations K R^3) per module, R the sum of the ranks",
)
