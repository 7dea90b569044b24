"""Outputs of a model on probe inputs: as it is, with updates in it, and with an adapter that PEFT loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .dtypes import compute_dtype
from .errors import MergeError
from .factors import LowRankUpdate
from .layers import install, model_device, remove

__all__ = ["applied", "outputs", "outputs_with_peft", "outputs_with_updates", "probe"]


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


def outputs_with_updates(
    model: nn.Module,
    updates: Mapping[str, LowRankUpdate],
    inputs: Mapping[str, Tensor],
    whole: Mapping[str, Tensor] | None = None,
) -> Tensor:
    with applied(model, updates):
        return outputs(model, inputs, whole)


def outputs_with_peft(model: nn.Module, folder: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    from peft import PeftModel

    flags = [(p, p.requires_grad) for p in model.parameters()]
    loaded = PeftModel.from_pretrained(model, str(folder))
    try:
        return outputs(loaded, inputs)
    finally:
        loaded.unload()
        # PEFT leaves its configuration on the model and would warn of a second adapter.
        if hasattr(model, "peft_config"):
            del model.peft_config
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def outputs(
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
    wide = compute_dtype(tensors[0].dtype)
    return torch.cat([t.reshape(-1).to(wide) for t in tensors])
