"""MergeResult: what every method returns, and how it is written."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import save
from torch import Tensor

from . import __version__
from .adapters import WriteReport, write_lora
from .adapters.write import numerical_rank
from .dense import DenseMerge
from .factors import LowRankUpdate
from .interference import Interference
from .report import card, page, read_record

if TYPE_CHECKING:
    from .driver import StepRecord

__all__ = ["MergeResult"]

_PACKAGES = ("torch", "triton", "transformers", "peft", "safetensors", "numpy")


@dataclass(frozen=True)
class MergeResult:
    """The merged update of every adapted module, and how it came about.

    Attributes:
        method: name of the method.
        tasks: names of the merged adapters.
        updates: module path -> merged update, canonical, of full rank.
        base_model: id or path of the base model, if known.
        base_shapes: shapes of the base's linear modules, for the writer; None if the base was not loaded.
        coefficients: module path -> merge coefficients in the order of ``stack_tasks[module]`` (one per task
            or per singular direction), for methods that have them.
        stack_tasks: module path -> tasks that adapt it.
        history: one record a step, for methods that optimise.
        parameters: of the method, resolved.
        sources: task -> where its adapter came from and the digest of its weights.
        notices: what the user should know.
        heads: task -> tensors of its separately kept head (``modules_to_save``), never merged.
        dense: modules that the adapters had trained whole, merged (``modules_to_save="merge-dense"``).
        interrupted: the user stopped the optimisation; the coefficients are those reached by then.
        measure: what the history's values per task are.
        interference: module path -> overlaps and cosines between the adapters.
        signal: null-space ratios on the tasks' unlabeled data, see :class:`nsc_fast.report.record.Signal`.
    """

    method: str
    tasks: tuple[str, ...]
    updates: Mapping[str, LowRankUpdate]
    base_model: str | None = None
    base_shapes: Mapping[str, tuple[int, int] | None] | None = None
    coefficients: Mapping[str, Tensor] | None = None
    stack_tasks: Mapping[str, tuple[str, ...]] | None = None
    history: Sequence[StepRecord] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    dense: DenseMerge | None = None
    interrupted: bool = False
    measure: str = "null-space ratio"
    task_type: str | None = None
    recipe: Mapping[str, Any] | None = None
    interference: Mapping[str, Interference] | None = None
    signal: Mapping[str, Any] | None = None

    def save_pretrained(
        self,
        out: str | os.PathLike[str],
        *,
        max_rank: int | None = None,
        dtype: torch.dtype = torch.float32,
        overwrite: bool = False,
    ) -> WriteReport:
        """Writes one LoRA that PEFT, vLLM and llama.cpp load, and the evidence of the run beside it.

        Args:
            out: output folder; must not exist or be empty unless ``overwrite``.
            max_rank: truncate to this rank. Default: lossless, the sum of the ranks.
            dtype: of the written factors.

        Raises:
            AdapterError: the output exists, the base model is unknown, or values that ``dtype`` cannot hold.
        """
        extra = self.evidence(max_rank=max_rank, dtype=dtype)
        return self.save_lora(out, max_rank=max_rank, dtype=dtype, extra_files=extra, overwrite=overwrite)

    def save_lora(self, out: str | os.PathLike[str], **options: Any) -> WriteReport:
        """The LoRA alone; ``options`` are those of :func:`nsc_fast.adapters.write_lora`."""
        return write_lora(
            out,
            self.updates,
            base_model=self.base_model,
            base_shapes=self.base_shapes,
            task_type=self.task_type,
            whole=None if self.dense is None else self.dense.modules,
            **options,
        )

    def evidence(
        self,
        *,
        max_rank: int | None = None,
        dtype: torch.dtype = torch.float32,
        applied: str | None = None,
    ) -> dict[str, bytes | str]:
        """Files beside the adapter: recipe, coefficients, metrics, environment, report, model card.

        Args:
            max_rank, dtype: of the adapter, as for :meth:`save_pretrained`.
            applied: of a full model: ``nsc_fast/apply.json``.
        """
        measurements = self._measurements(max_rank, dtype)
        files: dict[str, bytes | str] = {
            "nsc_fast/environment.json": json.dumps(environment(), indent=2, sort_keys=True) + "\n",
            "nsc_fast/merge.json": json.dumps(self._summary(), indent=2, sort_keys=True) + "\n",
            "nsc_fast/measurements.json": json.dumps(measurements, separators=(",", ":")) + "\n",
        }
        if self.recipe is not None:
            files["nsc_fast/config.resolved.yaml"] = yaml.safe_dump(dict(self.recipe), sort_keys=False)
        if self.coefficients:
            tensors = {m: c.to(torch.float64).contiguous() for m, c in self.coefficients.items()}
            files["nsc_fast/coefficients.safetensors"] = save(tensors)
            table = {
                m: {"tasks": list(self.stack_tasks[m]), "values": c.tolist()}
                for m, c in self.coefficients.items()
            }
            files["nsc_fast/coefficients.json"] = json.dumps(table, indent=2, sort_keys=True) + "\n"
        if applied is not None:
            files["nsc_fast/apply.json"] = applied
        for task, tensors in self.heads.items():
            files[f"heads/{task}.safetensors"] = save({k: v.contiguous() for k, v in tensors.items()})
        if self.history:
            lines = [json.dumps(asdict(record)) for record in self.history]
            files["nsc_fast/metrics.jsonl"] = "\n".join(lines) + "\n"
        # From the files, as later: whatever they lack is missed at once.
        record = read_record(files)
        return {**files, "README.md": card(record), "nsc_fast/report.html": page(record)}

    def _summary(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "tasks": list(self.tasks),
            "base_model": self.base_model,
            "parameters": dict(self.parameters),
            "sources": {task: dict(source) for task, source in self.sources.items()},
            "notices": list(self.notices),
            "interrupted": self.interrupted,
            "modules": len(self.updates),
            "measure": self.measure,
        }

    def _measurements(self, max_rank: int | None, dtype: torch.dtype) -> dict[str, Any]:
        """What the report needs beside the other files, in as many digits as it can show."""
        ranks = {module: numerical_rank(update) for module, update in self.updates.items()}
        written = {m: max(1, min(rank, max_rank or rank)) for m, rank in ranks.items()}
        return {
            "output": {
                "rank": max(written.values(), default=1),
                "max_rank": max_rank,
                "dtype": str(dtype).removeprefix("torch."),
            },
            "spectrum": {
                module: {
                    "shape": list(update.shape),
                    "energy": float(f"{update.energy:.6g}"),
                    "kept": round(update.truncate(written[module])[1], 6),
                    "values": [float(f"{s:.4g}") for s in update.singular_values[: ranks[module]].tolist()],
                }
                for module, update in self.updates.items()
            },
            "interference": {
                module: {
                    "tasks": list(own.tasks),
                    "ranks": list(own.ranks),
                    **{key: _pairs(getattr(own, key)) for key in ("rows", "columns", "cosine")},
                }
                for module, own in (self.interference or {}).items()
            },
            "signal": _rounded(self.signal),
        }


def _pairs(matrix: Tensor) -> list[float | None]:
    """Above the diagonal, row by row."""
    rows, columns = torch.triu_indices(*matrix.shape, offset=1)
    return [_rounded(value) for value in matrix[rows, columns].tolist()]


def _rounded(content: Any) -> Any:
    """With four decimals; None for what is no number, which JSON does not know."""
    if isinstance(content, Mapping):
        return {key: _rounded(value) for key, value in content.items()}
    if isinstance(content, float):
        return round(content, 4) if math.isfinite(content) else None
    return content


def environment() -> dict[str, str]:
    """Versions that a result depends on."""
    out = {"nsc_fast": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "not installed"
    return out
