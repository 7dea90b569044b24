"""Checks of a written merge: what PEFT loads from the folder is what was merged.

- ``weights``: the factors on disk, read again, are the merged update;
- ``reload``: PEFT loads the folder into the base model and gives the outputs of the in-memory merge;
- ``identity``: one adapter with coefficient 1, written by the same writer, gives itself back;
- ``difference``: the merge changes the base model's outputs.

Of a full model, these are checks of the LoRA that lies in it, and there are two more:

- ``stored``: its files hold the base's tensors, and where the LoRA changes them the rounded sum;
- ``full model``: transformers loads it, and it gives the outputs of PEFT's merge.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from . import methods
from .adapters import (
    Adapter,
    check_against_model,
    common_task_type,
    fit_to_model,
    module_shapes,
    read_adapter,
    write_lora,
)
from .apply import LORA, plan_full
from .errors import MergeError
from .factors import LowRankUpdate, canonical
from .layers import stack_adapters
from .loading import load_base
from .methods import MergeInputs
from .outputs import applied, outputs, outputs_with_peft, outputs_with_updates, probe
from .recipe import AdapterSpec, BaseSpec, Recipe, parameters_of
from .report.record import Record, Summary, read_record

__all__ = [
    "Check",
    "applied",
    "probe",
    "verify_folder",
    "verify_full_model",
    "verify_output",
    "verify_stored",
]

# Products of float32 differ in the last bits from machine to machine, and rounded to bfloat16 now and then by
# a step of it. Without the update the difference is 1.
_STORED = 0.05


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
    check_against_model([written], model)
    rank = max(f.rank for f in written.modules.values())
    expected = {m: u.truncate(rank)[0] if u.rank > rank else u for m, u in updates.items()}
    checks = [_weights_check(written, expected, whole)]
    whole = written.heads if whole is None else whole
    inputs = dict(inputs) if inputs is not None else probe(model)
    limit = _limit(model, written)
    base = outputs(model, inputs)
    in_memory = outputs_with_updates(model, expected, inputs, whole)
    reloaded = outputs_with_peft(model, Path(out), inputs)
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
    out: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> list[Check]:
    """Checks an existing output against what it tells of its merge.

    With coefficients, these give the merged update; a data-free method without coefficients runs again, from
    the recorded sources, parameters and seed. Where neither is possible, the folder is compared with itself:
    what PEFT makes of it. Of a full model its files are checked, too.

    Raises:
        MergeError: the folder was not written by a merge, a file in it is damaged, or its sources are gone.
    """
    folder = Path(out)
    if not (folder / "nsc_fast" / "merge.json").is_file():
        raise MergeError(f"{folder}: no nsc_fast/merge.json; verify needs a folder that `merge` wrote")
    record = read_record(folder)
    recipe = _recipe(folder, record)
    adapters = _sources(record.summary, recipe)
    base = _base(recipe, record.summary, base_model, trust_remote_code)
    lora = folder / LORA if (folder / LORA).is_dir() else folder
    modules = dict.fromkeys(m for adapter in adapters.values() for m in adapter.modules)
    try:
        model = load_base(base, modules, task_type=common_task_type(adapters.values()), device=device)
    except MergeError as error:
        if base_model is not None:
            raise
        raise MergeError(f"{error}. If the base model has moved, name it with --base-model") from error
    adapters = {task: fit_to_model(adapter, model) for task, adapter in adapters.items()}
    check_against_model(adapters.values(), model)
    updates = _again(folder, record.summary, recipe, adapters)
    if updates is not None:
        checks = verify_output(lora, updates, model, adapters=adapters)
    else:
        written = read_adapter(lora, name="merged", modules_to_save="drop").canonical()
        told = f"; method {record.summary.method!r} cannot run again without data: the folder against itself"
        checks = [
            replace(check, detail=check.detail + told) if check.name == "reload" else check
            for check in verify_output(lora, written, model, adapters=adapters)
            if check.name != "weights"
        ]
    if lora == folder:
        return checks
    del model
    return [*checks, verify_stored(folder, base), verify_full_model(folder, lora, base, device=device)]


def verify_stored(out: str | os.PathLike[str], base: BaseSpec) -> Check:
    """Compares the files of a full model that a merge wrote with those of the base plus the LoRA in it.

    One tensor at a time; no model is loaded.

    Args:
        out: folder of the full model.
        base: the base model.

    Raises:
        MergeError: files that are missing or damaged.
    """
    folder = Path(out)
    name = _stored_dtype(folder)
    dtype = None if name == "auto" else getattr(torch, name)
    plan = plan_full(read_adapter(folder / LORA, modules_to_save="keep-separate"), base, dtype=dtype)
    value, where = plan.compare(folder)
    detail = f"{len(plan.entries)} tensors of the files against base plus LoRA, by the size of the update"
    return Check(
        "stored", value <= _STORED, value, _STORED, detail + (f"; worst at {where}" if where else "")
    )


def verify_full_model(
    out: str | os.PathLike[str], lora: str | os.PathLike[str], base: BaseSpec, *, device: str = "cpu"
) -> Check:
    """Loads a full model and compares its outputs with what PEFT merges in memory; one model at a time.

    Args:
        out: folder of the full model.
        lora: the LoRA in it.
        base: the base model; its dtype becomes that of ``out``.
        device: of both models, unless ``base`` has a device map.
    """
    from peft import PeftModel

    adapter = read_adapter(lora, modules_to_save="keep-separate")
    base = base.model_copy(update={"dtype": _stored_dtype(Path(out))})
    kind = {"modules": tuple(adapter.modules), "task_type": adapter.task_type, "device": device}
    model = load_base(base, **kind)
    inputs, limit = probe(model), _limit(model, adapter)
    expected = outputs(PeftModel.from_pretrained(model, str(lora)).merge_and_unload(), inputs)
    del model
    own = {"path": str(out), "revision": None, "subfolder": None, "dtype": "auto"}
    got = outputs(load_base(base.model_copy(update=own), **kind), inputs)
    return _compare("full model", got, expected, limit, "outputs against PEFT's merge_and_unload")


def _stored_dtype(folder: Path) -> str:
    """Of a full model's weights, as it was asked for: "auto" or the name of a dtype."""
    file = folder / "nsc_fast" / "apply.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))["dtype"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MergeError(f"{file} is damaged: {error}; restore it from a copy, or merge again") from error


