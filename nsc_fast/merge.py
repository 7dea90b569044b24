"""The thin driver: adapters and a method in, a MergeResult out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from . import methods
from .adapters import (
    Adapter,
    check_against_model,
    common_base,
    common_task_type,
    dense_updates,
    fit_to_model,
    module_shapes,
    read_adapter,
)
from .adapters.tensors import ModulesToSave
from .batches import Batch
from .checkpoint import Checkpoints, digest
from .checks import (
    check_batches,
    check_dense,
    check_needs,
    check_one_model,
    check_predictions,
    check_processes,
    check_shardable,
)
from .data import adapter_folders, check_data, check_tokenizers, read_data
from .decoder_inputs import completed
from .dense import dense_applied, merge_dense
from .driver import StepRecord
from .errors import MergeError
from .interference import Interference, interference
from .loading import base_skeleton, load_base
from .methods import MergeInputs
from .parameters import Strict
from .processes import Processes
from .quantised import check_installed, keep_differentiable
from .recipe import AdapterSpec, BaseSpec, Recipe, parameters_of
from .result import MergeResult
from .sharding import shard

__all__ = ["Prepared", "check_inputs", "merge_adapters", "prepare_recipe", "read_adapters", "run_recipe"]


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
    modules_to_save: ModulesToSave = "error",
    on_step: Callable[[StepRecord], None] | None = None,
    checkpoints: Checkpoints | None = None,
    processes: Processes | None = None,
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
        modules_to_save: what to do about modules that an adapter trained whole, as of ``read_adapter``. Of
            those in ``adapters`` that are read already it was decided there.
        on_step: called after each optimisation step.
        checkpoints: where an optimisation is kept, and whether it goes on from there after an interruption;
            ``checkpoints.clear()`` when the result is written.
        processes: ``nsc_fast.processes.launched()``, to divide every step among the processes of a launcher.
            All must make the same call; all get the same result.

    Example::

        result = merge_adapters(model, {"vqa": "org/vqa-lora", "ocr": "org/ocr-lora"}, data=batches)
        result.save_pretrained("merged")

    Raises:
        AdapterError: an adapter that cannot be merged, or does not fit the base model.
        RecipeError: parameters that the method does not have.
        MergeError: a method's needs that are not met, or data that are no batches.
    """
    if not adapters:
        raise MergeError("there is no adapter to merge")
    chosen = methods.get(method)
    if not isinstance(parameters, Strict):
        parameters = parameters_of(method, parameters or {})
    check_batches(data)
    check_needs(chosen, base_model is not None, data)
    whole = {"modules_to_save": modules_to_save}
    read = {t: a if isinstance(a, Adapter) else read_adapter(a, name=t, **whole) for t, a in adapters.items()}
    if base_model is not None:
        check_predictions(parameters, read, base_model)
    prepared = prepare(
        base_model, read, data, weights=weights, base_name=base_name, seed=seed, impl=impl, on_step=on_step
    )
    return prepared.run(chosen, parameters, checkpoints=checkpoints, processes=processes)


