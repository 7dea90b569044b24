"""The thin driver: adapters and a method in, a MergeResult out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from . import methods
from .adapters import (
    Adapter,
    check_against_model,
    common_base,
    common_task_type,
    module_shapes,
    read_adapter,
)
from .batches import Batch
from .driver import StepRecord
from .errors import MergeError
from .loading import load_base, load_tokenizer
from .methods import MergeInputs
from .parameters import Strict
from .recipe import AdapterSpec, BaseSpec, Recipe
from .result import MergeResult
from .text_data import read_rows, text_batches

__all__ = ["check_inputs", "merge_adapters", "read_adapters", "run_recipe"]


def merge_adapters(
    base_model: nn.Module | None,
    adapters: Mapping[str, Adapter | str | os.PathLike[str]],
    data: Mapping[str, Iterable[Batch]] | None = None,
    *,
    method: str = "nsc",
    parameters: Strict | Mapping[str, Any] | None = None,
    weights: Mapping[str, float] | None = None,
    base_name: str | None = None,
    seed: int = 0,
    impl: str = "auto",
    on_step: Callable[[StepRecord], None] | None = None,
) -> MergeResult:
    """Merges several LoRA adapters of one base model into one.

    Args:
        base_model: the live base model, unchanged when the function returns; None for data-free methods.
        adapters: task -> adapter (PEFT folder, hub id, or :class:`Adapter`).
        data: task -> iterable of batches (dicts of model inputs, unlabeled), for methods that need data.
        method: see ``nsc_fast.methods.names()``.
        parameters: of the method; its defaults otherwise.
        weights: coefficient per task: the initial value for methods that optimise, the value for others.
        base_name: id of the base model, where the adapters do not agree on one. The output names the base as
            the adapters do.
        seed: of everything random.
        impl: "auto", "triton" or "torch".
        on_step: called after each optimisation step.

    Example::

        result = merge_adapters(model, {"vqa": "org/vqa-lora", "ocr": "org/ocr-lora"}, data=batches)
        result.save_pretrained("merged")

    Raises:
        AdapterError: an adapter that cannot be merged, or does not fit the base model.
        MergeError: a method's needs that are not met.
    """
    if not adapters:
        raise MergeError("there is no adapter to merge")
    chosen = methods.get(method)
    if not isinstance(parameters, Strict):
        parameters = chosen.parameters(**(parameters or {}))
    check_needs(chosen, base_model is not None, data)
    read = {t: a if isinstance(a, Adapter) else read_adapter(a, name=t) for t, a in adapters.items()}
    notices = [notice for adapter in read.values() for notice in adapter.notices]
    if base_model is not None:
        notices += check_against_model(read.values(), base_model)
    inputs = MergeInputs(
        updates={task: adapter.canonical() for task, adapter in read.items()},
        factors={task: adapter.modules for task, adapter in read.items()},
        weights=dict(weights or {}),
        model=base_model,
        data=data,
        seed=seed,
        impl=impl,
        on_step=on_step,
    )
    result = chosen.run(inputs, parameters)
    return replace(
        result,
        base_model=_public_name(read.values(), base_name),
        base_shapes=None if base_model is None else module_shapes(base_model),
        task_type=common_task_type(read.values()),
        sources={t: {"source": str(a.source), "digest": a.digest} for t, a in read.items()},
        notices=(*notices, *result.notices),
        heads={t: a.heads for t, a in read.items() if a.heads},
    )


def check_needs(method: methods.Method, has_model: bool, data: Mapping[str, Any] | None) -> None:
    """Whether the method gets what it needs, and data only where it uses them."""
    if method.needs_data and not (has_model and data):
        raise MergeError(
            f"method {method.name!r} needs the base model and unlabeled data of every task; give them, or "
            "choose a data-free method such as 'task_arithmetic'"
        )
    if data and not method.needs_data:
        raise MergeError(f"method {method.name!r} uses no data; leave the data out, or choose 'nsc'")


def _public_name(adapters: Iterable[Adapter], base_name: str | None) -> str:
    """The base as the adapters name it, rather than where it lies on this machine."""
    named = {adapter.base_model for adapter in adapters}
    if len(named) == 1 and (name := named.pop()):
        return name
    return common_base(adapters, base_name)


def read_adapters(recipe: Recipe) -> dict[str, Adapter]:
    """The recipe's adapters by name."""
    return {spec.name: _read(spec, recipe) for spec in recipe.adapters}


def _read(spec: AdapterSpec, recipe: Recipe) -> Adapter:
    return read_adapter(
        spec.path,
        name=spec.name,
        revision=spec.revision,
        subfolder=spec.subfolder,
        modules_to_save=recipe.modules_to_save,
    )


def check_inputs(recipe: Recipe) -> tuple[dict[str, Adapter], BaseSpec]:
    """Everything that can be checked before the base model is loaded: adapters, data files, parameters."""
    method = methods.get(recipe.merge_method)
    recipe.method_parameters()
    adapters = read_adapters(recipe)
    name = common_base(adapters.values(), None if recipe.base_model is None else recipe.base_model.path)
    base = recipe.base_model or BaseSpec(path=name)
    data = {spec.name: spec.data for spec in recipe.adapters if spec.data is not None}
    check_needs(method, True, data)
    for spec in recipe.adapters:
        if method.needs_data and spec.data is None:
            raise MergeError(f"adapter {spec.name!r} has no data, which method {method.name!r} needs")
        if spec.data is not None:
            read_rows(spec.name, spec.data, recipe.seed)
    return adapters, base


def run_recipe(
    recipe: Recipe,
    *,
    device: str | torch.device = "cpu",
    impl: str = "auto",
    on_stage: Callable[[str], None] = lambda _: None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> tuple[MergeResult, nn.Module]:
    """Loads what the recipe names and merges it.

    Returns:
        The result, and the base model (unchanged), for the checks that follow.
    """
    on_stage("reading adapters")
    adapters, base = check_inputs(recipe)
    method = methods.get(recipe.merge_method)
    on_stage(f"loading {base.path}")
    modules = dict.fromkeys(m for adapter in adapters.values() for m in adapter.modules)
    model = load_base(base, modules, task_type=common_task_type(adapters.values()), device=device)
    check_against_model(adapters.values(), model)
    data = None
    if method.needs_data:
        on_stage("reading data")
        tokenizer = load_tokenizer(base)
        data = {s.name: text_batches(s.name, s.data, tokenizer, recipe.seed) for s in recipe.adapters}
    on_stage("merging")
    weights = {s.name: s.parameters.weight for s in recipe.adapters if s.parameters.weight is not None}
    result = merge_adapters(
        model,
        adapters,
        data,
        method=recipe.merge_method,
        parameters=recipe.method_parameters(),
        weights=weights,
        base_name=base.path,
        seed=recipe.seed,
        impl=impl,
        on_step=on_step,
    )
    resolved = recipe.model_dump(mode="json", exclude_none=True)
    resolved["base_model"] = base.model_dump(mode="json", exclude_none=True)
    return replace(result, recipe={**resolved, "parameters": dict(result.parameters)}), model
