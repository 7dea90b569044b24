"""Adapters against each other and against the base model, before anything is computed."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from nsc_fast.adapters.model import Adapter, AdapterError, Problem
from nsc_fast.adapters.source import safetensors_headers
from nsc_fast.adapters.targets import Shapes, selected_by

__all__ = [
    "check_against_model",
    "common_base",
    "common_task_type",
    "folder_shapes",
    "module_shapes",
]

# transformers' Conv1D stores its weight as (d_in, d_out). A checkpoint does not say so; these
# model types use it, under these names.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_NAMES = ("c_attn", "q_attn", "c_proj", "c_fc")
_FLOATING = ("float64", "float32", "float16", "bfloat16", "F8_E4M3", "F8_E5M2")


def common_base(adapters: Iterable[Adapter], base_model: str | None = None) -> str:
    """The base model that all adapters share.

    Two names are the same base when they are equal but for trailing slashes, or when both are
    existing paths to one folder. A hub id and a local copy of it are not taken for equal.

    Args:
        adapters: at least one.
        base_model: the user's word, which ends the question.

    Raises:
        AdapterError: bases or their revisions differ, or an adapter names none.
    """
    if base_model:
        return base_model
    adapters = list(adapters)
    way_out = "if it is one and the same model, say which with --base-model"
    unnamed = [a.name for a in adapters if not a.base_model]
    if unnamed or not adapters:
        raise AdapterError(
            f"adapter {unnamed[0]!r}" if unnamed else "adapters",
            Problem("base_model_name_or_path", "names no base model", "say which with --base-model"),
        )
    first = adapters[0]
    for other in adapters[1:]:
        both = f"adapters {first.name!r} and {other.name!r}"
        if _identity(first.base_model) != _identity(other.base_model):
            difference = f"{first.base_model!r} and {other.base_model!r} are different base models"
            raise AdapterError(both, Problem("base_model_name_or_path", difference, way_out))
        revisions = [a.config.get("revision") or "main" for a in (first, other)]
        if revisions[0] != revisions[1]:
            difference = f"{revisions[0]!r} and {revisions[1]!r} of {first.base_model!r} differ"
            raise AdapterError(both, Problem("revision", difference, way_out))
    return str(first.base_model)


def _identity(base: str | None) -> str:
    name = (base or "").rstrip("/\\") or str(base)
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def common_task_type(adapters: Iterable[Adapter]) -> str | None:
    """The task type that all adapters share; ``None`` where they differ."""
    kinds = {adapter.task_type for adapter in adapters}
    return kinds.pop() if len(kinds) == 1 else None


def module_shapes(model: nn.Module) -> dict[str, tuple[int, int] | None]:
    """``(d_out, d_in)`` of every linear module by its path, ``None`` for the other modules.

    Understands ``nn.Linear``, quantised linears that keep ``in_features`` and ``out_features``,
    transformers' ``Conv1D``, and any of these inside a wrapper that calls it ``base_layer`` (a
    PEFT layer).
    """
    shapes: dict[str, tuple[int, int] | None] = {}
    wrapped: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not path or path.startswith(wrapped):
            continue
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            wrapped += (f"{path}.",)
            while isinstance(getattr(module, "base_layer", None), nn.Module):
                module = module.base_layer
        shapes[path] = _linear_shape(module)
    return shapes


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    kinds = {kind.__name__ for kind in type(module).__mro__}
    # The out_proj of nn.MultiheadAttention: its weight is used without calling the module, so an
    # update of it would have no effect.
    if "NonDynamicallyQuantizableLinear" in kinds:
        return None
    if "Conv1D" in kinds:
        d_in, d_out = module.weight.shape
        return d_out, d_in
    d_out, d_in = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return (d_out, d_in) if isinstance(d_out, int) and isinstance(d_in, int) else None


def folder_shapes(
    folder: str | os.PathLike[str], modules: Collection[str]
) -> dict[str, tuple[int, int] | None]:
    """Shapes as in :func:`module_shapes`, from the safetensors headers of a base model's folder.

    Checkpoints may have one more prefix than the model that is adapted, or one less (``bert.`` of
    a model with a head); it is found by comparing with the adapted modules. Modules without
    weights are not in a checkpoint and therefore not in the answer.

    Args:
        folder: with ``*.safetensors``, sharded or not.
        modules: paths of the adapted modules.

    Raises:
        AdapterError: no weights, missing or corrupt shards, weights that are packed by
            quantisation.
    """
    root = Path(folder)
    config = _json_of(root / "config.json")
    transposed = config.get("model_type") in _CONV1D_MODELS
    shapes: dict[str, tuple[int, int] | None] = {}
    for file in _weight_files(root):
        try:
            headers = safetensors_headers(file)
        except (SafetensorError, OSError) as error:
            raise _base_error(
                root, f"file {file.name!r}", f"cannot be read: {error}", "download it again"
            ) from error
        for key, header in headers.items():
            path, _, kind = key.rpartition(".")
            if kind not in ("weight", "qweight"):
                shapes.setdefault(path, None)
                continue
            if header.dtype not in _FLOATING:
                raise _base_error(
                    root,
                    f"tensor {key!r}",
                    f"is quantised ({header.dtype}), so its shape is not that of the layer",
                    "check against the loaded model instead",
                )
            shape = header.shape if len(header.shape) == 2 else None
            if shape and transposed and path.rpartition(".")[2] in _CONV1D_NAMES:
                shape = shape[::-1]
            shapes[path] = shape
    for path in list(shapes):  # the containers, which are modules as well
        while path := path.rpartition(".")[0]:
            shapes.setdefault(path, None)
    return _aligned(shapes, modules)


def _base_error(root: Path, subject: str, reason: str, way_out: str) -> AdapterError:
    return AdapterError(f"base model {str(root)!r}", Problem(subject, reason, way_out))


def _json_of(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _base_error(
            path.parent, f"file {path.name!r}", f"is not valid JSON: {error}", "download it again"
        ) from error
    return content if isinstance(content, dict) else {}


def _weight_files(root: Path) -> list[Path]:
    index = _json_of(root / "model.safetensors.index.json").get("weight_map")
    if index:
        files = [root / name for name in sorted(set(index.values()))]
    else:
        files = sorted(f for f in root.glob("*.safetensors") if not f.name.startswith("adapter_"))
    if not files:
        raise _base_error(
            root, "weights", "there are no safetensors files", "give the folder of the base model"
        )
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise _base_error(
            root,
            f"file {missing[0]!r}",
            "is in the index and not in the folder",
            "download it again",
        )
    return files


def _aligned(
    shapes: dict[str, tuple[int, int] | None], modules: Collection[str]
) -> dict[str, tuple[int, int] | None]:
    """The shapes under the adapted model's names: with one prefix less or more, if that fits better."""
    present = [module for module in modules if module in shapes]
    if len(present) == len(modules):
        return shapes
    views = [shapes]
    for prefix in {f"{name.split('.')[0]}." for name in shapes}:
        views.append({n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)})
    for prefix in {f"{module.split('.')[0]}." for module in modules}:
        views.append({prefix + name: shape for name, shape in shapes.items()})
    return max(views, key=lambda view: sum(module in view for module in modules))


