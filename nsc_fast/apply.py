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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, nn

from .adapters import Adapter, check_against_model, common_base, fit_to_model, read_adapter
from .adapters.write import check_replaceable, replacing
from .checkpoint_files import (
    Entry,
    Stored,
    copied_files,
    locate_base,
    stored_names,
    weight_entries,
    write_weights,
)
from .errors import MergeError
from .loading import base_skeleton
from .memory import parse_bytes, readable_bytes
from .quantised import quantised_by
from .recipe import BaseSpec

__all__ = ["FullModelReport", "apply_lora"]

# Rows of a weight are summed in blocks of about this many values, which bounds the wide copies.
_BLOCK = 1 << 22
_FLOATING = ("F64", "F32", "F16", "BF16")
_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


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


@dataclass
class _Update:
    """``left @ right`` in the orientation of the file, and the squared norms that its writing measured."""

    module: str
    left: Tensor
    right: Tensor
    lost: float = 0.0
    energy: float = 0.0


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
    limit = parse_bytes(shard_size)
    if dtype is not None and dtype not in _CODES:
        raise MergeError(f"dtype {dtype}: choose float32, bfloat16 or float16")
    check_replaceable(where, out, overwrite, marker="config.json")
    adapter = read_adapter(lora, name=Path(lora).name, modules_to_save="keep-separate")
    base = base or BaseSpec(path=common_base([adapter]))
    on_stage(f"looking at {base.path}")
    model = base_skeleton(base, adapter.modules, task_type=adapter.task_type).model
    _check_not_quantised(base, model)
    adapter = fit_to_model(adapter, model)
    notices = [*adapter.notices, *check_against_model([adapter], model), *_left_behind(lora)]
    folder = locate_base(base)
    entries = weight_entries(folder)
    updates = _updates(adapter, model)
    whole = adapter.heads
    entries, new = _planned(base, model, entries, updates, whole, dtype)
    size = sum(entry.size for entry in entries.values())
    _check_space(out, size)
    split = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    with replacing(where, out, overwrite, marker="config.json") as scratch:
        for i, (name, keys) in enumerate(split.filename_to_tensors.items(), start=1):
            on_stage(f"writing {name} ({i} of {len(split.filename_to_tensors)})")
            write_weights(scratch / name, {key: entries[key] for key in keys}, lambda key: new(folder, key))
        if split.is_sharded:
            weight_map = dict(sorted(split.tensor_to_filename.items()))
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            _write_json(scratch / "model.safetensors.index.json", index)
        for name in copied_files(folder):
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, scratch / name)
        if dtype is not None:
            _set_dtype(scratch / "config.json", dtype)
        report = _report(out, tuple(split.filename_to_tensors), size, updates, whole, notices)
        origin = {"adapter": str(lora), "digest": adapter.digest, "base_model": base.path}
        told = {key: value for key, value in asdict(report).items() if key != "path"}
        (scratch / "nsc_fast").mkdir()
        _write_json(scratch / "nsc_fast" / "apply.json", origin | told)
    return report


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
    if not heads:
        return []
    return [f"the heads of {', '.join(heads)} are not in the full model: they stay in {Path(lora) / 'heads'}"]


def _updates(adapter: Adapter, model: nn.Module) -> dict[str, _Update]:
    """Name in the model -> update of that weight, in float32 (float64 factors stay)."""
    out = {}
    for path, factors in adapter.modules.items():
        wide = torch.float64 if factors.up.dtype == torch.float64 else torch.float32
        left, right = factors.up.to(wide) * factors.scaling, factors.down.to(wide)
        # Conv1D keeps its weight as (d_in, d_out).
        if hasattr(model.get_submodule(path), "nf"):
            left, right = right.t(), left.t()
        out[f"{path}.weight"] = _Update(path, left, right)
    return out


