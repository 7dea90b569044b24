"""Examples into batches of tensors: tokenised or processed, padded to the longest of each batch."""

from __future__ import annotations

import copy
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

__all__ = ["encode_images", "encode_text", "render_chats"]

DEFAULT_LENGTH = 512


def render_chats(
    task: str,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    template: str | None = None,
) -> list[Example]:
    """Chats as texts, written by the chat template.

    Args:
        template: instead of the tokenizer's own.

    Raises:
        MergeError: no chat template, or one that refuses a chat (roles out of order, say).
    """
    from jinja2 import TemplateError

    if template is None and not getattr(tokenizer, "chat_template", None):
        raise MergeError(
            f"task {task!r}: the tokenizer has no chat template; write the prompt yourself with "
            "data.template, or put the adapter's chat_template.jinja beside its weights with its tokenizer"
        )
    out = []
    for example in examples:
        asks = example.messages[-1]["role"] != "assistant"
        try:
            text = tokenizer.apply_chat_template(
                list(example.messages),
                chat_template=template,
                tokenize=False,
                add_generation_prompt=asks and options.generation_prompt,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise MergeError(
                f"task {task!r}: {example.place}: the chat template refuses this chat: {error}"
            ) from error
        out.append(Example(example.place, text))
    return out


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
    task: str, examples: Sequence[Example], processor: Any, options: DataOptions, folder: Path | None
) -> tuple[list[dict[str, Tensor]], list[str]]:
    """Batches of images, with their texts where there are any (``processor`` is then a joint one).

    Texts beside images are cut only where images take none of their tokens.

    Raises:
        MergeError: an image that cannot be opened, images that do not fit into one batch.
    """
    texts = examples[0].text is not None
    extra: dict[str, Any] = {"padding": True} if texts else {}
    if texts and not getattr(processor, "image_token", None):
        extra |= {"truncation": True, **({"max_length": options.max_length} if options.max_length else {})}
    batches = []
    for chunk in _chunks(examples, options.batch_size):
        images = [_image(task, example, folder) for example in chunk]
        given = {"text": [example.text for example in chunk]} if texts else {}
        try:
            encoded = processor(images=images, **given, **extra, return_tensors="pt")
        except (ValueError, RuntimeError, TypeError) as error:
            raise MergeError(
                f"task {task!r}: {chunk[0].place} to {chunk[-1].place}: the processor refuses these rows: "
                f"{error}; do the texts hold the model's image token? Otherwise try batch_size: 1"
            ) from error
        batches.append({key: value for key, value in encoded.items() if isinstance(value, Tensor)})
    return batches, []


def _length(
    task: str, tokenizer: PreTrainedTokenizerBase, options: DataOptions, limits: Limits
) -> tuple[int, list[str]]:
    wanted, most = options.max_length, tokenizer.model_max_length
    if wanted is None:
        return min(DEFAULT_LENGTH, most, limits.positions or DEFAULT_LENGTH), []
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


def _image(task: str, example: Example, folder: Path | None) -> Any:
    """An RGB image from a path, bytes, ``{"bytes": ..., "path": ...}`` (Parquet), or an image."""
    module = optional(task, "PIL.Image", "image data")
    value = example.image
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
