"""Unlabeled data of every form: files, folders, hub datasets and rows of a program into batches."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ..errors import MergeError, RecipeError
from ..recipe import BaseSpec, DataOptions, DataSpec, Recipe
from .chats import render_chats
from .columns import Example, plan
from .encode import encode_images, encode_text
from .files import open_rows, open_source
from .processors import BaseProcessors, Limits, limits_of
from .sample import draw
from .sources import Source
from .tokenizers import check_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Sample",
    "adapter_folders",
    "check_data",
    "check_tokenizers",
    "draw_examples",
    "image_batches",
    "read_data",
    "text_batches",
]


@dataclass(frozen=True)
class Sample:
    """Drawn rows of one task.

    Attributes:
        examples: in the order of the draw.
        folder: relative image paths are taken from here.
        notices: what was guessed, what is not read, what was left out.
    """

    examples: list[Example]
    folder: Path | None
    notices: list[str]


def draw_examples(source: Source, options: DataOptions, seed: int) -> Sample:
    """``num_samples`` rows of a source; see :func:`nsc_fast.data.sample.draw`.

    Raises:
        MergeError: unreadable rows, missing columns, nothing to read; names task, file and line.
    """
    columns = source.columns()
    records = source.records()
    if columns is None:
        first = next(records, None)
        if first is None:
            raise _nothing(source)
        columns = tuple(source.parse(*first))
        # A stream cannot be begun again: the first record goes back in front of the others.
        records = _again(first, records)
    made, notices = plan(source, options, columns)
    if source.columns() is not None:
        records = source.records(made.columns)
    drawn = draw(records, made.example, options.num_samples, seed)
    if not drawn.items:
        raise _nothing(source)
    if drawn.empty:
        notices.append(f"empty rows left out: {len(drawn.empty)}, the first {source.place(drawn.empty[0])}")
    if made.messages and made.image and not any(example.images for example in drawn.items):
        raise MergeError(
            f"task {source.task!r}: {source.name}: no row that was drawn has an image in column "
            f"{made.image!r}; leave data.image out, or name the column of the images with it"
        )
    forms = {(isinstance(e.text, tuple), e.pair is None) for e in drawn.items}
    if len(forms) > 1:
        raise MergeError(
            f"task {source.task!r}: {source.name}: some rows hold a text, others a list of words; "
            "make them alike"
        )
    return Sample(drawn.items, source.folder, [f"task {source.task!r}: {n}" for n in notices])


def check_data(task: str, spec: DataSpec, seed: int) -> None:
    """Draws the rows that a merge will read, for the errors; needs neither model nor tokenizer.

    Raises:
        MergeError: as :func:`draw_examples`; also an image file that is not there.
    """
    sample = draw_examples(open_source(task, spec), spec, seed)
    for example in sample.examples:
        for image in example.images:
            if isinstance(image, str) and not ((sample.folder or Path()) / image).is_file():
                raise MergeError(f"task {task!r}: {example.place}: there is no image {image!r}")


def read_data(
    recipe: Recipe, base: BaseSpec, task_type: str | None = None
) -> tuple[dict[str, list[dict[str, Tensor]]], list[str]]:
    """The batches of every task of a recipe that has data, and what the user should know about them.

    A model that writes with a decoder of its own gets the decoder's start token: what it should write is a
    label. Classifiers make the decoder's inputs themselves.

    Args:
        task_type: PEFT's, of the adapters.

    Raises:
        MergeError: bad data, a tokenizer or processor that is missing, tokenizers that do not agree.
    """
    specs = {spec.name: spec.data for spec in recipe.adapters if spec.data is not None}
    samples = {
        task: draw_examples(open_source(task, spec), spec, recipe.seed) for task, spec in specs.items()
    }
    processors, notices = BaseProcessors(base), []
    if any(example.text or example.messages for s in samples.values() for example in s.examples):
        found = check_tokenizers(adapter_folders(recipe), processors.tokenizer)
        notices, processors.chat_templates = found
    batches = {}
    for task, sample in samples.items():
        batches[task], more = _encode(task, sample, specs[task], processors)
        if "input_ids" in batches[task][0] and task_type not in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
            batches[task] = _with_decoder(batches[task], processors.limits.decoder_start)
        notices += [*sample.notices, *(f"task {task!r}: {notice}" for notice in more)]
    return batches, notices


def adapter_folders(recipe: Recipe) -> dict[str, Path]:
    """Adapter -> its folder, where it is one of this machine."""
    folders = {spec.name: Path(spec.path, spec.subfolder or "") for spec in recipe.adapters}
    return {name: folder for name, folder in folders.items() if folder.is_dir()}


def _encode(
    task: str, sample: Sample, options: DataOptions, processors: BaseProcessors
) -> tuple[list[dict[str, Tensor]], list[str]]:
    examples = sample.examples
    chats, template = bool(examples[0].messages), processors.chat_templates.get(task)
    if any(example.images for example in examples):
        bare = examples[0].text is None and not chats
        processor, limits = (processors.images, Limits()) if bare else (processors.joint, processors.limits)
        if chats:
            if template == processors.tokenizer.chat_template:
                # It came with a copy of the base's tokenizer; the processor's is the one for images.
                template = None
            examples = render_chats(task, examples, processor, options, template)
        return encode_images(task, examples, processor, options, sample.folder, limits, chats=chats)
    tokenizer = processors.tokenizer
    if chats:
        examples = render_chats(task, examples, tokenizer, options, template)
    return encode_text(task, examples, tokenizer, options, processors.limits, special_tokens=not chats)


def _with_decoder(batches: list[dict[str, Tensor]], start: int | None) -> list[dict[str, Tensor]]:
    if start is None:
        return batches
    return [{**b, "decoder_input_ids": torch.full_like(b["input_ids"][:, :1], start)} for b in batches]


def text_batches(
    rows: str | os.PathLike[str] | Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str = "data",
    seed: int = 0,
    config: Any = None,
    **options: Any,
) -> list[dict[str, Tensor]]:
    """Batches for ``merge_adapters(data=...)`` from unlabeled texts.

    Args:
        rows: path (file, folder, hub id), or texts, pairs, chats (lists of messages), rows with columns, a
            ``datasets`` object; finite.
        tokenizer: of the base model.
        task: name, for messages.
        seed: of the draw.
        config: the base model's configuration; without it, its positions and vocabulary are not checked.
        options: fields of :class:`nsc_fast.recipe.DataSpec`: num_samples, batch_size, max_length, text,
            template, ...

    Returns:
        Dicts of ``input_ids (B, S)``, ``attention_mask (B, S)`` and what else the tokenizer gives. Notices
        come as warnings.

    Example::

        data = {"qa": text_batches(rows, tokenizer, template="Question: {q}\\nAnswer:", num_samples=64)}

    Raises:
        MergeError: bad rows, by place.
        RecipeError: bad options.
    """
    chosen, sample = _given(rows, task, seed, options)
    examples = sample.examples
    if any(example.images for example in examples):
        raise MergeError(f"task {task!r}: these rows are images; use image_batches")
    limits = Limits() if config is None else limits_of(config)
    chats = bool(examples[0].messages)
    if chats:
        examples = render_chats(task, examples, tokenizer, chosen)
    batches, notices = encode_text(task, examples, tokenizer, chosen, limits, special_tokens=not chats)
    _warn([*sample.notices, *(f"task {task!r}: {notice}" for notice in notices)])
    return batches


def image_batches(
    rows: str | os.PathLike[str] | Iterable[Any],
    processor: Any,
    *,
    task: str = "data",
    seed: int = 0,
    config: Any = None,
    **options: Any,
) -> list[dict[str, Tensor]]:
    """Batches for ``merge_adapters(data=...)`` from unlabeled images.

    With texts where ``text`` or ``template`` names them, with chats where ``messages`` does or the format is
    "chat".

    Args:
        rows: path (folder of images, or a file with an image column), or rows with an image column; finite.
            Chats may hold their images themselves, in parts of their contents.
        processor: image processor of the base model; for images with texts or chats, its processor.
        task: name, for messages.
        seed: of the draw.
        config: the base model's configuration; without it, its positions are not checked.
        options: fields of :class:`nsc_fast.recipe.DataSpec`.

    Returns:
        Dicts of ``pixel_values`` and what else the processor gives. Notices come as warnings.

    Raises:
        MergeError: bad rows, by place.
        RecipeError: bad options.
    """
    kind = {} if options.get("messages") is not None else {"format": "image"}
    chosen, sample = _given(rows, task, seed, {**kind, **options})
    examples, chats = sample.examples, bool(sample.examples[0].messages)
    if not any(example.images for example in examples):
        raise MergeError(f"task {task!r}: these rows have no images; use text_batches")
    limits = Limits() if config is None else limits_of(config)
    if chats:
        examples = render_chats(task, examples, processor, chosen)
    batches, notices = encode_images(task, examples, processor, chosen, sample.folder, limits, chats=chats)
    _warn([*sample.notices, *(f"task {task!r}: {notice}" for notice in notices)])
    return batches


def _given(rows: Any, task: str, seed: int, options: Mapping[str, Any]) -> tuple[DataOptions, Sample]:
    is_path = isinstance(rows, str | os.PathLike)
    try:
        chosen = DataSpec(path=os.fspath(rows) if is_path else "rows", **options)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc'])) or 'options'}: {one['msg']}" for one in error.errors()]
        raise RecipeError(f"task {task!r}: " + "; ".join(problems)) from error
    source = open_source(task, chosen) if is_path else open_rows(task, rows)
    return chosen, draw_examples(source, chosen, seed)


def _warn(notices: Iterable[str]) -> None:
    for notice in notices:
        warnings.warn(notice, stacklevel=3)


def _again(first: Any, rest: Iterable[Any]) -> Iterable[Any]:
    yield first
    yield from rest


def _nothing(source: Source) -> MergeError:
    return MergeError(f"task {source.task!r}: {source.name} holds no text or image to read")
