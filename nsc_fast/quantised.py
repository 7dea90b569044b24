"""Quantised bases: what they need installed, and how transformers is told to make them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from torch import nn

from .errors import MergeError
from .recipe import BaseSpec

__all__ = ["INSTALL", "check_installed", "keep_differentiable", "quantisation_config", "quantised_by"]

INSTALL = "pip install 'nsc-fast[quantised]'"
_OURS = ("bitsandbytes", "torchao")


def check_installed(spec: BaseSpec) -> None:
    """Whether the package is there that quantises the base, or that opens its quantised files.

    Looks for the package only, without importing it. Of a base on the hub, whose config is not here yet,
    transformers itself tells when it has read it.

    Raises:
        MergeError: it is not; names it and the extra.
    """
    wanted, why = None, ""
    if spec.quantised:
        wanted = spec.quant_method or "bitsandbytes"
        why = "load_in_4bit" if spec.load_in_4bit else "load_in_8bit"
    elif (file := Path(spec.path, spec.subfolder or "", "config.json").expanduser()).is_file():
        wanted, why = quantised_by(json.loads(file.read_text(encoding="utf-8"))), "its quantised weights"
    if wanted in _OURS and importlib.util.find_spec(wanted) is None:
        raise MergeError(
            f"base model {spec.path!r}: {why} needs {wanted}, which is not installed: {INSTALL}; or choose a "
            "base that is not quantised, with dtype: bfloat16 and, if it does not fit, device_map: auto"
        )


def quantised_by(config: dict[str, Any]) -> str | None:
    """The package or format by which a checkpoint is quantised, by its config; None if it is not."""
    settings = config.get("quantization_config")
    if not settings:
        return None
    return str(settings.get("quant_method") or "an unnamed method")


def keep_differentiable(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights on a CPU with AVX512-BF16.

    It does so in the first pass without gradients, and from then on no gradient reaches a layer's input,
    without a word.

    Raises:
        MergeError: it has done so already.
    """
    for name, layer in model.named_modules():
        if not hasattr(layer, "support_avx512bf16_for_cpu"):
            continue
        layer.support_avx512bf16_for_cpu = False
        state = getattr(layer.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise MergeError(
                f"the 4-bit weights of {name!r} are packed for inference by bitsandbytes, and no gradient "
                "goes through them any more: load the base again and merge before its first forward pass"
            )


def quantisation_config(spec: BaseSpec) -> Any:
    """transformers' quantisation config for a base that is quantised while it is loaded.

    4 bits: NF4, which QLoRA adapters were trained on. 8 bits: LLM.int8 (bitsandbytes, which rounds the
    activations too) or the weights alone (torchao).
    """
    import transformers

    if spec.quant_method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if spec.load_in_4bit:
        return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return transformers.BitsAndBytesConfig(load_in_8bit=True)
