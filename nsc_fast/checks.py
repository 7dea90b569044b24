"""What a recipe asks for that cannot be had together: told before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .adapters import Adapter
from .dense import without_coefficients
from .errors import MergeError
from .methods import Method
from .methods.entropy import EntropyObjective
from .parameters import Strict
from .processes import Processes
from .recipe import BaseSpec

__all__ = [
    "check_batches",
    "check_dense",
    "check_needs",
    "check_one_model",
    "check_predictions",
    "check_processes",
    "check_shardable",
]


def check_needs(method: Method, has_model: bool, data: Mapping[str, Any] | None) -> None:
    """Whether the method gets what it needs, and data only where it uses them."""
    if method.needs_data and not (has_model and data):
        raise MergeError(
            f"method {method.name!r} needs the base model and unlabeled data of every task; give them, or "
            "choose a data-free method such as 'task_arithmetic'"
        )
    if data and not method.needs_data:
        raise MergeError(f"method {method.name!r} uses no data; leave the data out, or choose 'nsc'")


def check_batches(data: Mapping[str, Any] | None) -> None:
    """Whether data are batches by task: not a file, and not one batch.

    Raises:
        MergeError: they are not; names the task.
    """
    if data is None:
        return
    if not isinstance(data, Mapping):
        raise MergeError(
            f"data is a {type(data).__name__}; give a dict: the name of each task -> its batches"
        )
    for task, own in data.items():
        if isinstance(own, str | os.PathLike):
            raise MergeError(
                f"data of task {task!r} is the path {os.fspath(own)!r}, not batches; "
                "nsc_fast.data.text_batches(path, tokenizer) makes them"
            )
        if isinstance(own, Mapping):
            raise MergeError(
                f"data of task {task!r} is a single batch ({', '.join(map(str, own))}); put it in a list"
            )
        if not isinstance(own, Iterable) or isinstance(own, Tensor):
            raise MergeError(
                f"data of task {task!r} is a {type(own).__name__}; give an iterable of batches, which are "
                "dicts of model inputs"
            )


def check_one_model(method: Method) -> None:
    """Whether the method gives one LoRA."""
    if not method.one_model:
        raise MergeError(
            f"method {method.name!r} keeps the adapters apart and gives no merged LoRA to write. In Python, "
            "merge_adapters(...) returns its store: rebuild(task) gives one adapter, save_store(file) writes "
            "all. Or choose another method"
        )


def check_dense(method: Method, parameters: Strict, dense: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether a method that takes long gives the coefficients with which whole modules are merged.

    Raises:
        MergeError: it finds cores, or may choose a merge that has none.
    """
    if method.name == "auto" or getattr(parameters, "granularity", None) == "core":
        raise without_coefficients(method.name, dense)


def check_predictions(
    parameters: Strict, adapters: Mapping[str, Adapter], model: nn.Module | None = None
) -> None:
    """For methods that look at the model's predictions: whether there are any of that kind.

    Without the model, what the adapters' own heads tell.

    Raises:
        MergeError: a regression head, by the name of its task, or predictions of another kind.
    """
    kind = getattr(parameters, "entropy", None)
    if kind is None:
        return
    for task, adapter in adapters.items() if kind == "classification" else ():
        for path, tensor in adapter.heads.items():
            if path.endswith(".weight") and tensor.ndim == 2 and tensor.shape[0] == 1:
                raise MergeError(
                    f"the head of task {task!r} ({path}) gives one number per example: entropy is not "
                    "defined for regression. Leave the task out, or use method 'nsc', whose objective needs "
                    "no outputs"
                )
    if model is not None:
        EntropyObjective.check(model, kind)


def check_shardable(method: Method, parameters: Strict, adapters: Mapping[str, Adapter]) -> None:
    """Whether a merge can run on a base model that is sharded.

    Raises:
        MergeError: a method that cannot, entropies of whole answers, or modules that were trained whole.
    """
    if not method.sharded_base:
        raise MergeError(
            f"method {method.name!r} cannot run on a sharded base model: leave --shard-base "
            "(base_model.shard) out, or choose a method that can, such as 'nsc' or 'auto'"
        )
    kind = getattr(parameters, "entropy", None)
    if kind is not None:
        EntropyObjective.check_shardable(kind)
    for task, adapter in adapters.items():
        if adapter.dense:
            raise MergeError(
                f"adapter {task!r} holds modules that were trained whole, which cannot be merged into a "
                "sharded base model: say modules_to_save: drop or keep-separate, or leave --shard-base out"
            )


def check_processes(base: BaseSpec, processes: Processes | None) -> None:
    """Whether the base model's place fits the number of processes.

    Raises:
        MergeError: it is to be sharded by one process, or mapped to devices by each of several.
    """
    if base.shard and processes is None:
        raise MergeError(
            "--shard-base (base_model.shard) divides the base model among several processes, and this one is "
            "alone: start it with torchrun --nproc_per_node N -m nsc_fast ..., or accelerate launch"
        )
    if base.device_map is not None and processes is not None:
        raise MergeError(
            f"device_map is for one process, and there are {processes.size}, each of which would map the "
            "whole base model to the same devices: start one, or use --shard-base (base_model.shard) instead"
        )
