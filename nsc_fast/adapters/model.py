"""What an adapter is once it has been read: plain frozen data, no live model behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nsc_fast.factors import LowRankUpdate, canonical

__all__ = ["PREFIX", "Adapter", "AdapterError", "LoraFactors", "Problem"]

# In front of every key of an adapter file: PeftModel.base_model.model is the base.
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Problem:
    """One reason why something is refused.

    Attributes:
        subject: the field (with its value), tensor, module or file.
        reason: what is wrong with it.
        way_out: what the user can do about it.
    """

    subject: str
    reason: str
    way_out: str


class AdapterError(ValueError):
    """An adapter, a set of adapters or an output that is refused.

    The message names where (adapter or output), every subject with its reason, and the way out.
    Problems that differ only in their subject are told once, with the first subjects.

    Attributes:
        where: for example ``"adapter 'vqa'"``.
        problems: all that was found, not only the first.
    """

    def __init__(self, where: str, *problems: Problem) -> None:
        # All arguments go to args, so that the error survives pickling between processes.
        super().__init__(where, *problems)
        self.where = where
        self.problems = problems

    def __str__(self) -> str:
        subjects: dict[tuple[str, str], list[str]] = {}
        for problem in self.problems:
            subjects.setdefault((problem.reason, problem.way_out), []).append(problem.subject)
        lines = [
            f"{_first(names)}: {reason}. Way out: {way_out}." for (reason, way_out), names in subjects.items()
        ]
        if len(lines) == 1:
            return f"{self.where}: {lines[0]}"
        return "\n  - ".join([f"{self.where}: {len(lines)} problems", *lines])


def _first(names: list[str], limit: int = 3) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """The update ``scaling * up @ down`` of one linear module, as the file stores it.

    Attributes:
        down: A, ``(r, d_in)``.
        up: B, ``(d_out, r)``.
        scaling: ``alpha / r`` or ``alpha / sqrt(r)``, patterns resolved.
    """

    down: Tensor
    up: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of the weight that is updated."""
        return self.up.shape[0], self.down.shape[1]


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA adapter.

    Attributes:
        name: how messages, reports and coefficients call it.
        source: folder, hub id or ``"live model"``.
        base_model: the base that it was trained on, as its config says.
        task_type: PEFT's task type, for example ``"SEQ_CLS"``.
        modules: factors by module path in the base model (no ``base_model.model.`` prefix).
        config: the adapter's own config, untouched.
        heads: tensors of ``modules_to_save`` by path in the base model; only with
            ``modules_to_save="keep-separate"``.
        dense: the same with ``modules_to_save="merge-dense"``, to be merged.
        notices: what the user should know although it does not stop the merge.
        digest: sha256 of the weights file (of the tensors for a live model).
        dtype: dtype of the factors as stored; several joined by ``+``.
    """

    name: str
    source: str
    base_model: str | None
    task_type: str | None
    modules: dict[str, LoraFactors]
    config: dict[str, Any]
    heads: dict[str, Tensor] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    digest: str = ""
    dtype: str = ""

    def canonical(self) -> dict[str, LowRankUpdate]:
        """Canonical factors of every module, float64, in the order of ``modules``."""
        return {
            path: canonical(factors.down, factors.up, factors.scaling)
            for path, factors in self.modules.items()
        }