@dataclass(frozen=True)
class Prepared:
    """Adapters in canonical form, for one merge or for many.

    Attributes:
        inputs: what a method gets.
        common: fields of the result that do not depend on the method.
        recipe: what the resolved recipe says beside method and parameters.
        dense: task -> parameter path -> difference to the base, of modules that were trained whole.
    """

    inputs: MergeInputs
    common: Mapping[str, Any]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    dense: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def run(
        self,
        method: methods.Method,
        parameters: Strict,
        weights: Mapping[str, float] | None = None,
        *,
        checkpoints: Checkpoints | None = None,
        processes: Processes | None = None,
    ) -> MergeResult:
        """One merge; ``weights`` go over those of the inputs, the rest as for :func:`merge_adapters`."""
        if self.dense:
            check_dense(method, parameters, self.dense)
        used = {**self.inputs.weights, **(weights or {})}
        if checkpoints is not None:
            checkpoints = checkpoints.with_facts(method=method.name, **self._facts(used))
        start = getattr(parameters, "init", None)
        start = start if isinstance(start, float) else 1 / len(self.inputs.updates)
        with dense_applied(self.inputs.model, self.dense, {t: used.get(t, start) for t in self.dense}):
            inputs = replace(self.inputs, weights=used, checkpoints=checkpoints, processes=processes)
            result = method.run(inputs, parameters)
        if self.dense:
            merged = merge_dense(
                self.inputs.model,
                self.dense,
                result.method,
                result.coefficients,
                result.stack_tasks,
                self.inputs.updates,
            )
            result = replace(result, dense=merged, notices=(*result.notices, merged.notice()))
        adapters = [
            {**spec, "parameters": {"weight": used[spec["name"]]}} if spec["name"] in used else spec
            for spec in self.recipe["adapters"]
        ]
        return replace(
            result,
            notices=(*self.common["notices"], *result.notices),
            recipe={
                **self.recipe,
                "merge_method": method.name,
                "adapters": adapters,
                "parameters": dict(result.parameters),
            },
            interference=self.interference,
            **{key: value for key, value in self.common.items() if key != "notices"},
        )

    def _facts(self, weights: Mapping[str, float]) -> dict[str, Any]:
        """What a merge depends on, to be compared when it goes on after an interruption."""
        adapters = {}
        for task, own in self.inputs.factors.items():
            content: list[tuple[str, Any]] = [("file", self.common["sources"][task]["digest"])]
            for module, factors in own.items():
                content += [(module, factors.scaling), (module, factors.down), (module, factors.up)]
            adapters[f"adapter {task}"] = digest(content)
        facts = {"seed": self.inputs.seed, "weights": dict(weights), **adapters}
        if self.inputs.model is not None:
            # Of every tensor a few values: to read all would take as long as loading them.
            parameters = self.inputs.model.named_parameters()
            facts["base model"] = digest((f"{n} {tuple(p.shape)}", _glimpse(p)) for n, p in parameters)
        return facts

    @cached_property
    def interference(self) -> dict[str, Interference]:
        """Between the adapters; the same for every merge of them."""
        return interference(self.inputs.updates)


