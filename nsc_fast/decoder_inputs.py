"""Inputs that a model needs and unlabeled batches lack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .batches import Batch, rows, without_labels
from .errors import MergeError

__all__ = ["completed"]

_DECODER = ("decoder_input_ids", "decoder_inputs_embeds")


def completed(
    model: nn.Module | None, data: Mapping[str, Iterable[Batch]] | None
) -> Mapping[str, Iterable[Batch]] | None:
    """Data whose batches have what the model's decoder needs.

    An encoder-decoder model that generates gets, where a batch has no inputs for its decoder, the token that
    every generation starts with. All other data are returned as they are.

    Raises:
        MergeError: such a model that does not say which token that is.
    """
    config = getattr(model, "config", None)
    if data is None or not getattr(config, "is_encoder_decoder", False) or not model.can_generate():
        return data
    token = _start(model)
    return {
        task: _with_starts(_Starting(task, token, type(model).__name__), own) for task, own in data.items()
    }


def _start(model: Any) -> int | None:
    for name in ("decoder_start_token_id", "bos_token_id"):
        for config in (getattr(model, "generation_config", None), model.config):
            token = getattr(config, name, None)
            if token is not None:
                return token[0] if isinstance(token, list) else token
    return None


@dataclass(frozen=True)
class _Starting:
    """Gives a batch of a task the first token of the decoder, where it has none."""

    task: str
    token: int | None
    model: str

    def __call__(self, batch: Batch) -> Batch:
        inputs = without_labels(batch)
        if not inputs or any(key in inputs for key in _DECODER):
            return batch
        if self.token is None:
            raise MergeError(
                f"task {self.task!r}: {self.model} has an encoder and a decoder, the batch has no "
                "decoder_input_ids, and the config no decoder_start_token_id; add one of them"
            )
        device = next(iter(inputs.values())).device
        ids = torch.full((rows(inputs), 1), self.token, dtype=torch.int64, device=device)
        return {**inputs, "decoder_input_ids": ids}


def _with_starts(starting: _Starting, source: Iterable[Batch]) -> Iterable[Batch]:
    # Lists stay lists: they are shuffled and sampled otherwise than what can only be iterated.
    if isinstance(source, list | tuple | Iterator):
        return [starting(batch) for batch in source]
    return _Each(starting, source)


class _Each:
    """The batches of a source that is iterated again each round."""

    def __init__(self, starting: _Starting, source: Iterable[Batch]) -> None:
        self._starting, self._source = starting, source

    def __iter__(self) -> Iterator[Batch]:
        return map(self._starting, self._source)
