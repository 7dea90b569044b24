"""Reversible Model Merging (Alipour and Amiri, 2025): a compressed store that rebuilds each adapter.

Not a merged model: the task must be known when the adapter is used. At every position, a row of B or a column
of A, the K adapters have one vector x_k of length r each; the store keeps their mean, p principal directions
and K codes of length p:

    x_k ~ mean + U c_k,    c_k = U^T (x_k - mean)

With ``p = min(r, K - 1)`` nothing is lost. The published count of ``p (r + K) + r`` values per position is
that of this centred form.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from ..errors import MergeError
from ..factors import LowRankUpdate, canonical
from ..parameters import Strict
from ..result import MergeResult
from .base import MergeInputs, Method, equal_ranks, factors_at, modules_of


class Parameters(Strict):
    """``components``: p. Default: the largest that needs less storage than the adapters do, at least 1."""

    components: int | None = Field(None, ge=0)


@dataclass(frozen=True)
class Compressed:
    """K vectors of length r at each of P positions, compressed.

    Attributes:
        mean: ``(P, r)``.
        basis: ``(P, r, p)``, orthonormal columns.
        codes: ``(P, p, K)``.
    """

    mean: Tensor
    basis: Tensor
    codes: Tensor

    def rebuild(self, index: int) -> Tensor:
        """The vectors of one adapter, ``(P, r)``."""
        return self.mean + (self.basis @ self.codes[:, :, index, None]).squeeze(-1)

    @property
    def values(self) -> int:
        """How many numbers are stored."""
        return self.mean.numel() + self.basis.numel() + self.codes.numel()


@dataclass(frozen=True)
class ReversibleResult(MergeResult):
    """A store of several adapters; ``updates`` is empty, for there is no merged model.

    Attributes:
        store: module path -> (columns of A, rows of B), compressed.
        stack_tasks: module path -> tasks that adapt it, in the order of the codes.
    """

    store: Mapping[str, tuple[Compressed, Compressed]] = field(default_factory=dict)

    def rebuild(self, task: str) -> dict[str, LowRankUpdate]:
        """The adapter of one task, canonical; scaling (alpha/r) is inside."""
        if task not in self.tasks:
            raise MergeError(f"there is no task {task!r} in this store; it holds {', '.join(self.tasks)}")
        out = {}
        for module, (down, up) in self.store.items():
            if task in self.stack_tasks[module]:
                index = self.stack_tasks[module].index(task)
                out[module] = canonical(down.rebuild(index).T, up.rebuild(index))
        return out

    def save_store(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Writes mean, basis and codes of every module as one safetensors file."""
        tensors = {
            f"{module}.{side}.{name}": getattr(part, name).to(dtype).contiguous()
            for module, parts in self.store.items()
            for side, part in zip(("down", "up"), parts, strict=True)
            for name in ("mean", "basis", "codes")
        }
        order = {module: ",".join(tasks) for module, tasks in self.stack_tasks.items()}
        save_file(tensors, path, metadata=order)

    def save_pretrained(self, out: str | os.PathLike[str], **_: Any) -> Any:
        raise MergeError(
            "method 'reversible' keeps the adapters apart and gives no merged one: call rebuild(task) for "
            "one of them or save_store(file) for all, or choose another method"
        )


def run(inputs: MergeInputs, parameters: Parameters) -> ReversibleResult:
    if inputs.weights:
        raise MergeError("method 'reversible' keeps the adapters as they are; leave the weights out")
    store, order, kept, whole = {}, {}, 0, 0
    for module in modules_of(inputs):
        factors = factors_at(inputs, module, fold="split")
        rank = equal_ranks("reversible", module, factors)
        components = _components(rank, len(factors), parameters)
        store[module] = (
            compress(torch.stack([own.read_down().T for own in factors.values()]), components),
            compress(torch.stack([own.read_up() for own in factors.values()]), components),
        )
        order[module] = tuple(factors)
        kept += sum(part.values for part in store[module])
        whole += sum(own.down.numel() + own.up.numel() for own in factors.values())
    return ReversibleResult(
        method="reversible",
        tasks=inputs.tasks,
        updates={},
        stack_tasks=order,
        parameters=parameters.model_dump(mode="json"),
        notices=(f"the store holds {kept / max(whole, 1):.1%} of the adapters' values",),
        store=store,
    )


def _components(rank: int, tasks: int, parameters: Parameters) -> int:
    lossless = min(rank, tasks - 1)
    if parameters.components is not None:
        return min(parameters.components, lossless)
    saving = (rank * tasks - rank - 1) // (rank + tasks)
    return min(max(saving, 1), lossless)


def compress(vectors: Tensor, components: int) -> Compressed:
    """Principal components of ``(K, P, r)`` vectors at each of the P positions."""
    mean = vectors.mean(0)
    centred = (vectors - mean).permute(1, 2, 0)  # (P, r, K)
    left, s, right = torch.linalg.svd(centred, full_matrices=False)
    return Compressed(mean, left[:, :, :components], s[:, :components, None] * right[:, :components])


METHOD = Method(
    name="reversible",
    parameters=Parameters,
    run=run,
    needs_data=False,
    paper="Towards Reversible Model Merging For Low-rank Weights, 2025",
    output_rank="the adapters' rank; one adapter per task",
    cost="O(d r K min(r, K)) per module",
    one_model=False,
)
