"""MergeResult: what every method returns, and how it is written."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import save
from torch import Tensor

from . import __version__
from .adapters import WriteReport, write_lora
from .factors import LowRankUpdate

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
        interrupted: the user stopped the optimisation; the coefficients are those reached by then.
        measure: what the history's values per task are.
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
    interrupted: bool = False
    measure: str = "null-space ratio"
    task_type: str | None = None
    recipe: Mapping[str, Any] | None = None

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
        return write_lora(
            out,
            self.updates,
            base_model=self.base_model,
            base_shapes=self.base_shapes,
            task_type=self.task_type,
            max_rank=max_rank,
            dtype=dtype,
            extra_files=self.evidence(),
            overwrite=overwrite,
        )

    def evidence(self) -> dict[str, bytes | str]:
        """Files beside the adapter: recipe, coefficients, metrics, environment, model card."""
        files: dict[str, bytes | str] = {
            "README.md": self._card(),
            "nsc_fast/environment.json": json.dumps(environment(), indent=2, sort_keys=True) + "\n",
            "nsc_fast/merge.json": json.dumps(self._summary(), indent=2, sort_keys=True) + "\n",
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
        for task, tensors in self.heads.items():
            files[f"heads/{task}.safetensors"] = save({k: v.contiguous() for k, v in tensors.items()})
        if self.history:
            lines = [json.dumps(asdict(record)) for record in self.history]
            files["nsc_fast/metrics.jsonl"] = "\n".join(lines) + "\n"
        return files

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
        }

    def _card(self) -> str:
        """Model card; the front matter is what the hub reads."""
        head = {
            "library_name": "peft",
            "base_model": self.base_model,
            "tags": ["lora", "merge", "nsc_fast", self.method],
        }
        sources = "\n".join(
            f"- `{task}`: {_public(source['source'])} (sha256 {source['digest'][:16]})"
            for task, source in self.sources.items()
        )
        ratios = ""
        if self.history:
            first, last = self.history[0], self.history[-1]
            rows = "\n".join(
                f"| {task} | {first.ratios[task]:.4f} | {last.ratios.get(task, float('nan')):.4f} |"
                for task in first.ratios
            )
            ratios = (
                f"\n## Mean {self.measure}\n\nOf every task, before and after {len(self.history)} steps."
                f"\n\n| task | first step | last step |\n|---|---|---|\n{rows}\n"
            )
        notices = "".join(f"\n> {notice}\n" for notice in self.notices)
        return (
            f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"
            f"# Merge of {len(self.tasks)} LoRA adapters\n\n"
            f"One LoRA made from {len(self.tasks)} adapters of one base model by `{self.method}` "
            f"with nsc_fast {__version__}.\n\n## Sources\n\n"
            f"{sources or '- not recorded'}\n{notices}{ratios}\n"
            "The licence of this adapter follows from those of its sources.\n\n"
            f"## Parameters\n\n```yaml\n{yaml.safe_dump(dict(self.parameters), sort_keys=False)}```\n"
        )


def _public(source: str) -> str:
    """A hub id as it is; of a folder only its name, for a card that may be published."""
    return Path(source).name if Path(source).is_absolute() else source


def environment() -> dict[str, str]:
    """Versions that a result depends on."""
    out = {"nsc_fast": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "not installed"
    return out
