"""Examples into batches of tensors: tokenised or processed, padded to the longest of each batch."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import MergeError
from ..recipe import DataOptions
from .columns import Example
from .processors import Limits
from .tables import optional

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_images", "encode_text"]

DEFAULT_LENGTH = 512
_NO_LIMITS = Limits()


def encode_text(
    task: str,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    limits: Limits,
    *,
    special_tokens: bool = True,
) -> tuple[list[dict[str, Tensor]], list[str]]:
    """Batches of rows of similar length, padded on the right (positions then do not depend on the batch).

    Args:
        special_tokens: whether the tokenizer adds its own; a chat template has written them already.

    Returns:
        The batches (``input_ids (B, S)`` int64, ``attention_mask (B, S)``, ...), and notices.

    Raises:
        MergeError: more tokens wanted than the model has positions, a token that the model does not know, a
            row without tokens, no padding token.
    """
    length, notices = _length(task, tokenizer, options, limits)
    tokenizer = _padding(task, tokenizer)
    batches, cut = [], 0
    for chunk in _chunks(sorted(examples, key=lambda example: example.size), options.batch_size):
        words = isinstance(chunk[0].text, tuple)
        texts = [list(example.text) if words else example.text for example in chunk]
        pairs = None if chunk[0].pair is None else [example.pair for example in chunk]
        encoded = tokenizer(
            texts,
            pairs,
            is_split_into_words=words,
            add_special_tokens=special_tokens,
            truncation=True,
            max_length=length,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        tokens = encoded["attention_mask"].sum(1).tolist()
        _check_tokens(task, chunk, encoded["input_ids"], tokens, limits)
        cut += sum(count >= length for count in tokens)
        batches.append(dict(encoded))
    if cut:
        notices.append(f"{cut} of {len(examples)} rows reach {length} tokens; what lies beyond is not read")
    return batches, notices


def encode_images(
    task: str,
    examples: Sequence[Example],
    processor: Any,
    options: DataOptions,
    folder: Path | None,
    limits: Limits = _NO_LIMITS,
    *,
    chats: bool = False,
) -> tuple[list[dict[str, Tensor]], list[str]]:
    """Batches of images, with their texts where there are any (``processor`` is then a joint one).

    Texts are padded on the right. One that images take tokens of is cut only behind the last of these. Texts
    without images come in batches of their own.

    Args:
        chats: whether a chat template wrote the texts. Each may then have any number of images, and gets no
            start token where the template has written one.

    Returns:
        The batches (``pixel_values``; for texts also ``input_ids (B, S)``, ``attention_mask (B, S)``, ...),
        and notices.

    Raises:
        MergeError: an image that cannot be opened, images that do not fit into one batch, a text whose images
            lie beyond the limits.
    """
    texts = examples[0].text is not None
    extra: dict[str, Any] = {"padding": True, "padding_side": "right"} if texts else {}
    in_text, length, notices = texts and (chats or bool(getattr(processor, "image_token", None))), 0, []
    if in_text:
        length, notices = _length(task, processor.tokenizer, options, limits, sys.maxsize)
    elif texts:
        extra |= {"truncation": True, **({"max_length": options.max_length} if options.max_length else {})}
    start = processor.tokenizer.bos_token if chats else None
    if start and all(example.text.startswith(start) for example in examples):
        extra["add_special_tokens"] = False
    bare = [example for example in examples if not example.images]
    batches, cut = [], 0
    for part in ([example for example in examples if example.images], bare):
        for chunk in _chunks(part, options.batch_size):
            images = [[_image(task, example, image, folder) for image in example.images] for example in chunk]
            encoded = _processed(task, chunk, images, processor, extra, nested=chats)
            if in_text:
                cut += _cut(task, chunk, encoded, processor, length)
            batches.append({key: value for key, value in encoded.items() if isinstance(value, Tensor)})
    if bare:
        notices.append(f"{len(bare)} of {len(examples)} rows have no image and are read as texts")
    if cut:
        notices.append(f"{cut} of {len(examples)} rows reach {length} tokens; what lies beyond is not read")
    return batches, notices


def _processed(
    task: str,
    chunk: Sequence[Example],
    images: Sequence[Sequence[Any]],
    processor: Any,
    extra: dict[str, Any],
    *,
    nested: bool,
) -> dict[str, Any]:
    """What the processor makes of some rows.

    Args:
        nested: give it each row's images in a list, as processors of chats want them.
    """
    given: dict[str, Any] = {} if chunk[0].text is None else {"text": [example.text for example in chunk]}
    if any(images):
        given["images"] = list(images) if nested else [image for own in images for image in own]
    try:
        return dict(processor(**given, **extra, return_tensors="pt"))
    except (ValueError, RuntimeError, TypeError) as error:
        # Where one row alone is refused, that is the one to name.
        for example, own in zip(chunk, images, strict=True) if len(chunk) > 1 else ():
            _processed(task, [example], [own], processor, extra, nested=nested)
        place, which, way_out = (
            chunk[0].place,
            "this row",
            "has it one image token of the model for each image?",
        )
        if len(chunk) > 1:
            place, which, way_out = (
                f"{place} to {chunk[-1].place}",
                "these rows together",
                "try batch_size: 1",
            )
        raise MergeError(
            f"task {task!r}: {place}: the processor refuses {which}: {error}; {way_out}"
        ) from error


def _cut(task: str, chunk: Sequence[Example], encoded: dict[str, Any], processor: Any, length: int) -> int:
    """Cuts rows to ``length`` tokens, in place; returns how many there were to cut."""
    ids = encoded["input_ids"]
    if ids.shape[1] <= length:
        return 0
    tokens = encoded["attention_mask"].sum(1).tolist()
    of_images = getattr(processor, "image_token_ids", None) or [getattr(processor, "image_token_id", None)]
    for example, row, count in zip(chunk, ids, tokens, strict=True):
        beyond = row[length:].tolist()
        # Where it is not known which tokens are of images, any may be.
        if any(token in of_images for token in beyond) or (None in of_images and count > length):
            raise MergeError(
                f"task {task!r}: {example.place}: its images reach beyond {length} tokens (of {count}); "
                "raise data.max_length if the model can take more, or remove the row"
            )
    for key, value in encoded.items():
        if isinstance(value, Tensor) and value.shape[:2] == ids.shape and not key.startswith("pixel_"):
            encoded[key] = value[:, :length]
    return sum(count > length for count in tokens)


def _length(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    limits: Limits,
    default: int = DEFAULT_LENGTH,
) -> tuple[int, list[str]]:
    wanted, most = options.max_length, tokenizer.model_max_length
    if wanted is None:
        return min(default, most, limits.positions or default), []
    if limits.positions is not None and wanted > limits.positions:
        raise MergeError(
            f"task {task!r}: data.max_length is {wanted}, and the base model has {limits.positions} "
            f"positions; set it to at most {limits.positions}"
        )
    if wanted > most:
        return wanted, [f"max_length {wanted} is above the {most} tokens that the tokenizer is made for"]
    return wanted, []


def _padding(task: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that can pad; the one given is left as it is. Padding is masked: any token will do."""
    if tokenizer.pad_token is not None:
        return tokenizer
    token = tokenizer.eos_token or tokenizer.unk_token
    if token is None:
        raise MergeError(f"task {task!r}: the tokenizer has no token to pad with; set its pad_token")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = token
    return tokenizer