def _recipe(folder: Path, record: Record) -> Recipe | None:
    """The resolved recipe; None where an older version wrote none."""
    if not record.recipe:
        return None
    try:
        return Recipe.model_validate(record.recipe)
    except ValidationError as error:
        raise MergeError(
            f"{folder / 'nsc_fast' / 'config.resolved.yaml'} is damaged: {error.errors()[0]['msg']} at "
            f"{'.'.join(map(str, error.errors()[0]['loc']))}; restore it from a copy, or merge again"
        ) from error


def _base(recipe: Recipe | None, summary: Summary, path: str | None, trust_remote_code: bool) -> BaseSpec:
    """The base model as it was loaded for the merge, or at another place.

    The word of the folder is not enough to run code, and one process shards nothing.
    """
    told = {"trust_remote_code": trust_remote_code, "shard": False}
    if path is not None:
        told |= {"path": path, "revision": None, "subfolder": None}
    if recipe is not None and recipe.base_model is not None:
        return recipe.base_model.model_copy(update=told)
    if not (path or summary.base_model):
        raise MergeError("nsc_fast/merge.json names no base model: say which with --base-model")
    return BaseSpec(**{"path": summary.base_model, **told})


def _sources(summary: Summary, recipe: Recipe | None) -> dict[str, Adapter]:
    """The merged adapters, if they are still the same."""
    specs = {} if recipe is None else {spec.name: spec for spec in recipe.adapters}
    adapters = {}
    for task in summary.tasks:
        if (source := summary.sources.get(task)) is None:
            raise MergeError(
                f"nsc_fast/merge.json is damaged: no source of task {task!r}; restore it from a copy, or "
                "merge again"
            )
        spec = specs.get(task) or AdapterSpec(name=task, path=source.source)
        where = {"revision": spec.revision, "subfolder": spec.subfolder}
        adapters[task] = read_adapter(spec.path, name=task, modules_to_save="drop", **where)
        if adapters[task].digest != source.digest:
            raise MergeError(f"adapter {task!r} at {source.source} is not the one that was merged")
    return adapters


def _again(
    folder: Path, summary: Summary, recipe: Recipe | None, adapters: Mapping[str, Adapter]
) -> Mapping[str, LowRankUpdate] | None:
    """The merged update, from the coefficients or by the method; None where only data would give it."""
    updates = {task: adapter.canonical() for task, adapter in adapters.items()}
    tensors_file = folder / "nsc_fast" / "coefficients.safetensors"
    if tensors_file.is_file():
        stacks = stack_adapters(updates)
        try:
            coefficients = load_file(str(tensors_file))
            return {module: stacked.merged(coefficients[module]) for module, stacked in stacks.items()}
        except (SafetensorError, KeyError, ValueError) as error:
            reason = f"no module {error}" if isinstance(error, KeyError) else str(error)
            raise MergeError(
                f"{tensors_file} is damaged: {reason}; restore it from a copy, or merge again"
            ) from error
    method = methods.get(summary.method)
    if method.needs_data:
        return None
    weights = {} if recipe is None else {s.name: s.parameters.weight for s in recipe.adapters}
    inputs = MergeInputs(
        updates=updates,
        factors={task: adapter.modules for task, adapter in adapters.items()},
        weights={task: weight for task, weight in weights.items() if weight is not None},
        seed=0 if recipe is None else recipe.seed,
    )
    return method.run(inputs, parameters_of(method.name, summary.parameters)).updates


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
    for module, other in got.items():
        if module not in expected and other.energy > 0 and worst < 1.0:
            worst, where = 1.0, module
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
        ours = outputs_with_peft(model, again, inputs)
    merged = {task: {m: canonical(f.down, f.up, f.scaling) for m, f in adapter.modules.items()}}
    theirs = (
        outputs_with_peft(model, Path(adapter.source), inputs)
        if Path(adapter.source).is_dir() and not adapter.heads and not adapter.dense
        else outputs_with_updates(model, merged[task], inputs)
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