def _planned(
    base: BaseSpec,
    model: nn.Module,
    entries: Mapping[str, Entry],
    updates: Mapping[str, _Update],
    whole: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> tuple[dict[str, Entry], Callable[[Path, str], Tensor]]:
    """The tensors to write, by their name in the files, and what gives the value of one.

    Raises:
        MergeError: an updated weight that is not in the files, is not there by itself, or is shared.
    """
    names = stored_names(model, entries)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _check_tied(model, updates, whole)
    for name, tensor in whole.items():
        if shapes.get(name) != tuple(tensor.shape):
            raise MergeError(
                f"{name} of the adapter is {tuple(tensor.shape)}, the base model's is "
                f"{shapes.get(name, 'absent')}"
            )
    for name in (*updates, *(name for name in whole if name in names)):
        _check_stored(base, name, shapes[name], names.get(name), entries)
    by_key = {names[name].key: name for name in (*updates, *whole) if name in names}
    planned = dict(entries)
    for name in whole:
        if name not in names:  # a part that the base's files lack, for example the head of a classifier
            by_key[name] = name
            planned[name] = Entry.of(whole[name])
    if dtype is not None:
        planned = {k: e.cast(_CODES[dtype]) if e.code in _FLOATING else e for k, e in planned.items()}

    def value(folder: Path, key: str) -> Tensor:
        name, target = by_key.get(key), planned[key].dtype
        if name in whole:
            out = whole[name].to(target)
        else:
            stored = entries[key].read(folder, key)
            out = stored.to(target) if name is None else _added(stored, updates[name], target)
        if (name is not None or target != entries[key].dtype) and target.is_floating_point:
            if not torch.isfinite(out).all():
                raise MergeError(
                    f"{key}: values do not fit into the range of {target}; write bfloat16 or float32"
                )
        return out

    return planned, value


def _check_tied(model: nn.Module, updates: Mapping[str, _Update], whole: Mapping[str, Tensor]) -> None:
    tied = getattr(model, "all_tied_weights_keys", {})
    shared = {**tied, **{source: target for target, source in tied.items()}}
    for name in (*updates, *whole):
        if name in shared:
            raise MergeError(
                f"{name} and {shared[name]} are one tied weight in the base model, and the adapter changes "
                f"{name} alone: written into it, the update would change both. Serve the LoRA as it is, or "
                "save a copy of the base with tie_word_embeddings=False and two weights, and apply to that"
            )


def _check_stored(
    base: BaseSpec, name: str, shape: tuple[int, ...], stored: Stored | None, entries: Mapping[str, Entry]
) -> None:
    """Whether a weight that changes stands in the files as it stands in the model."""
    if stored is None or stored.converted:
        raise MergeError(
            f"module {name.rpartition('.')[0]!r}: its weight is not in the files of base model {base.path!r} "
            "by itself: transformers makes it from other tensors when it loads them. Serve the LoRA as it "
            "is, or load the base in transformers, write it with "
            "save_pretrained(folder, save_original_format=False), and apply to that folder"
        )
    entry = entries[stored.key]
    if entry.code not in _FLOATING or entry.shape != shape:
        raise MergeError(
            f"{stored.key} in the files of base model {base.path!r} is {entry.code} {entry.shape}, the "
            f"model's {name} is {shape}: an update cannot be added to it. Apply the LoRA to a base that is "
            "not packed or quantised"
        )


def _added(weight: Tensor, update: _Update, dtype: torch.dtype) -> Tensor:
    """The weight plus the update in ``dtype``; notes what rounding to it took away."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    left, right = update.left.to(wide), update.right.to(wide)
    out = torch.empty(weight.shape, dtype=dtype)
    rows = max(_BLOCK // weight.shape[1], 1)
    update.lost = update.energy = 0.0
    for part, old, new in zip(left.split(rows), weight.split(rows), out.split(rows), strict=True):
        delta = part @ right
        update.energy += float(delta.square().sum(dtype=torch.float64))
        exact = delta.add_(old)
        new.copy_(exact)
        update.lost += float(exact.sub_(new).square().sum(dtype=torch.float64))
    return out


def _check_space(out: Path, size: int) -> None:
    parent = next(p for p in out.resolve().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < size + (16 << 20):
        raise MergeError(
            f"{parent} has {readable_bytes(free)} free, the full model needs {readable_bytes(size)}; choose "
            "another folder, or a smaller dtype"
        )


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


def _report(
    out: Path,
    files: tuple[str, ...],
    size: int,
    updates: Mapping[str, _Update],
    whole: Mapping[str, Tensor],
    notices: list[str],
) -> FullModelReport:
    def share(lost: float, energy: float) -> float:
        return (lost / energy) ** 0.5 if energy > 0 else 0.0

    total = share(sum(u.lost for u in updates.values()), sum(u.energy for u in updates.values()))
    return FullModelReport(
        path=out,
        files=files,
        size=size,
        rounding={update.module: share(update.lost, update.energy) for update in updates.values()},
        total_rounding=total,
        replaced=tuple(whole),
        notices=tuple(notices),
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
