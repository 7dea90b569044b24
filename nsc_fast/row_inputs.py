"""What a row of a recipe's data holds, by shapes: inputs of any number of rows, without values."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .data import draw_examples
from .data.columns import Example
from .data.encode import DEFAULT_LENGTH, encode_images
from .data.files import open_source
from .data.processors import BaseProcessors, Limits, limits_of
from .errors import MergeError
from .packing import divisible
from .recipe import AdapterSpec, BaseSpec

__all__ = ["RowInputs", "row_inputs"]

# Adapters of these tasks stand in models that make their decoder's inputs themselves.
_CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass(frozen=True)
class RowInputs:
    """Inputs of one row.

    Attributes:
        tokens: inputs of shape ``(B, S)``; none where a row is an image alone.
        decoder: tokens for a decoder beside the encoder; -1 for as many as the encoder gets, 0 for none.
        images: input -> shape and dtype of what all images of one row make of it.
        image_tokens: tokens of a row that stand for its images, with the tokenizer's own.
    """

    tokens: tuple[str, ...] = ("input_ids", "attention_mask")
    decoder: int = 0
    images: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    image_tokens: int = 0

    def batch(self, rows: int, length: int, *, masked: bool = True) -> dict[str, Tensor]:
        """Inputs of ``rows`` rows of ``length`` tokens; ``masked``: with the mask of padding."""
        names = [name for name in self.tokens if masked or name != "attention_mask"]
        out = {name: torch.ones(rows, length, dtype=torch.int64) for name in names}
        if self.decoder:
            own = length if self.decoder < 0 else self.decoder
            out["decoder_input_ids"] = torch.ones(rows, own, dtype=torch.int64)
        for name, ((first, *rest), dtype) in self.images.items():
            out[name] = torch.zeros(rows * first, *rest, dtype=dtype)
        return out

    @property
    def bytes_of_images(self) -> int:
        """What the images of a row take."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.images.values())

    @property
    def divisible(self) -> bool:
        """Whether the rows of a batch may go through the model in parts."""
        return divisible(self.batch(2, self.image_tokens + 1))


def row_inputs(
    spec: AdapterSpec, base: BaseSpec, model: nn.Module, task_type: str | None, seed: int
) -> tuple[RowInputs, int]:
    """Inputs of a row of one adapter's data, and the most tokens that it may have (0 for an image alone).

    Data are looked at only where the model takes images: then rows are drawn as for a merge, and one of
    them goes through the base's processor, so that sizes and tokens of images are what the processor makes.

    Args:
        spec: with data.
        base: whose processor is read.
        model: its skeleton.
        task_type: PEFT's, of the adapters.
        seed: of the draw.

    Raises:
        MergeError: inputs that the model does not take or that are not enough for it, sequences longer than
            its positions or of a length that nothing limits; errors of the data and the processor.
    """
    accepted = inspect.signature(model.forward).parameters
    kind, limits = type(model).__name__, limits_of(model.config)
    inputs, length = RowInputs(), _length(spec, limits)
    if "pixel_values" in accepted:
        inputs, length = _of_images(spec, base, limits, seed, length)
    elif spec.data.image is not None or spec.data.format == "image":
        raise MergeError(f"task {spec.name!r}: the data are images, and {kind} takes no pixel_values")
    names = [*inputs.tokens, *inputs.images]
    first = model.main_input_name
    if first not in names or ("input_ids" in names and "input_ids" not in accepted):
        raise MergeError(
            f"task {spec.name!r}: memory cannot be planned: {kind} needs {first!r}, and the data of the "
            f"recipe give {', '.join(names)}; give data that the model takes, or leave --max-memory out"
        )
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        starts = model.can_generate() or task_type not in _CLASSIFIERS
        inputs = replace(inputs, decoder=1 if starts else -1)
    return inputs, length


def _length(spec: AdapterSpec, limits: Limits) -> int:
    """Where texts are cut."""
    wanted, limit = spec.data.max_length, limits.positions
    if wanted is not None and limit is not None and wanted > limit:
        raise MergeError(
            f"task {spec.name!r}: sequences of up to {wanted} tokens are longer than the {limit} "
            f"positions of the model; set data.max_length to {limit}"
        )
    return wanted or min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)


def _of_images(
    spec: AdapterSpec, base: BaseSpec, limits: Limits, seed: int, length: int
) -> tuple[RowInputs, int]:
    """For a model that takes images; the row with the most of them stands for all."""
    sample = draw_examples(open_source(spec.name, spec.data), spec.data, seed)
    most = max(sample.examples, key=lambda example: len(example.images))
    if not most.images:
        return RowInputs(), length
    processors, chats = BaseProcessors(base), bool(most.messages)
    bare = most.text is None and not chats
    processor = processors.images if bare else processors.joint
    # Of a text that images stand in only their places matter here: how long it is, max_length says.
    token = None if bare else getattr(processor, "image_token", None)
    text = most.text if token is None else token * len(most.images)
    one = Example(most.place, text, images=most.images)
    (row,), _ = encode_images(
        spec.name, [one], processor, spec.data, sample.folder, Limits() if bare else limits, chats=chats
    )
    ids = row.get("input_ids")
    tokens = () if ids is None else tuple(name for name, value in row.items() if value.shape == ids.shape)
    images = {n: (tuple(value.shape), value.dtype) for n, value in row.items() if n not in tokens}
    if ids is None:
        return RowInputs((), images=images), 0
    if token is None:
        return RowInputs(tokens, images=images), length
    own = int(ids.shape[1])
    if spec.data.max_length is None:
        raise MergeError(
            f"task {spec.name!r}: memory cannot be planned: rows with images are cut only where "
            f"data.max_length says so; set it, to {own + DEFAULT_LENGTH} for {own} tokens of images and "
            f"{DEFAULT_LENGTH} of text"
        )
    return RowInputs(tokens, images=images, image_tokens=own), length