def check_against_model(adapters: Iterable[Adapter], model_or_shapes: nn.Module | Shapes) -> tuple[str, ...]:
    """Checks that every adapted module is a linear layer of the base that fits the update.

    Args:
        adapters: to check.
        model_or_shapes: the base model, or what :func:`module_shapes` or :func:`folder_shapes`
            gave.

    Returns:
        Notices: modules of the base that an adapter's config selects although its file has no
            factors for
        them, which is normal for a head that the adapter was trained without.

    Raises:
        AdapterError: for the first adapter that does not fit, with all modules that do not.
    """
    shapes = model_or_shapes
    if isinstance(shapes, nn.Module):
        shapes = module_shapes(shapes)
    notices: list[str] = []
    for adapter in adapters:
        problems = [
            problem
            for path, factors in adapter.modules.items()
            if (problem := _misfit(path, factors.shape, shapes))
        ]
        if problems:
            raise AdapterError(f"adapter {adapter.name!r}", *problems)
        notices += _untouched_notice(adapter, shapes)
    return tuple(notices)


def _misfit(path: str, update: tuple[int, int], base: Shapes) -> Problem | None:
    way_out = "use the base model that the adapter was trained on"
    if path not in base:
        linear = [name for name, shape in base.items() if shape is not None]
        near = difflib.get_close_matches(path, linear, n=3, cutoff=0.6)
        if near:
            way_out += f", in the same class; the nearest names here are {', '.join(map(repr, near))}"
        return Problem(f"module {path!r}", f"update {update}: the base has no such module", way_out)
    if base[path] is None:
        return Problem(
            f"module {path!r}",
            f"update {update}: in the base it is not a linear layer",
            "leave it out of the adapter's target_modules",
        )
    if base[path] != update:
        return Problem(
            f"module {path!r}",
            f"update {update} (d_out, d_in) does not fit the base's {base[path]}",
            way_out,
        )
    return None


def _untouched_notice(adapter: Adapter, shapes: Mapping[str, object]) -> list[str]:
    targets = adapter.config.get("target_modules")
    if targets is None or targets == "all-linear":
        return []
    absent = [
        path
        for path, shape in shapes.items()
        if shape is not None and path not in adapter.modules and selected_by(adapter.config, path)
    ]
    if not absent:
        return []
    return [
        f"adapter {adapter.name!r}: target_modules selects {len(absent)} more modules of the base "
        f"({absent[0]} …) for which the file has no factors"
    ]