def _glimpse(parameter: Tensor) -> Tensor | None:
    """16 values of a tensor; None where it is not held in one piece here."""
    if type(parameter.data) is not Tensor or parameter.device.type == "meta":
        return None
    flat = parameter.detach().reshape(-1)
    return flat[:: max(flat.numel() // 16, 1)][:16]


def prepare(
    base_model: nn.Module | None,
    adapters: Mapping[str, Adapter],
    data: Mapping[str, Iterable[Batch]] | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    base_name: str | None = None,
    seed: int = 0,
    impl: str = "auto",
    on_step: Callable[[StepRecord], None] | None = None,
) -> Prepared:
    """Canonical factors and everything else that merges of the same adapters share.

    Raises:
        AdapterError: an adapter that does not fit the base model.
    """
    read = {task: fit_to_model(adapter, base_model) for task, adapter in adapters.items()}
    notices = [notice for adapter in read.values() for notice in adapter.notices]
    if base_model is not None:
        keep_differentiable(base_model)
        notices += check_against_model(read.values(), base_model)
    dense = dense_updates(read.values(), base_model)
    heads = {task: adapter.heads for task, adapter in read.items() if adapter.heads}
    inputs = MergeInputs(
        updates={task: adapter.canonical() for task, adapter in read.items()},
        factors={task: adapter.modules for task, adapter in read.items()},
        weights=dict(weights or {}),
        model=base_model,
        data=completed(base_model, data),
        heads=heads,
        seed=seed,
        impl=impl,
        on_step=on_step,
    )
    name = _public_name(read.values(), base_name)
    common = {
        "base_model": name,
        "base_shapes": None if base_model is None else module_shapes(base_model),
        "task_type": common_task_type(read.values()),
        "sources": {t: {"source": str(a.source), "digest": a.digest} for t, a in read.items()},
        "notices": tuple(notices),
        "heads": heads,
    }
    recipe = {
        "base_model": {"path": name},
        "adapters": [{"name": task, "path": str(adapter.source)} for task, adapter in read.items()],
        "modules_to_save": "keep-separate" if heads else "merge-dense" if dense else "drop",
        "seed": seed,
    }
    return Prepared(inputs, common, recipe, dense)


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
    check_one_model(method)
    parameters = recipe.method_parameters()
    adapters = read_adapters(recipe)
    if recipe.base_model is not None and recipe.base_model.shard:
        check_shardable(method, parameters, adapters)
    name = common_base(adapters.values(), None if recipe.base_model is None else recipe.base_model.path)
    base = recipe.base_model or BaseSpec(path=name)
    check_installed(base)
    data = {spec.name: spec.data for spec in recipe.adapters if spec.data is not None}
    check_needs(method, True, data if method.needs_data else None)
    for spec in recipe.adapters:
        if method.needs_data and spec.data is None:
            raise MergeError(f"adapter {spec.name!r} has no data, which method {method.name!r} needs")
        if method.needs_data:
            check_data(spec.name, spec.data, recipe.seed)
    check_tokenizers(adapter_folders(recipe))
    check_predictions(parameters, adapters)
    return adapters, base


def run_recipe(
    recipe: Recipe,
    *,
    device: str | torch.device = "cpu",
    impl: str = "auto",
    on_stage: Callable[[str], None] = lambda _: None,
    on_step: Callable[[StepRecord], None] | None = None,
    checkpoints: Checkpoints | None = None,
    processes: Processes | None = None,
) -> tuple[MergeResult, nn.Module]:
    """Loads what the recipe names and merges it; ``checkpoints`` and ``processes`` as :func:`merge_adapters`.

    Returns:
        The result, and the base model (unchanged), for the checks that follow.
    """
    calls = {"on_stage": on_stage, "on_step": on_step}
    prepared, model = prepare_recipe(recipe, device=device, impl=impl, processes=processes, **calls)
    on_stage("merging")
    kept = {"checkpoints": checkpoints, "processes": processes}
    return prepared.run(methods.get(recipe.merge_method), recipe.method_parameters(), **kept), model


def prepare_recipe(
    recipe: Recipe,
    *,
    device: str | torch.device = "cpu",
    impl: str = "auto",
    on_stage: Callable[[str], None] = lambda _: None,
    on_step: Callable[[StepRecord], None] | None = None,
    processes: Processes | None = None,
) -> tuple[Prepared, nn.Module]:
    """Loads what the recipe names, the base model too, and brings the adapters into canonical form."""
    if recipe.base_model is not None:
        check_processes(recipe.base_model, processes)
        if recipe.base_model.shard:
            # The others may wait for a part of a weight: not for an error.
            processes.tells = False
    on_stage("reading adapters")
    adapters, base = check_inputs(recipe)
    modules = dict.fromkeys(m for adapter in adapters.values() for m in adapter.modules)
    task_type = common_task_type(adapters.values())
    # The weights may take minutes to load: what can be wrong without them is found before.
    skeleton = base_skeleton(base, modules, task_type=task_type)
    check_predictions(recipe.method_parameters(), adapters, skeleton.model)
    fitted = [fit_to_model(adapter, skeleton.model) for adapter in adapters.values()]
    check_against_model(fitted, skeleton.model)
    data, notices = None, []
    if methods.get(recipe.merge_method).needs_data:
        on_stage("reading data")
        data, notices = read_data(recipe, base, task_type)
    elif any(spec.data is not None for spec in recipe.adapters):
        notices = [f"method {recipe.merge_method!r} uses no data: those of the recipe are not read"]
    on_stage(f"loading {base.path}")
    model = load_base(base, modules, task_type=task_type, device=device, skeleton=skeleton)
    weights = {s.name: s.parameters.weight for s in recipe.adapters if s.parameters.weight is not None}
    prepared = prepare(
        model,
        adapters,
        data,
        weights=weights,
        base_name=base.path,
        seed=recipe.seed,
        impl=impl,
        on_step=on_step,
    )
    if base.shard:
        on_stage("sharding the base model")
        shard(model, modules, device)
    resolved = recipe.model_dump(mode="json", exclude_none=True)
    resolved["base_model"] = base.model_dump(mode="json", exclude_none=True)
    common = {**prepared.common, "notices": (*prepared.common["notices"], *notices)}
    return replace(prepared, recipe=resolved, common=common), model
