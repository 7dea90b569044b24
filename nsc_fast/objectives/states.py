"""Running a model up to its head, for the states that its blocks and its body return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..driver import backbone, forward_options
from ..errors import MergeError
from ..layers import model_device
from ..monitor import TokenBatch
from ..packing import parts
from .running import on_device

__all__ = ["StatesRunner", "kept", "leaving", "states"]


class StatesRunner:
    """Runs a model up to its head and returns the states, ``micro_batch`` sequences at a time."""

    def __init__(self, model: nn.Module, modules: Sequence[str], micro_batch: int | None = None) -> None:
        self.model = model
        self.runner = backbone(model, modules)
        self.options = forward_options(self.runner)
        self.device = model_device(model)
        self._micro_batch = micro_batch

    def parts(self, inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The inputs of every pass, on the device."""
        return [on_device(part, self.device) for part in parts(inputs, self._micro_batch)]

    def states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """``(B, ..., d)``."""
        pieces = [self.run(part) for part in self.parts(inputs)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """``(B, ..., d)`` of one pass; the inputs are on the device."""
        return states(self.runner(**inputs, **self.options))


def states(output: Any) -> Tensor:
    """The last states in what a model returns: of a pair of encoders both embeddings, side by side.

    Raises:
        MergeError: there is no tensor in it, or not as many images as texts.
    """
    found = getattr(output, "last_hidden_state", None)
    if found is None:
        found = leaving(output)
    if not isinstance(found, Tensor):
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        found = _embeddings(output)
    if not isinstance(found, Tensor):
        raise MergeError(f"the model returns a {type(output).__name__} without states to compare")
    return found


def leaving(output: Any) -> Tensor | None:
    """What a module returns, of a tuple or list the first; None where that is no tensor."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


def _embeddings(output: Any) -> Tensor | None:
    """``(B, 2 d)`` where images and texts are embedded (CLIP)."""
    both = [getattr(output, key, None) for key in ("image_embeds", "text_embeds")]
    found = [embedded for embedded in both if isinstance(embedded, Tensor)]
    if len({len(embedded) for embedded in found}) > 1:
        raise MergeError(
            f"a batch has {len(both[0])} images and {len(both[1])} texts; give batches of pairs to compare "
            "both embeddings"
        )
    return torch.cat(found, -1) if found else None


def kept(tokens: TokenBatch, found: Tensor, task: str) -> Tensor:
    # Where there is a decoder, the states are those of its tokens.
    name = "decoder.states" if tokens.decoder else "states"
    try:
        _, weight = tokens.tokens(found.shape[:-1], name)
    except ValueError:
        raise MergeError(
            f"task {task!r}: the model's states have shape {tuple(found.shape)}, which does not fit the batch"
        ) from None
    kept = (weight > 0).cpu()
    if found.ndim < 3 or kept.numel() % found.shape[0]:
        return kept
    return kept.reshape(found.shape[0], -1)
