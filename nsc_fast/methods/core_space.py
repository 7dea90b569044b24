"""Core Space merging (Panariello et al., 2025): any rule, applied to the cores of the updates.

    D_k = U M_k V,    DW = lambda U rule(M_1, ..., M_K) V

U and V are the singular bases of the stacked factors B and A. For TIES and DARE these bases matter, and with
them how the adapters' factors are scaled; ``s_k`` goes into B. All other rules give what they give on the
updates. ``space="knots"`` and ``space="full"`` apply the rules to the right singular vectors of
``[D_1 ... D_K]`` and to the updates themselves, the comparisons of that paper.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..factors import LowRankUpdate, embedded
from ..result import MergeResult
from . import spectral
from .algebra import Core, compress, energy_notice, joint_core, pairs_of
from .base import MergeInputs, Method, factors_at, modules_of, plain_result, updates_at
from .elementwise import Drop, Election, Entries, merged
from .knots_ties import align


class Parameters(Election):
    """
    Attributes:
        rule: "sum", "mean", "ties", "tsv", "cart" or "dare_ties"; Iso-C is "sum" with ``isotropic``.
        isotropic: replace the singular values of the merged update by their mean: over those of the core, or
            of the module in the other spaces.
        scaling: lambda.
        space: "core", "knots" or "full".
        density, trim, majority_sign, combine: of the election in "ties" and "dare_ties", always per module.
        drop: probability of an entry to be dropped in "dare_ties".
        cart_rank: share of the smaller side that CART keeps of every centred matrix.
        cart_scaling: factor on these.
        max_rank: of the merged updates where they are dense ("ties", "dare_ties" in the full space).
    """

    rule: Literal["sum", "mean", "ties", "tsv", "cart", "dare_ties"] = "tsv"
    isotropic: bool = False
    scaling: float = 1.0
    space: Literal["core", "knots", "full"] = "core"
    granularity: Literal["module"] = "module"
    density: float = Field(0.1, gt=0, le=1)
    drop: float = Field(0.1, ge=0, lt=1)
    cart_rank: float = Field(0.04, gt=0, le=1)
    cart_scaling: float = 0.1
    max_rank: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _truncatable(self) -> "Parameters":
        if self.isotropic and self.max_rank is not None:
            raise ValueError(
                "isotropic updates have equal singular values: no max_rank can choose among them"
            )
        return self


def run(inputs: MergeInputs, parameters: Parameters) -> MergeResult:
    updates, kept = {}, {}
    for module in modules_of(inputs):
        space = _space(inputs, module, parameters)
        matrix = _merged(inputs, module, space, parameters).mul_(parameters.scaling)
        updates[module], kept[module] = space.embed(matrix)
        if parameters.isotropic:
            updates[module] = spectral.isotropic(updates[module], space.isotropic_side)
    dense = parameters.space == "full" and _elementwise(parameters)
    notices = energy_notice(kept, parameters.max_rank) if dense else ()
    return plain_result("core_space", inputs, parameters, updates, notices)


@dataclass(frozen=True)
class _Space:
    """The matrices that a rule sees at one module, and the way back.

    Attributes:
        entries: task -> matrix.
        side: number of singular values that a matrix has, which CART's rank refers to.
        isotropic_side: number of singular values that the mean of Iso-C runs over.
        quotas: of TSV.
        embed: merged matrix -> update, and the share of energy kept; both the matrix and the bases of the
            space are lost.
    """

    entries: Mapping[str, Entries]
    side: int
    isotropic_side: int
    quotas: list[int]
    embed: Callable[[Tensor], tuple[LowRankUpdate, float]]

    def matrices(self) -> list[Tensor]:
        return [entries.rows(0, entries.shape[0]) for entries in self.entries.values()]


def _elementwise(parameters: Parameters) -> bool:
    return parameters.rule in ("ties", "dare_ties")


def _space(inputs: MergeInputs, module: str, parameters: Parameters) -> _Space:
    if parameters.space == "knots":
        return _knots_space(updates_at(inputs, module))
    if parameters.space == "full" and _elementwise(parameters):
        updates = updates_at(inputs, module)
        shape = next(iter(updates.values())).shape
        entries = {task: Entries.of(update) for task, update in updates.items()}
        side = min(shape)
        return _Space(entries, side, side, [], lambda matrix: compress(matrix, parameters.max_rank))
    if _elementwise(parameters):
        own = factors_at(inputs, module, fold="up")
        scales = [factors.up_scale for factors in own.values()]
        core = joint_core({task: (factors.down, factors.up) for task, factors in own.items()}, scales)
    else:
        core = joint_core(pairs_of(updates_at(inputs, module)))
    # Rules on singular values are the same in the full space; only their counts refer to another size.
    return _core_space(core, min(core.shape) if parameters.space == "full" else core.side)


def _core_space(core: Core, side: int) -> _Space:
    # A density refers to cores of the size they would have if the stacks had full rank, as published.
    return _Space(
        {task: Entries(matrix, nominal=core.nominal) for task, matrix in core.matrices.items()},
        side,
        side,
        spectral.quotas(core.ranks, core.shape),
        lambda matrix: (core.embed(matrix), 1.0),
    )


def _knots_space(updates: dict[str, LowRankUpdate]) -> _Space:
    left, aligned = align(updates)
    scale = torch.cat([entries.left for entries in aligned.values()], dim=1).norm(dim=1)
    entries = {task: Entries(e.left / scale[:, None], e.right) for task, e in aligned.items()}
    shape = next(iter(updates.values())).shape
    return _Space(
        entries,
        min(left.shape[1], shape[1]),
        min(shape),
        spectral.quotas({task: update.rank for task, update in updates.items()}, shape),
        lambda matrix: (embedded(left, matrix.mul_(scale[:, None])), 1.0),
    )


def _merged(inputs: MergeInputs, module: str, space: _Space, parameters: Parameters) -> Tensor:
    """The rule's matrix, in memory of its own."""
    if not _elementwise(parameters):
        return _spectral(space, parameters)
    drop = Drop(parameters.drop, inputs.seed) if parameters.rule == "dare_ties" else None
    # Thresholds are those of a module, so that modules need not be there together.
    ((_, matrix),) = merged({module: space.entries}, parameters, drop)
    return matrix


def _spectral(space: _Space, parameters: Parameters) -> Tensor:
    matrices = space.matrices()
    if parameters.rule == "tsv":
        return spectral.task_singular_vectors(matrices, space.quotas)
    if parameters.rule == "cart":
        rank = math.ceil(parameters.cart_rank * space.side)
        return spectral.cart(matrices, rank, parameters.cart_scaling)
    total = torch.stack(matrices).sum(0)
    return total if parameters.rule == "sum" else total / len(matrices)


METHOD = Method(
    name="core_space",
    parameters=Parameters,
    run=run,
    needs_data=False,
    paper="Accurate and Efficient Low-Rank Model Merging in Core Space, NeurIPS 2025",
    output_rank="sum of ranks at most",
    cost="O(d R^2 + K R^3) per module, R the sum of the ranks",
)