def _check_tokens(
    task: str, chunk: Sequence[Example], ids: Tensor, tokens: Sequence[int], limits: Limits
) -> None:
    for example, row, count in zip(chunk, ids, tokens, strict=True):
        if count == 0:
            raise MergeError(f"task {task!r}: {example.place}: no token is left of this row; remove it")
        if limits.vocabulary is not None and (top := int(row.max())) >= limits.vocabulary:
            raise MergeError(
                f"task {task!r}: {example.place}: token {top} is beyond the base model's vocabulary of "
                f"{limits.vocabulary}; tokenizer and model do not belong together"
            )


def _image(task: str, example: Example, value: Any, folder: Path | None) -> Any:
    """An RGB image from a path, bytes, ``{"bytes": ..., "path": ...}`` (Parquet), or an image."""
    module = optional(task, "PIL.Image", "image data")
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        value = BytesIO(value)
    elif isinstance(value, str | Path):
        value = (folder or Path()) / value
    elif not isinstance(value, module.Image):
        raise MergeError(
            f"task {task!r}: {example.place}: the image is a {type(value).__name__}, not a path, bytes or a "
            "PIL image"
        )
    try:
        return (value if isinstance(value, module.Image) else module.open(value)).convert("RGB")
    except (OSError, ValueError, SyntaxError, module.DecompressionBombError) as error:
        raise MergeError(
            f"task {task!r}: {example.place}: this image cannot be opened: {error}; repair or remove it"
        ) from error


def _chunks(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    return (examples[start : start + size] for start in range(0, len(examples), size))
