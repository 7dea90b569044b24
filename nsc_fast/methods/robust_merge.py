"""RobustMerge (Zeng et al., 2025): prune both factors, amplify the rows that lost most, normalise over tasks.

    A~_k, B~_k = prune(A_k), prune(B_k)        per matrix, by magnitude
    S_k[i] = sum_j |A_k[i, j]| / sum_j |A~_k[i, j]|,    S^_k = S_k / sum_k S_k
    DW = lambda (sum_k B~_k diag(S^_k)) (sum_k A~_k)

The published text has lambda = 2. The authors' code, with which the published numbers were made, applies
the 2 to both factors, so that its lambda is 4, and first lifts the smaller scales of a task to a quantile.
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..parameters import Strict
from ..result import MergeResult
from .algebra import product
from .base import MergeInputs, Method, equal_ranks, factors_at, modules_of, plain_result


class Parameters(Strict):
    """
    Attributes:
        density: share of entries that the pruning keeps in every A and every B.
        scaling: factor on the merged A and, in the code's rule, also on the merged B.
        clamp: share of the rows whose scales stay as they are; the others are lifted to the lowest of these.
            Code's rule only.
        rule: "code" or "paper".
    """

    density: float = Field(0.2, gt=0, le=1)
    scaling: float = 2.0
    clamp: float = Field(0.2, ge=0, le=1)
    rule: Literal["code", "paper"] = "code"


def run(inputs: MergeInputs, parameters: Parameters) -> MergeResult:
    updates = {}
    for module in modules_of(inputs):
        factors = factors_at(inputs, module, fold="split")
        equal_ranks("robust_merge", module, factors)
        down, up = merge_factors(
            (own.read_down() for own in factors.values()),
            (own.read_up() for own in factors.values()),
            parameters,
        )
        updates[module] = product(up, down)
    return plain_result("robust_merge", inputs, parameters, updates)


def merge_factors(
    downs: Iterable[Tensor], ups: Iterable[Tensor], parameters: Parameters
) -> tuple[Tensor, Tensor]:
    """Merged ``(down, up)`` of one module.

    The tasks' factors are read one after another, and no more than one is held: first every A, whose pruning
    gives the scales, then every B.
    """
    down, scales = None, []
    for full in downs:
        kept = _prune(full, parameters.density)
        scale = _row_scales(full, kept)
        scales.append(_lift(scale, parameters.clamp) if parameters.rule == "code" else scale)
        down = kept if down is None else down + kept
    share = torch.stack(scales)
    share = share / share.sum(0)
    up = sum(_prune(full, parameters.density) * part for full, part in zip(ups, share, strict=True))
    outer = parameters.scaling**2 if parameters.rule == "code" else parameters.scaling
    return down, outer * up


def _prune(matrix: Tensor, density: float) -> Tensor:
    """Entries at least as large as the floor(N (1 - density))-th smallest magnitude."""
    rank = int(matrix.numel() * (1.0 - density))
    if rank < 1:
        return matrix
    return torch.where(matrix.abs() >= matrix.abs().flatten().kthvalue(rank).values, matrix, 0.0)


def _row_scales(full: Tensor, pruned: Tensor) -> Tensor:
    """How much of every row the pruning took; a row that lost everything counts as the worst of the rest."""
    before, after = full.abs().sum(1), pruned.abs().sum(1)
    scale = before / torch.where(after > 0, after, 1.0)
    some = after > 0
    worst = scale[some].max() if some.any() else torch.ones((), dtype=scale.dtype)
    return torch.where(some, scale, worst)


def _lift(scales: Tensor, clamp: float) -> Tensor:
    last = scales.numel() - 1
    lowest = scales.sort().values[min(math.floor(scales.numel() * (1.0 - clamp)), last)]
    return scales.clamp(min=lowest)


METHOD = Method(
    name="robust_merge",
    parameters=Parameters,
    run=run,
    needs_data=False,
    paper="RobustMerge: Parameter-Efficient Model Merging for MLLMs with Direction Robustness, NeurIPS 2025",
    output_rank="the adapters' rank",
    cost="O(K r d) per module",
)
