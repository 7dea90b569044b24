"""VeRA folders as LoRA: ``diag(lambda_b) B diag(lambda_d) A`` with A and B shared by all modules.

PEFT keeps one A as wide as the widest adapted layer and one B as tall as the tallest, and every layer takes
the first columns and rows that it needs. How many rows, the length of lambda_b tells; how many columns, only
the base model does: see :func:`fit_to_model`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nsc_fast.adapters.check import module_shapes
from nsc_fast.adapters.model import PREFIX, Adapter, AdapterError, LoraFactors, Problem
from nsc_fast.adapters.targets import Shapes
from nsc_fast.adapters.tensors import TensorHeader

__all__ = ["as_lora", "fit_to_model", "is_vera"]

_A, _B = "base_model.vera_A", "base_model.vera_B"
# Of VeRA's training only.
_INERT = ("projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights")
_AGAIN = "save the adapter again with PEFT's model.save_pretrained(folder)"

Load = Callable[[str], Tensor]


def is_vera(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of a VeRA adapter."""
    return config.get("peft_type") == "VERA"


def as_lora(
    name: str, config: Mapping[str, Any], headers: Mapping[str, TensorHeader], load: Load
) -> tuple[dict[str, Any], dict[str, TensorHeader], Load]:
    """Config, headers and loader of the LoRA adapter of scale 1 that is the same update.

    The factors are formed in float64 when they are loaded; A keeps the full width of the projection.

    Raises:
        AdapterError: projections that were not saved, or vectors and projections that do not fit.
    """
    if missing := [key for key in (_A, _B) if key not in headers]:
        raise AdapterError(
            f"adapter {name!r}",
            Problem(
                f"tensor {missing[0]!r}",
                "the shared projections are not in the file (save_projection=False); drawing them again from "
                "projection_prng_key is right only where PEFT and torch draw as they did in training",
                "load the adapter where it was trained and save it with "
                "model.peft_config[name].save_projection = True, or convert it with peft.save_as_lora",
            ),
        )
    modules = sorted(
        {key.rpartition(".")[0] for key in headers if key.endswith((".vera_lambda_b", ".vera_lambda_d"))}
    )
    wrong = [problem for module in modules for problem in _misfits(module, headers)]
    if wrong:
        raise AdapterError(f"adapter {name!r}", *wrong)
    out = {key: h for key, h in headers.items() if key not in (_A, _B) and ".vera_lambda_" not in key}
    vectors: dict[str, str] = {}
    for module in modules:
        up, down = f"{module}.vera_lambda_b", f"{module}.vera_lambda_d"
        (d_out,), (rank,) = headers[up].shape, headers[down].shape
        for side, key, shape in (("A", down, (rank, headers[_A].shape[1])), ("B", up, (d_out, rank))):
            out[f"{module}.lora_{side}.weight"] = TensorHeader(shape, headers[key].dtype)
            vectors[f"{module}.lora_{side}.weight"] = key

    def load_factor(key: str) -> Tensor:
        if key not in vectors:
            return load(key)
        vector = load(vectors[key]).to(torch.float64)[:, None]
        shared = load(_A if key.endswith("lora_A.weight") else _B).to(torch.float64)
        return vector * shared[: vector.shape[0]]

    lora = {key: value for key, value in config.items() if key not in _INERT}
    return lora | {"peft_type": "LORA", "lora_alpha": config.get("r")}, out, load_factor


def _misfits(module: str, headers: Mapping[str, TensorHeader]) -> list[Problem]:
    found = {side: headers.get(f"{module}.vera_lambda_{side}") for side in "bd"}
    path = module.removeprefix(PREFIX)
    for side, other in (("b", "d"), ("d", "b")):
        if found[side] is None:
            reason = f"vera_lambda_{other} without vera_lambda_{side}"
            return [Problem(f"module {path!r}", reason, _AGAIN)]
    up, down, a, b = found["b"].shape, found["d"].shape, headers[_A].shape, headers[_B].shape
    if [len(up), len(down), len(a), len(b)] != [1, 1, 2, 2] or (down[0], down[0]) != (a[0], b[1]):
        reason = f"vera_lambda_b {up}, vera_lambda_d {down} do not fit vera_A {a}, vera_B {b}"
    elif up[0] > b[0]:
        reason = f"vera_lambda_b {up} is longer than vera_B {b} is tall"
    else:
        return []
    return [Problem(f"module {path!r}", reason, _AGAIN)]


def fit_to_model(adapter: Adapter, base: nn.Module | Shapes | None) -> Adapter:
    """A VeRA adapter with every A cut to its layer's input; any other adapter as it is.

    Args:
        base: the base model, or the shapes of its modules.

    Raises:
        AdapterError: a VeRA adapter without a base.
    """
    if not is_vera(adapter.config):
        return adapter
    if base is None:
        raise AdapterError(
            f"adapter {adapter.name!r}",
            Problem(
                "peft_type = VERA",
                "all layers share one projection, and only the base model tells how much of it each takes",
                "give the base model, or convert the adapter with peft.save_as_lora",
            ),
        )
    shapes = module_shapes(base) if isinstance(base, nn.Module) else base
    modules = {}
    for path, factors in adapter.modules.items():
        width = shape[1] if (shape := shapes.get(path)) else factors.shape[1]
        modules[path] = LoraFactors(factors.down[:, :width].contiguous(), factors.up, factors.scaling)
    return dataclasses.replace(adapter, modules=modules)
