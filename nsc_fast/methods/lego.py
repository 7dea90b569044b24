"""LoRA-LEGO (Zhao et al., 2025): cluster the rank-one units of all adapters, one merged rank per cluster.

Unit i of adapter k is row i of A_k with column i of B_k. Units are clustered by k-means on both halves, each
normalised; a centroid is the mean of its members, rescaled to their mean norm, and the update is scaled by
``sqrt(mean rank / clusters)`` so that its size does not depend on the number of clusters.

Centroids are combinations of units, so k-means needs the inner products of the units and nothing else. These,
the norms and the final means are made from blocks of columns: the units are never together in memory.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..parameters import Strict
from ..result import MergeResult
from .algebra import product
from .base import MergeInputs, Method, ScaledFactors, factors_at, modules_of, plain_result


class Parameters(Strict):
    """
    Attributes:
        rank: number of clusters, the rank of the result. Default: the largest rank among the adapters.
        iterations: of k-means.
        norm: of the units and centroids in the rescaling: "l2", or "max", the largest entry, as the baselines
            in the NSC paper do; None leaves centroids as they are.
        scale_output: multiply by ``sqrt(mean rank / clusters)``.
        scaling: lambda.
    """

    rank: int | None = Field(None, ge=1)
    iterations: int = Field(10, ge=1)
    norm: Literal["l2", "max"] | None = "l2"
    scale_output: bool = True
    scaling: float = 1.0


def run(inputs: MergeInputs, parameters: Parameters) -> MergeResult:
    updates = {}
    for module in modules_of(inputs):
        factors = factors_at(inputs, module, fold="split")
        ranks = {task: own.rank for task, own in factors.items()}
        total = sum(ranks.values())
        halves = [partial(_halves, list(factors.values()), up) for up in (False, True)]
        clusters = max(ranks.values()) if parameters.rank is None else parameters.rank
        if clusters >= total:
            labels = torch.arange(total, device=next(iter(factors.values())).down.device)
        else:
            start = initial_units(inputs.seed, module, ranks)[:clusters]
            labels = _kmeans(sum(_cosines(half) for half in halves), start, parameters.iterations)
        down, up = _centroids(halves, labels, parameters.norm)
        scale = parameters.scaling
        if parameters.scale_output:
            scale *= (total / len(ranks) / clusters) ** 0.5
        updates[module] = product(up.mul_(scale).T, down)
    return plain_result("lego", inputs, parameters, updates)


def initial_units(seed: int, module: str, ranks: dict[str, int]) -> Tensor:
    """Units in random order; the first ones are the initial centroids.

    Each task draws from a generator of its own, so that the order of the tasks does not matter.
    """
    keys = []
    for task, rank in ranks.items():
        digest = hashlib.sha256(f"{seed}/{task}/{module}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        keys.append(torch.rand(rank, generator=generator, dtype=torch.float64))
    return torch.cat(keys).argsort()


# Columns of the stacked units in memory at a time.
_BLOCK = 256

# Gives the blocks, ``(R, columns)``, of all units' halves A or B anew at each call.
Half = Callable[[], Iterator[Tensor]]


def _halves(factors: list[ScaledFactors], up: bool) -> Iterator[Tensor]:
    sides = [(own.up.T, own.up_scale) if up else (own.down, own.down_scale) for own in factors]
    for start in range(0, sides[0][0].shape[1], _BLOCK):
        yield torch.cat([side[:, start : start + _BLOCK].detach().double() * scale for side, scale in sides])


def _cosines(half: Half) -> Tensor:
    """Inner products of the normalised halves, ``(R, R)``; zero for a half that is zero."""
    # Divided by the largest entry first: squares of small numbers would be lost.
    largest = _norms(half, float("inf"))
    largest = torch.where(largest > 0, largest, 1.0)[:, None]
    gram = sum(scaled @ scaled.T for scaled in (block / largest for block in half()))
    norm = gram.diagonal().sqrt()
    norm = torch.where(norm > 0, norm, 1.0)
    return gram / norm[:, None] / norm


def _norms(half: Half, order: float) -> Tensor:
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(block, order, dim=1) for block in half()]), order, dim=0
    )


def _kmeans(gram: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Labels after the last assignment; an empty cluster keeps its centroid.

    Args:
        gram: inner products of the points.
        start: points that are the first centroids.
    """
    # Row i of ``weights`` says how centroid i is combined of the points.
    weights = torch.nn.functional.one_hot(start.to(gram.device), gram.shape[0]).to(gram.dtype)
    labels = start
    for _ in range(iterations):
        # All points have norm 1 or sqrt(2): the nearest centroid needs only products.
        products = gram @ weights.T
        distance = (weights * products.T).sum(1) - 2 * products
        labels = distance.argmin(1)
        members = torch.nn.functional.one_hot(labels, weights.shape[0]).to(gram.dtype).T
        count = members.sum(1, keepdim=True)
        weights = torch.where(count > 0, members / count.clamp(min=1), weights)
    return labels


def _centroids(halves: list[Half], labels: Tensor, norm: str | None) -> tuple[Tensor, Tensor]:
    """Mean of the units of each cluster that has some, rescaled to their mean norm; as halves."""
    _, labels = labels.unique(return_inverse=True)
    members = torch.nn.functional.one_hot(labels).to(torch.float64)
    members = members / members.sum(0)
    means = [torch.cat([members.T @ block for block in half()], dim=1) for half in halves]
    if norm is not None:
        order = 2 if norm == "l2" else float("inf")

        def joint(norms: list[Tensor]) -> Tensor:
            return torch.linalg.vector_norm(torch.stack(norms), order, dim=0)

        own = joint([torch.linalg.vector_norm(mean, order, dim=1) for mean in means])
        target = members.T @ joint([_norms(half, order) for half in halves])
        for mean in means:
            mean *= (target / torch.where(own > 0, own, 1.0))[:, None]
    return means[0], means[1]


METHOD = Method(
    name="lego",
    parameters=Parameters,
    run=run,
    needs_data=False,
    paper="Merging LoRAs like Playing LEGO, ICLR 2025",
    output_rank="number of clusters",
    cost="O(iterations R clusters d) per module, R the sum of the ranks",
)
