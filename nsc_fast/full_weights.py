"""The tensors of a full model: which of the base's change, whether they can, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .adapters import Adapter
from .checkpoint_files import Entry, Stored, stored_names
from .dtypes import compute_dtype
from .errors import MergeError
from .recipe import BaseSpec

__all__ = ["BLOCK", "CODES", "Update", "planned_tensors", "updates_of"]

# Rows of a weight are summed in blocks of about this many values, which bounds the wide copies.
BLOCK = 1 << 22
_FLOATING = ("F64", "F32", "F16", "BF16")
CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass
class Update:
    """``left @ right`` in the orientation of the file, and the squared norms that its writing measured."""

    module: str
    left: Tensor
    right: Tensor
    lost: float = 0.0
    energy: float = 0.0


def updates_of(adapter: Adapter, model: nn.Module) -> dict[str, Update]:
    """Name in the model -> update of that weight, in float32 (float64 factors stay)."""
    out = {}
    for path, factors in adapter.modules.items():
        wide = compute_dtype(factors.up.dtype)
        left, right = factors.up.to(wide) * factors.scaling, factors.down.to(wide)
        # Conv1D keeps its weight as (d_in, d_out).
        if hasattr(model.get_submodule(path), "nf"):
            left, right = right.t(), left.t()
        out[f"{path}.weight"] = Update(path, left, right)
    return out


def planned_tensors(
    base: BaseSpec,
    model: nn.Module,
    folder: Path,
    entries: Mapping[str, Entry],
    updates: Mapping[str, Update],
    whole: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> tuple[dict[str, Entry], Callable[[str], Tensor], dict[str, str]]:
    """The tensors to write, by their name in the files, what gives the value of one, and those that change.

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
        planned = {k: e.cast(CODES[dtype]) if e.code in _FLOATING else e for k, e in planned.items()}

    def value(key: str) -> Tensor:
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

    return planned, value, by_key


def _check_tied(model: nn.Module, updates: Mapping[str, Update], whole: Mapping[str, Tensor]) -> None:
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


def _added(weight: Tensor, update: Update, dtype: torch.dtype) -> Tensor:
    """The weight plus the update in ``dtype``; notes what rounding to it took away."""
    wide = compute_dtype(weight.dtype)
    left, right = update.left.to(wide), update.right.to(wide)
    out = torch.empty(weight.shape, dtype=dtype)
    rows = max(BLOCK // weight.shape[1], 1)
    update.lost = update.energy = 0.0
    for part, old, new in zip(left.split(rows), weight.split(rows), out.split(rows), strict=True):
        delta = part @ right
        update.energy += float(delta.square().sum(dtype=torch.float64))
        exact = delta.add_(old)
        new.copy_(exact)
        update.lost += float(exact.sub_(new).square().sum(dtype=torch.float64))
    return out
