"""Reads PEFT adapter folders into plain data, and inspects them without loading a weight."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from safetensors import safe_open

from nsc_fast.adapters.fields import config_problems, scaling_of
from nsc_fast.adapters.model import Adapter, Problem
from nsc_fast.adapters.source import digest_of, locate, read_config, read_headers
from nsc_fast.adapters.tensors import ModulesToSave, assemble, examine
from nsc_fast.adapters.vera import as_lora, is_vera

__all__ = ["Inspection", "inspect_adapter", "read_adapter"]


def read_adapter(
    path_or_hub_id: str | os.PathLike[str],
    *,
    name: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    modules_to_save: ModulesToSave = "error",
    offline: bool | None = None,
) -> Adapter:
    """Reads a LoRA or VeRA adapter as PEFT saves it. Safetensors only; a pickle is never opened.

    A VeRA adapter becomes a LoRA of the same update; A is as wide as the shared projection until
    ``fit_to_model`` cuts it to the layers of the base.

    Args:
        path_or_hub_id: folder, or ``owner/name`` on the hub.
        name: default: the last part of the path.
        revision: of the hub repository.
        subfolder: inside the folder or repository.
        modules_to_save: modules that were trained whole are refused (``error``), left out
            (``drop``) or handed over in ``Adapter.heads`` (``keep-separate``, for heads) or
            ``Adapter.dense`` (``merge-dense``).
        offline: ``True`` uses the hub's local cache only; ``None`` leaves it to ``HF_HUB_OFFLINE``.

    Returns:
        The adapter, factors on the CPU in the dtype of the file.

    Raises:
        AdapterError: naming adapter, field or tensor and the way out, for everything that would
            make the merge differ from what the adapter does.
    """
    files = locate(path_or_hub_id, name=name, revision=revision, subfolder=subfolder, offline=offline)
    config, headers = read_config(files), read_headers(files)
    with safe_open(files.weights, framework="pt") as weights:
        own, load = config, weights.get_tensor
        if is_vera(config):
            config, headers, load = as_lora(files.name, config, headers, load)
        adapter = assemble(
            files.name,
            files.source,
            config,
            headers,
            load,
            digest=digest_of(files.weights),
            modules_to_save=modules_to_save,
        )
    return replace(adapter, config=dict(own))


@dataclass(frozen=True)
class Inspection:
    """What config and headers tell about an adapter, without its weights.

    Attributes:
        name: as for ``read_adapter``.
        source: folder or hub id.
        base_model: the base that it was trained on.
        revision: of the base.
        task_type: PEFT's task type.
        ranks: the ranks that occur, ascending.
        scales: the scales in front of ``B A`` that occur, ascending; empty if the config is
            refused.
        targets: last parts of the adapted modules' paths, sorted.
        modules: number of adapted modules.
        parameters: of their factors.
        dtype: of the factors; several joined by ``+``.
        digest: sha256 of the weights file.
        problems: everything that ``read_adapter`` would refuse; NaN and infinity are not looked
            for.
        notices: what it would tell.
    """

    name: str
    source: str
    base_model: str | None
    revision: str | None
    task_type: str | None
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    targets: tuple[str, ...]
    modules: int
    parameters: int
    dtype: str
    digest: str
    problems: tuple[Problem, ...]
    notices: tuple[str, ...]


def inspect_adapter(
    path_or_hub_id: str | os.PathLike[str],
    *,
    name: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    modules_to_save: ModulesToSave = "error",
    offline: bool | None = None,
) -> Inspection:
    """Tells what an adapter is and all that stops a merge. Arguments as for ``read_adapter``.

    Raises:
        AdapterError: there are no two readable files to inspect.
    """
    files = locate(path_or_hub_id, name=name, revision=revision, subfolder=subfolder, offline=offline)
    config, headers = read_config(files), read_headers(files)
    if is_vera(config):
        config, headers, _ = as_lora(files.name, config, headers, lambda key: torch.empty(0))
    found = examine(config, headers, modules_to_save)
    shapes = [headers[key].shape for pair in found.pairs.values() for key in pair]
    scales = set() if config_problems(config) else {scaling_of(config, m) for m in found.pairs}
    return Inspection(
        name=files.name,
        source=files.source,
        base_model=config.get("base_model_name_or_path"),
        revision=config.get("revision"),
        task_type=config.get("task_type"),
        ranks=tuple(sorted({headers[down].shape[0] for down, _ in found.pairs.values()})),
        scales=tuple(sorted(scales)),
        targets=tuple(sorted({module.rpartition(".")[2] for module in found.pairs})),
        modules=len(found.pairs),
        parameters=sum(rows * columns for rows, columns in shapes),
        dtype="+".join(sorted({headers[k].dtype for pair in found.pairs.values() for k in pair})),
        digest=digest_of(files.weights),
        problems=tuple(found.problems),
        notices=tuple(found.notices),
    )
