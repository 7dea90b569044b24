"""The full model: a LoRA added to its base, from the base's files to new ones, without loading the model.

    W' = round(W + s B A)

The sum is formed in float32 and rounded once to the dtype of the file. What this rounding takes away is
measured: bfloat16 has 8 significant bits, and little is left of an update of a thousandth of the weight's
size.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from torch import Tensor, nn

from .adapters import (
    Adapter,
    check_against_model,
    common_base,
    common_task_type,
    fit_to_model,
    read_adapter,
)
from .adapters.write import check_replaceable, replacing
from .checkpoint_files import (
    Entry,
    copied_files,
    locate_base,
    weight_entries,
    write_weights,
)
from .errors import MergeError
from .full_weights import BLOCK, CODES, Update, planned_tensors, updates_of
from .loading import base_skeleton
from .memory import parse_bytes, readable_bytes
from .quantised import quantised_by
from .recipe import BaseSpec
from .result import MergeResult

__all__ = ["FullModelPlan", "LORA", "FullModelReport", "apply_lora", "check_full", "plan_full", "save_full"]

LORA = Path("nsc_fast", "lora")
"""Where the merged LoRA lies in a full model that a merge wrote."""


@dataclass(frozen=True)
class FullModelReport:
    """What was written.

    Attributes:
        path: the folder.
        files: names of the weight files.
        size: bytes of the weights.
        rounding: module path -> ``||stored - (W + dW)|| / ||dW||``, Frobenius norms; the sum is that of
            float32, so float32 files lose nothing by this count.
        total_rounding: the same over all modules together. Its square is the lost share of energy.
        replaced: tensors that the adapter holds whole and that took the place of the base's.
        notices: what the user should know.
    """

    path: Path
    files: tuple[str, ...]
    size: int
    rounding: dict[str, float]
    total_rounding: float
    replaced: tuple[str, ...]
    notices: tuple[str, ...]


def apply_lora(
    lora: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: BaseSpec | None = None,
    dtype: torch.dtype | None = None,
    shard_size: str = "5GB",
    overwrite: bool = False,
    on_stage: Callable[[str], None] = lambda _: None,
) -> FullModelReport:
    """Writes the base model with a LoRA in its weights, complete or not at all.

    One tensor at a time is in memory, and its new version. Names, dtypes and further files are those of the
    base's folder.

    Args:
        lora: folder or hub id, for example what ``merge`` wrote.
        out: folder to write.
        base: the base model. Default: the one that the adapter names.
        dtype: float32, bfloat16 or float16 for all floating-point weights. Default: as in the base's files.
        shard_size: weight files are no larger, except for a single tensor; for example "5GB".
        overwrite: replaces a model's folder.
        on_stage: told what is going on.

    Raises:
        AdapterError: an adapter that is not supported or does not fit; an output that exists.
        MergeError: a base that is quantised or has no safetensors files, an updated weight that is not in
            them by itself or that another module shares, too little space, or values that ``dtype`` cannot
            hold.
    """
    out = Path(out)
    where = f"output {str(out)!r}"
    check_replaceable(where, out, overwrite, marker="config.json")
    adapter = read_adapter(lora, name=Path(lora).name, modules_to_save="keep-separate")
    base = base or BaseSpec(path=common_base([adapter]))
    on_stage(f"looking at {base.path}")
    plan = plan_full(adapter, base, dtype=dtype, shard_size=shard_size)
    plan = replace(plan, notices=(*plan.notices, *_left_behind(lora)))
    plan.check_space(out)
    with replacing(where, out, overwrite, marker="config.json") as scratch:
        return replace(plan.write(scratch, on_stage), path=out)


def save_full(
    result: MergeResult,
    out: str | os.PathLike[str],
    *,
    base: BaseSpec,
    max_rank: int | None = None,
    dtype: torch.dtype | None = None,
    shard_size: str = "5GB",
    overwrite: bool = False,
    on_stage: Callable[[str], None] = lambda _: None,
) -> FullModelReport:
    """Writes the base model with a merge in its weights, and the evidence of the run, all of it or nothing.

    The evidence is that of a LoRA folder. The merged LoRA itself, in float32, is in ``nsc_fast/lora``:
    weights in half precision do not hold all of it.

    Args:
        result: of the merge.
        base: where the files of the base model are.
        max_rank: truncates the merged LoRA.
        out, dtype, shard_size, overwrite, on_stage: as for :func:`apply_lora`.

    Raises:
        AdapterError, MergeError: as of :func:`apply_lora`.
    """
    out = Path(out)
    where = f"output {str(out)!r}"
    check_replaceable(where, out, overwrite, marker="config.json")
    with replacing(where, out, overwrite, marker="config.json") as scratch:
        written = result.save_lora(scratch / LORA, max_rank=max_rank)
        adapter = replace(read_adapter(written.path, modules_to_save="keep-separate"), source=LORA.as_posix())
        plan = plan_full(adapter, base, dtype=dtype, shard_size=shard_size)
        told = (*plan.notices, *written.notices, *_left_out(result.heads, out))
        plan = replace(plan, notices=told)
        plan.check_space(out)
        report = replace(plan.write(scratch, on_stage), path=out)
        on_stage("writing the report")
        applied = (scratch / "nsc_fast" / "apply.json").read_text(encoding="utf-8")
        for name, content in result.evidence(max_rank=max_rank, applied=applied).items():
            (scratch / name).parent.mkdir(exist_ok=True)
            (scratch / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return report


def check_full(
    base: BaseSpec,
    adapters: Mapping[str, Adapter],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Whether a merge of these adapters can be written as a full model; for before it is made.

    Raises:
        AdapterError, MergeError: as of :func:`apply_lora`.
    """
    out = Path(out)
    check_replaceable(f"output {str(out)!r}", out, overwrite, marker="config.json")
    first = next(iter(adapters.values()))
    # Any factors do: it is about the modules.
    modules = {path: factors for own in adapters.values() for path, factors in own.modules.items()}
    whole = {path: tensor for own in adapters.values() for path, tensor in own.dense.items()}
    union = replace(
        first, task_type=common_task_type(adapters.values()), modules=modules, heads=whole, dense={}
    )
    plan_full(union, base, dtype=dtype, shard_size=shard_size).check_space(out)


