"""Checks of a written merge: what PEFT loads from the folder is what was merged.

- ``weights``: the factors on disk, read again, are the merged update;
- ``reload``: PEFT loads the folder into the base model and gives the outputs of the in-memory merge;
- ``identity``: one adapter with coefficient 1, written by the same writer, gives itself back;
- ``difference``: the merge changes the base model's outputs.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from . import methods
from .adapters import Adapter, check_against_model, fit_to_model, module_shapes, read_adapter, write_lora
from .errors import MergeError
from .factors import LowRankUpdate, canonical
from .layers import install, model_device, remove, stack_adapters
from .loading import load_base
from .methods import MergeInputs
from .recipe import BaseSpec

__all__ = ["Check", "applied", "probe", "verify_folder", "verify_full_model", "verify_output"]


@dataclass(frozen=True)
class Check:
    """One check: ``value`` must not exceed ``limit`` (for "difference": must exceed it)."""

    name: str
    passed: bool
    value: float
    limit: float
    detail: str


def verify_output(
    out: str | os.PathLike[str],
    updates: Mapping[str, LowRankUpdate],
    model: nn.Module,
    *,
    adapters: Mapping[str, Adapter] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    whole: Mapping[str, Tensor] | None = None,
) -> list[Check]:
    """All checks of a written folder against the merge in memory.

    Args:
        out: the written folder.
        updates: module path -> merged update; truncated to the folder's rank before the comparison.
        model: the base model; unchanged when the function returns.
        adapters: the merged adapters, for the identity check of the first one.
        inputs: model inputs for the comparison of outputs. Default: see :func:`probe`.
        whole: path -> merged tensor of the modules that replace the base's. Default: those of the folder.
    """
    written = read_adapter(out, name="merged", modules_to_save="keep-separate")
    rank = max(f.rank for f in written.modules.values())
    expected = {m: u.truncate(rank)[0] if u.rank > rank else u for m, u in updates.items()}
    checks = [_weights_check(written, expected, whole)]
    whole = written.heads if whole is None else whole
    inputs = dict(inputs) if inputs is not None else probe(model)
    limit = _limit(model, written)
    base = _outputs(model, inputs)
    in_memory = _with_updates(model, expected, inputs, whole)
    reloaded = _with_peft(model, Path(out), inputs)
    checks.append(_compare("reload", reloaded, in_memory, limit, "outputs through PEFT against the merge"))
    change = _distance(in_memory, base)
    zero = all(u.energy == 0 for u in expected.values())
    checks.append(
        Check(
            "difference",
            zero or change > 0,
            change,
            0.0,
            "relative change of the base model's outputs" + (" (the update is zero)" if zero else ""),
        )
    )
    if adapters:
        task, adapter = next(iter(adapters.items()))
        checks.append(_identity_check((task, fit_to_model(adapter, model)), model, inputs))
    return checks


def verify_folder(
    out: str | os.PathLike[str], *, base_model: str | None = None, device: str = "cpu"
) -> list[Check]:
    """Checks an existing output against what it tells of its merge.

    With coefficients, these give the merged update; a data-free method without coefficients runs again, from
    the recorded sources, parameters and seed. Where neither is possible, the folder is compared with itself:
    what PEFT makes of it.

    Raises:
        MergeError: the folder was not written by a merge, or its sources are gone.
    """
    folder = Path(out)
    summary_file = folder / "nsc_fast" / "merge.json"
    if not summary_file.is_file():
        raise MergeError(f"{folder}: no nsc_fast/merge.json; verify needs a folder that `merge` wrote")
    summary = json.loads(summary_file.read_text(encoding="utf-8"))
    recipe_file = folder / "nsc_fast" / "config.resolved.yaml"
    recipe = yaml.safe_load(recipe_file.read_text(encoding="utf-8")) if recipe_file.is_file() else {}
    adapters = _sources(summary, recipe)
    types = {adapter.task_type for adapter in adapters.values()}
    model = load_base(
        BaseSpec(path=base_model or summary["base_model"]),
        list(dict.fromkeys(m for adapter in adapters.values() for m in adapter.modules)),
        task_type=types.pop() if len(types) == 1 else None,
        device=device,
    )
    adapters = {task: fit_to_model(adapter, model) for task, adapter in adapters.items()}
    check_against_model(adapters.values(), model)
    updates = _again(folder, summary, recipe, adapters)
    if updates is not None:
        return verify_output(folder, updates, model, adapters=adapters)
    written = read_adapter(folder, name="merged", modules_to_save="drop").canonical()
    checks = verify_output(folder, written, model, adapters=adapters)
    told = f"; method {summary['method']!r} cannot run again without data: the folder against itself"
    return [
        replace(check, detail=check.detail + told) if check.name == "reload" else check
        for check in checks
        if check.name != "weights"
    ]


def verify_full_model(
    out: str | os.PathLike[str], lora: str | os.PathLike[str], base: BaseSpec, *, device: str = "cpu"
) -> Check:
    """Loads a full model and compares its outputs with what PEFT merges in memory; one model at a time.

    Args:
        out: folder of the full model.
        lora: the LoRA in it.
        base: the base model, in the dtype of ``out``.
    """
    from peft import PeftModel

    adapter = read_adapter(lora, modules_to_save="keep-separate")
    kind = {"modules": tuple(adapter.modules), "task_type": adapter.task_type, "device": device}
    model = load_base(base, **kind)
    inputs, limit = probe(model), _limit(model, adapter)
    expected = _outputs(PeftModel.from_pretrained(model, str(lora)).merge_and_unload(), inputs)
    del model
    got = _outputs(load_base(BaseSpec(path=str(out)), **kind), inputs)
    return _compare("full model", got, expected, limit, "outputs against PEFT's merge_and_unload")


def _sources(summary: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Adapter]:
    """The merged adapters, if they are still the same."""
    specs = {spec["name"]: spec for spec in recipe.get("adapters", ())}
    adapters = {}
    for task in summary["tasks"]:
        source = summary["sources"][task]
        spec = specs.get(task, {"path": source["source"]})
        where = {key: spec.get(key) for key in ("revision", "subfolder")}
        adapters[task] = read_adapter(spec["path"], name=task, modules_to_save="drop", **where)
        if adapters[task].digest != source["digest"]:
            raise MergeError(f"adapter {task!r} at {source['source']} is not the one that was merged")
    return adapters


def _again(
    folder: Path, summary: Mapping[str, Any], recipe: Mapping[str, Any], adapters: Mapping[str, Adapter]
) -> Mapping[str, LowRankUpdate] | None:
    """The merged update, from the coefficients or by the method; None where only data would give it."""
    updates = {task: adapter.canonical() for task, adapter in adapters.items()}
    tensors_file = folder / "nsc_fast" / "coefficients.safetensors"
    if tensors_file.is_file():
        coefficients = load_file(str(tensors_file))
        stacks = stack_adapters(updates)
        return {module: stacked.merged(coefficients[module]) for module, stacked in stacks.items()}
    method = methods.get(summary["method"])
    if method.needs_data:
        return None
    weights = {spec["name"]: spec.get("parameters", {}).get("weight") for spec in recipe.get("adapters", ())}
    inputs = MergeInputs(
        updates=updates,
        factors={task: adapter.modules for task, adapter in adapters.items()},
        weights={task: weight for task, weight in weights.items() if weight is not None},
        seed=recipe.get("seed", 0),
    )
    return method.run(inputs, method.parameters(**summary["parameters"])).updates


def probe(model: nn.Module) -> dict[str, Tensor]:
    """Two short random inputs for a transformers model: token ids, or pixels.

    Raises:
        MergeError: the model takes something else; pass ``inputs`` then.
    """
    generator = torch.Generator().manual_seed(0)
    config = getattr(model, "config", None)
    kind = getattr(model, "main_input_name", None)
    device = model_device(model)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if kind == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 50)
        shape = (2, config.num_mel_bins, frames)
        sound = torch.randn(shape, generator=generator).to(device, next(model.parameters()).dtype)
        ids = torch.randint(0, text.vocab_size, (2, 12), generator=generator).to(device)
        return {"input_features": sound, "decoder_input_ids": ids}
    if kind == "input_ids" and hasattr(text, "vocab_size"):
        ids = torch.randint(0, text.vocab_size, (2, 12), generator=generator).to(device)
        out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(config, "is_encoder_decoder", False):
            out["decoder_input_ids"] = ids
        vision = getattr(config, "vision_config", None)
        if hasattr(vision, "image_size") and not model.can_generate():
            out["pixel_values"] = _pixels(model, vision, generator)
        return out
    if kind == "pixel_values" and hasattr(config, "image_size"):
        return {"pixel_values": _pixels(model, config, generator)}
    raise MergeError(f"cannot make probe inputs for {type(model).__name__}; pass inputs= to the check")


def _pixels(model: nn.Module, config: Any, generator: torch.Generator) -> Tensor:
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    first = next(model.parameters())
    shape = (2, getattr(config, "num_channels", 3), size, size)
    return torch.randn(shape, generator=generator).to(model_device(model), first.dtype)


def _weights_check(
    written: Adapter, expected: Mapping[str, LowRankUpdate], whole: Mapping[str, Tensor] | None
) -> Check:
    got = written.canonical()
    worst, where = 0.0, ""
    for module, update in expected.items():
        other = got.get(module)
        scale = update.energy**0.5
        if other is None:
            error = 1.0 if scale > 0 else 0.0
        else:
            # ||C1 Q1 - C2 Q2|| through the stacked factors: no dense matrix.
            error = _difference(update, other) / scale if scale > 0 else other.energy**0.5
        if error > worst:
            worst, where = error, module
    for path, tensor in (whole or {}).items():
        got, wide = written.heads.get(path), tensor.to(torch.float64)
        error = 1.0 if got is None else float((got.to(wide) - wide).norm() / wide.norm().clamp(min=1e-30))
        if error > worst:
            worst, where = error, path
    eps = torch.finfo(_torch_dtype(written.dtype)).eps
    limit = 4 * eps
    detail = "factors on disk against the merge, relative" + (f"; worst at {where}" if where else "")
    return Check("weights", worst <= limit, worst, limit, detail)


def _difference(a: LowRankUpdate, b: LowRankUpdate) -> float:
    both = canonical(torch.cat([a.basis, b.basis]), torch.cat([a.columns, -b.columns], dim=1))
    return both.energy**0.5


def _identity_check(named: tuple[str, Adapter], model: nn.Module, inputs: Mapping[str, Tensor]) -> Check:
    task, adapter = named
    limit = _limit(model, adapter)
    with tempfile.TemporaryDirectory() as scratch:
        again = Path(scratch) / "identity"
        write_lora(
            again,
            adapter.canonical(),
            base_model=adapter.base_model or "unknown",
            base_shapes=module_shapes(model),
            task_type=adapter.task_type,
        )
        ours = _with_peft(model, again, inputs)
    merged = {task: {m: canonical(f.down, f.up, f.scaling) for m, f in adapter.modules.items()}}
    theirs = (
        _with_peft(model, Path(adapter.source), inputs)
        if Path(adapter.source).is_dir() and not adapter.heads and not adapter.dense
        else _with_updates(model, merged[task], inputs)
    )
    return _compare("identity", ours, theirs, limit, f"adapter {task!r} with coefficient 1 against itself")


def _compare(name: str, got: Tensor, expected: Tensor, limit: float, detail: str) -> Check:
    value = _distance(got, expected)
    return Check(name, value <= limit, value, limit, detail)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(b.dtype).tiny))


def _limit(model: nn.Module, adapter: Adapter) -> float:
    """1e-5 in float32; a few roundings where the base or the folder is kept in half precision."""
    dtypes = [next(p for p in model.parameters() if p.is_floating_point()).dtype, _torch_dtype(adapter.dtype)]
    return max(1e-5, *(8 * torch.finfo(dtype).eps for dtype in dtypes))


def _torch_dtype(name: str) -> torch.dtype:
    names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    return names.get(name) or getattr(torch, name.removeprefix("torch."))


@contextmanager
def applied(model: nn.Module, updates: Mapping[str, LowRankUpdate]) -> Iterator[None]:
    """The model with the updates in it, while the block runs."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    install(model, {"merged": updates}, granularity="task", init=1.0)
    try:
        yield
    finally:
        remove(model)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _with_updates(
    model: nn.Module,
    updates: Mapping[str, LowRankUpdate],
    inputs: Mapping[str, Tensor],
    whole: Mapping[str, Tensor] | None = None,
) -> Tensor:
    with applied(model, updates):
        return _outputs(model, inputs, whole)


def _with_peft(model: nn.Module, folder: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    from peft import PeftModel

    flags = [(p, p.requires_grad) for p in model.parameters()]
    loaded = PeftModel.from_pretrained(model, str(folder))
    try:
        return _outputs(loaded, inputs)
    finally:
        loaded.unload()
        # PEFT leaves its configuration on the model and would warn of a second adapter.
        if hasattr(model, "peft_config"):
            del model.peft_config
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _outputs(
    model: nn.Module, inputs: Mapping[str, Tensor], whole: Mapping[str, Tensor] | None = None
) -> Tensor:
    """All floating-point outputs of a forward pass, flat, in float32 (float64 stays).

    Args:
        whole: path -> tensor in place of the model's.
    """
    model.eval()
    present = model.state_dict(keep_vars=True) if whole else {}
    other = {path: tensor.to(present[path]) for path, tensor in (whole or {}).items()}
    with torch.no_grad():
        out = functional_call(model, other, (), dict(inputs)) if other else model(**inputs)
    values = out.to_tuple() if hasattr(out, "to_tuple") else out if isinstance(out, tuple) else (out,)
    tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return torch.cat([t.reshape(-1).to(wide) for t in tensors])
