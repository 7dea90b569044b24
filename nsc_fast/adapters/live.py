"""Reads adapters from a live PeftModel by what its modules look like; PEFT is not imported."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nsc_fast.adapters.fields import scaling_of
from nsc_fast.adapters.model import PREFIX, Adapter, AdapterError, Problem
from nsc_fast.adapters.tensors import ModulesToSave, TensorHeader, assemble

__all__ = ["from_peft_model"]

SOURCE = "live model"


def from_peft_model(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    modules_to_save: ModulesToSave = "error",
) -> dict[str, Adapter]:
    """Copies the adapters of a live model, judged as files are.

    The scale is what the layers use now; a notice tells where it differs from the config.

    Args:
        model: a ``PeftModel``, or a transformers model after ``add_adapter``.
        adapter_name: one adapter only. Default: all of them.
        modules_to_save: as for ``read_adapter``.

    Returns:
        Adapters by name, factors copied to the CPU.

    Raises:
        AdapterError: no adapters, an unknown name, an adapter that is merged into the base at the
            moment, or anything that ``read_adapter`` refuses.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        raise AdapterError(
            SOURCE,
            Problem(
                type(model).__name__,
                "has no peft_config, so it holds no adapters",
                "pass the PeftModel itself, without DistributedDataParallel or torch.compile around it",
            ),
        )
    if adapter_name is not None and adapter_name not in configs:
        raise AdapterError(
            SOURCE,
            Problem(
                f"adapter {adapter_name!r}",
                "is not in the model",
                f"choose one of {', '.join(map(repr, configs))}",
            ),
        )
    names = list(configs) if adapter_name is None else [adapter_name]
    return {name: _read(model, name, configs[name], modules_to_save) for name in names}


def _read(model: nn.Module, name: str, peft_config: Any, policy: ModulesToSave) -> Adapter:
    config = {key: _plain(value) for key, value in peft_config.to_dict().items()}
    tensors: dict[str, Tensor] = {}
    scalings: dict[str, float] = {}
    merged: list[str] = []
    for path, module in model.named_modules():
        path = path.removeprefix(PREFIX)
        for key, tensor in _tensors_of(module, name):
            tensors[f"{PREFIX}{path}.{key}"] = tensor.detach()
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, Mapping) and name in scaling:
            scalings[path] = float(scaling[name])
            if name in getattr(module, "merged_adapters", ()):
                merged.append(path)
    _refuse_unreadable(name, tensors, merged)
    copies = {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items()}
    headers = {
        key: TensorHeader(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for key, tensor in copies.items()
    }
    adapter = assemble(
        name,
        SOURCE,
        config,
        headers,
        copies.__getitem__,
        digest=_digest(copies),
        modules_to_save=policy,
        scalings=scalings,
    )
    return _with_scale_notice(adapter)


def _tensors_of(module: nn.Module, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one adapter in one module, by their keys below it in an adapter file."""
    children = {**module._modules, **module._parameters, **module._buffers}
    for attribute in children:
        if not attribute.startswith("lora_"):
            continue
        store = getattr(module, attribute)  # ModuleDict, ParameterDict or BufferDict, by adapter
        if adapter not in store:
            continue
        value = store[adapter]
        if isinstance(value, nn.Module):
            for key, tensor in value.state_dict().items():
                yield f"{attribute}.{key}", tensor
        else:
            yield attribute, value
    saved = module._modules.get("modules_to_save")
    if isinstance(saved, nn.ModuleDict) and adapter in saved:
        yield from saved[adapter].state_dict().items()


def _refuse_unreadable(name: str, tensors: Mapping[str, Tensor], merged: list[str]) -> None:
    problems = [
        Problem(
            f"module {path!r}",
            "the adapter is merged into the base weight at the moment, so the base is not the base",
            "call model.unmerge_adapter() first",
        )
        for path in merged
    ]
    problems += [
        Problem(f"tensor {key!r}", "is on the meta device and has no values", "load the weights first")
        for key, tensor in tensors.items()
        if tensor.is_meta
    ]
    if problems:
        raise AdapterError(f"adapter {name!r}", *problems)


def _with_scale_notice(adapter: Adapter) -> Adapter:
    changed = [
        path
        for path, factors in adapter.modules.items()
        if not math.isclose(factors.scaling, scaling_of(adapter.config, path), rel_tol=1e-6)
    ]
    if not changed:
        return adapter
    notice = (
        f"{len(changed)} modules ({changed[0]} …) have another scale than the config; the live one is used"
    )
    return dataclasses.replace(adapter, notices=(*adapter.notices, notice))


def _plain(value: Any) -> Any:
    """The value as it would stand in adapter_config.json."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset | tuple):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return value


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