def _left_out(heads: Mapping[str, Any], out: Path) -> list[str]:
    if not heads:
        return []
    return [f"the heads of {', '.join(heads)} are not in the full model: they stay in {out / 'heads'}"]


@dataclass(frozen=True)
class FullModelPlan:
    """What a full model will consist of; made by :func:`plan_full`.

    Attributes:
        adapter: the LoRA, as it fits the model.
        base: the base model.
        dtype: of all floating-point weights; None: as in the base's files.
        folder: of the base's files.
        entries: name in the files -> dtype and shape.
        value: gives the tensor of a name; notes what rounding took away.
        updates: name in the files -> update, of the weights that change.
        split: which tensors go to which file.
        notices: what the user should know.
    """

    adapter: Adapter
    base: BaseSpec
    dtype: torch.dtype | None
    folder: Path
    entries: Mapping[str, Entry]
    value: Callable[[str], Tensor]
    updates: Mapping[str, Update]
    split: StateDictSplit
    notices: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of the weights."""
        return sum(entry.size for entry in self.entries.values())

    def check_space(self, out: Path) -> None:
        """Whether the disk of ``out`` has room.

        Raises:
            MergeError: it has not.
        """
        parent = next(p for p in out.resolve().parents if p.exists())
        free = shutil.disk_usage(parent).free
        if free < self.size + (16 << 20):
            raise MergeError(
                f"{parent} has {readable_bytes(free)} free, the full model needs "
                f"{readable_bytes(self.size)}; choose another folder, or a smaller dtype"
            )

    def write(self, out: Path, on_stage: Callable[[str], None] = lambda _: None) -> FullModelReport:
        """Writes everything into a folder that exists.

        Raises:
            MergeError: values that the dtype cannot hold.
        """
        files = self.split.filename_to_tensors
        for i, (name, keys) in enumerate(files.items(), start=1):
            on_stage(f"writing {name} ({i} of {len(files)})")
            write_weights(out / name, {key: self.entries[key] for key in keys}, self.value)
        if self.split.is_sharded:
            weight_map = dict(sorted(self.split.tensor_to_filename.items()))
            index = {"metadata": {"total_size": self.size}, "weight_map": weight_map}
            _write_json(out / "model.safetensors.index.json", index)
        for name in copied_files(self.folder):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, out / name)
        if self.dtype is not None:
            _set_dtype(out / "config.json", self.dtype)
        report = self._report(out)
        origin = {
            "adapter": str(self.adapter.source),
            "digest": self.adapter.digest,
            "base_model": self.base.path,
            "dtype": "auto" if self.dtype is None else str(self.dtype).removeprefix("torch."),
        }
        told = {key: value for key, value in asdict(report).items() if key != "path"}
        (out / "nsc_fast").mkdir(exist_ok=True)
        _write_json(out / "nsc_fast" / "apply.json", origin | told)
        return report

    def compare(self, out: Path) -> tuple[float, str]:
        """The largest error of a tensor in the files of ``out``, and its name.

        Of an updated weight: ``||stored - round(W + dW)|| / ||dW||``, Frobenius norms. Any other is right to
        the bit, 0, or wrong, 1.

        Raises:
            MergeError: ``out`` has no weight files, or damaged ones.
        """
        found = weight_entries(out)
        worst, where = 0.0, ""
        for key, entry in self.entries.items():
            got = found.get(key)
            if got is None or (got.code, got.shape) != (entry.code, entry.shape):
                return 1.0, key
            error = self._error(key, self.value(key), got.read(out, key))
            if not error <= worst:
                worst, where = error, key
        extra = sorted(found.keys() - self.entries.keys())
        return (1.0, extra[0]) if extra else (worst, where)

    def _error(self, key: str, expected: Tensor, got: Tensor) -> float:
        if torch.equal(got, expected):
            return 0.0
        energy = self.updates[key].energy if key in self.updates else 0.0
        if energy == 0:
            return 1.0
        rows = max(BLOCK // expected.shape[1], 1)
        pairs = zip(got.split(rows), expected.split(rows), strict=True)
        return (sum(float((a.double() - b.double()).square().sum()) for a, b in pairs) / energy) ** 0.5

    def _report(self, out: Path) -> FullModelReport:
        def share(lost: float, energy: float) -> float:
            return (lost / energy) ** 0.5 if energy > 0 else 0.0

        updates = self.updates.values()
        return FullModelReport(
            path=out,
            files=tuple(self.split.filename_to_tensors),
            size=self.size,
            rounding={update.module: share(update.lost, update.energy) for update in updates},
            total_rounding=share(sum(u.lost for u in updates), sum(u.energy for u in updates)),
            replaced=tuple(self.adapter.heads),
            notices=self.notices,
        )


def plan_full(
    adapter: Adapter, base: BaseSpec, *, dtype: torch.dtype | None = None, shard_size: str = "5GB"
) -> FullModelPlan:
    """Everything that can be known before a weight is read; only headers are.

    Args:
        adapter, base: what is put together.
        dtype, shard_size: as for :func:`apply_lora`.

    Raises:
        AdapterError, MergeError: as of :func:`apply_lora`.
    """
    limit = parse_bytes(shard_size)
    if dtype is not None and dtype not in CODES:
        raise MergeError(f"dtype {dtype}: choose float32, bfloat16 or float16")
    model = base_skeleton(base, adapter.modules, task_type=adapter.task_type).model
    _check_not_quantised(base, model)
    adapter = fit_to_model(adapter, model)
    notices = (*adapter.notices, *check_against_model([adapter], model))
    folder = locate_base(base)
    stored = weight_entries(folder)
    updates = updates_of(adapter, model)
    entries, value, by_key = planned_tensors(base, model, folder, stored, updates, adapter.heads, dtype)
    split = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    changed = {key: updates[name] for key, name in by_key.items() if name in updates}
    return FullModelPlan(adapter, base, dtype, folder, entries, value, changed, split, notices)


def _check_not_quantised(base: BaseSpec, model: nn.Module) -> None:
    config = model.config.to_dict()
    kind = quantised_by(config)
    if kind is not None:
        raise MergeError(
            f"base model {base.path!r} is quantised ({kind}): an update cannot be added to packed weights "
            "without rounding it again. Apply the LoRA to the model that this one was quantised from, and "
            "quantise the result; or serve the LoRA beside the quantised base"
        )


def _left_behind(lora: str | os.PathLike[str]) -> list[str]:
    heads = sorted(file.stem for file in Path(lora).glob("heads/*.safetensors"))
    return _left_out(dict.fromkeys(heads), Path(lora))


def _set_dtype(config: Path, dtype: torch.dtype) -> None:
    content = json.loads(config.read_text(encoding="utf-8"))

    def change(part: dict[str, Any]) -> None:
        for key, value in part.items():
            if key in ("dtype", "torch_dtype") and isinstance(value, str):
                part[key] = str(dtype).removeprefix("torch.")
            elif isinstance(value, dict):
                change(value)

    change(content)
    _write_json(config, content)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
