"""LoRA-LEGO (Zhao et al., 2025): cluster the rank-one units of all adapters, one merged rank per cluster.

Unit i of adapter k is row i of A_k with column i of B_k. Units are clustered by k-means on both halves, each
normalised; a centroid is the mean of its members, rescaled to their mean norm, and the update is scaled by
``sqrt(mean rank / clusters)`` so that its size does not depend on the number of clusters.
"""

import hashlib
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..parameters import Strict
from ..result import MergeResult
from .algebra import product
from .base import MergeInputs, Method, factors_at, modules_of, plain_result


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
        ranks = {task: down.shape[0] for task, (down, _) in factors.items()}
        down = torch.cat([down for down, _ in factors.values()])
        up = torch.cat([up.T for _, up in factors.values()])
        clusters = max(ranks.values()) if parameters.rank is None else parameters.rank
        if clusters >= down.shape[0]:
            labels = torch.arange(down.shape[0])
        else:
            start = initial_units(inputs.seed, module, ranks)[:clusters]
            labels = _kmeans(torch.cat([_unit(down), _unit(up)], dim=1), start, parameters.iterations)
        centroids = _centroids(torch.cat([down, up], dim=1), labels, parameters.norm)
        a, b = centroids.split([down.shape[1], up.shape[1]], dim=1)
        scale = parameters.scaling
        if parameters.scale_output:
            scale *= (sum(ranks.values()) / len(ranks) / clusters) ** 0.5
        updates[module] = product(scale * b.T, a)
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


def _unit(rows: Tensor) -> Tensor:
    norm = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norm > 0, norm, 1.0)


def _kmeans(points: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Labels after the last assignment; an empty cluster keeps its centroid."""
    centroids = points[start].clone()
    labels = start
    for _ in range(iterations):
        # All points have norm 1 or sqrt(2): the nearest centroid needs only products.
        distance = centroids.square().sum(1) - 2 * points @ centroids.T
        labels = distance.argmin(1)
        members = torch.nn.functional.one_hot(labels, centroids.shape[0]).to(points.dtype)
        count = members.sum(0)
        mean = members.T @ points / count.clamp(min=1)[:, None]
        centroids = torch.where(count[:, None] > 0, mean, centroids)
    return labels


def _centroids(units: Tensor, labels: Tensor, norm: str | None) -> Tensor:
    """Mean of the units of each cluster that has some, rescaled to their mean norm."""
    _, labels = labels.unique(return_inverse=True)
    members = torch.nn.functional.one_hot(labels).to(units.dtype)
    members = members / members.sum(0)
    mean = members.T @ units
    if norm is None:
        return mean
    order = 2 if norm == "l2" else float("inf")
    own = torch.linalg.vector_norm(mean, order, dim=1)
    target = members.T @ torch.linalg.vector_norm(units, order, dim=1)
    return mean * (target / torch.where(own > 0, own, 1.0))[:, None]


METHOD = Method(
    name="lego",
    parameters=Parameters,
    run=run,
    needs_data=False,
    paper="Merging LoRAs like Playing LEGO, ICLR 2025",
    output_rank="number of clusters",
    cost="O(iterations R clusters d) per module, R the sum of the ranks",
)
