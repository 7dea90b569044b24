"""Unlabeled batches of several tasks: checked, repeated in a fixed order, joined into one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .checkpoint import digest, random_state, set_random_state
from .errors import MergeError
from .monitor import TokenBatch

__all__ = [
    "GRIDS",
    "PATCHES",
    "Batch",
    "BatchStream",
    "cut",
    "image_ends",
    "join",
    "patches",
    "rows",
    "token_batch",
    "token_mask",
    "without_labels",
]

Batch = Mapping[str, Tensor]

_TEXT = ("input_ids", "inputs_embeds", "attention_mask", "decoder_input_ids")
# Inputs that are no tokens of the text, though one of their sizes may happen to be its length.
_NOT_TEXT = ("decoder_", "pixel_", "image_", "input_features", "input_values")
# Patches of all images in one list, and how many of them an image has in time, height and width (Qwen2-VL).
PATCHES, GRIDS = "pixel_values", "image_grid_thw"
# What kind of token stands at every place, and that of images.
_KINDS, _IMAGE_KIND = "mm_token_type_ids", 1
LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")


def without_labels(batch: Batch) -> dict[str, Tensor]:
    """The inputs of a batch: label columns are never read."""
    return {key: value for key, value in batch.items() if key not in LABELS and value is not None}


class BatchStream:
    """Endless batches of one task, in an order that a seed fixes.

    Args:
        task: name, for messages.
        source: iterable of batches (dicts of tensors). Anything that can be iterated again is iterated again
            each round (a DataLoader shuffles itself); lists are reshuffled each round; one-shot iterators are
            kept.
        seed: of the shuffling.

    Attributes:
        seen: digest of the batches of this round, of a source that ``watch`` was called for and that is no
            list; else empty.
    """

    def __init__(self, task: str, source: Iterable[Batch], seed: int) -> None:
        self.task = task
        self._source = list(source) if isinstance(source, Iterator) else source
        self._generator = torch.Generator().manual_seed(seed)
        self._iterator: Iterator[Batch] = iter(())
        self._listed = isinstance(self._source, list | tuple)
        self._rounds = self._taken = 0
        self._began: dict[str, Any] = {}
        self._watched = False
        self.seen = ""

    def next(self) -> dict[str, Tensor]:
        """The next batch, checked: not empty, not fully masked."""
        batch = next(self._iterator, None)
        if batch is None:
            self._begin()
            batch = next(self._iterator, None)
        if batch is None:
            raise MergeError(f"task {self.task!r}: the data holds no batch")
        if not isinstance(batch, Mapping):
            raise MergeError(
                f"task {self.task!r}: the data hold a {type(batch).__name__}, not batches (dicts of "
                "tensors); nsc_fast.data.text_batches and image_batches make batches of rows"
            )
        inputs = without_labels(batch)
        for key, value in inputs.items():
            if not isinstance(value, Tensor):
                raise MergeError(
                    f"task {self.task!r}: {key!r} is a {type(value).__name__}, not a tensor; "
                    "drop the column or make it one"
                )
        if not inputs or any(value.numel() == 0 for value in inputs.values()):
            raise MergeError(f"task {self.task!r}: a batch is empty; remove empty rows from the data")
        mask = inputs.get("attention_mask")
        if mask is not None and not bool(mask.any()):
            raise MergeError(f"task {self.task!r}: a batch is fully masked; remove empty rows from the data")
        self._taken += 1
        if self._watched:
            self.seen = digest([("before", self.seen), *sorted(inputs.items())])
        return inputs

    def watch(self) -> str:
        """Digest of the data, where they are a list; else batches are digested from now on, as they come."""
        if not self._listed:
            self._watched = True
            return "read as they come"
        batches = (without_labels(b).items() if isinstance(b, Mapping) else [("", b)] for b in self._source)
        return digest((key, v) for items in batches for key, v in sorted(items) if isinstance(v, Tensor))

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"rounds": self._rounds, "taken": self._taken, "began": self._began, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """To where another stream of the same source stood.

        What is no list is read again from its start, with the states that the global random number generators
        had when the present round began; they are left as that reading leaves them.

        Raises:
            MergeError: other batches came than before.
        """
        if not state["rounds"]:
            return
        if not self._listed:
            for _ in range(state["rounds"] - 1):
                for _ in self._source:
                    pass
            set_random_state(state["began"]["random"])
        self._generator.set_state(state["began"]["generator"])
        self._rounds = state["rounds"] - 1
        for _ in range(state["taken"]):
            self.next()
        if (self._rounds, self.seen) != (state["rounds"], state["seen"]):
            raise MergeError(
                f"task {self.task!r}: the data come in another order than before the interruption; give a "
                "list of batches, or fix the order of the loader by a seed"
            )

    def _begin(self) -> None:
        self._rounds += 1
        self._taken, self.seen = 0, ""
        self._began = {"generator": self._generator.get_state()}
        if not self._listed:
            self._began["random"] = random_state()
        self._iterator = self._round()

    def _round(self) -> Iterator[Batch]:
        if self._listed:
            order = torch.randperm(len(self._source), generator=self._generator).tolist()
            return iter([self._source[i] for i in order])
        return iter(self._source)


def rows(batch: Batch) -> int:
    """Number of sequences of a batch: of its text if it has one; images may lie beside it in any number."""
    first = next((key for key in _TEXT if key in batch), next(iter(batch)))
    return batch[first].shape[0]


def patches(batch: Batch) -> int:
    """Patches of all images of a batch, where they come in one list; 0 where they do not."""
    return batch[PATCHES].shape[0] if PATCHES in batch and GRIDS in batch else 0


def image_ends(batch: Batch) -> list[tuple[int, int]] | None:
    """Where the images and the patches of every sequence end, in the lists of all.

    A sequence has as many tokens of images as its images take, each of the same number of patches.

    Returns:
        ``B + 1`` pairs, the first (0, 0); None where it is not known which images are whose, or a sequence
        has none.
    """
    if not patches(batch) or _KINDS not in batch:
        return None
    tokens = (batch[_KINDS] == _IMAGE_KIND).sum(1)
    total, count = int(tokens.sum()), patches(batch)
    if not bool((tokens > 0).all()) or count % total:
        return None
    of_images = {0: 0}
    for number, end in enumerate(batch[GRIDS].prod(1).cumsum(0).tolist(), 1):
        of_images[end] = number
    ends = [0, *(tokens.cumsum(0) * (count // total)).tolist()]
    if any(end not in of_images for end in ends) or of_images[count] != len(batch[GRIDS]):
        return None
    return [(of_images[end], end) for end in ends]


def cut(batch: Batch, bounds: Sequence[int]) -> list[dict[str, Tensor]]:
    """Sequences between each two of the ascending ``bounds``, with their images; of a ``divisible`` batch."""
    ends = image_ends(batch)
    places = dict.fromkeys(batch, bounds)
    if ends is not None:
        places[GRIDS], places[PATCHES] = zip(*(ends[row] for row in bounds), strict=True)
    return [
        {key: value[places[key][i] : places[key][i + 1]] for key, value in batch.items()}
        for i in range(len(bounds) - 1)
    ]


def token_batch(batch: Batch, task: int, device: torch.device) -> TokenBatch:
    """Task ids and masks of a batch that belongs to one task."""
    ids = torch.full((rows(batch),), task, dtype=torch.int64, device=device)
    return _tokens(batch, ids, one_task=True)


def _tokens(batch: Batch, task: Tensor, *, one_task: bool) -> TokenBatch:
    return TokenBatch(
        task,
        token_mask(batch),
        one_task=one_task,
        decoder=any(key.startswith("decoder_") for key in batch),
        decoder_mask=token_mask(batch, "decoder_attention_mask"),
        frames="input_features" in batch,
        patches=patches(batch),
    )


def token_mask(batch: Batch, key: str = "attention_mask") -> Tensor | None:
    """``(B, S)``: which tokens of a batch count; None where all do.

    Args:
        batch: model inputs.
        key: of the mask: ``(B, S)``, or ``(B, 1, S, S)`` of which token sees which.
    """
    mask = batch.get(key)
    if mask is None or mask.ndim not in (2, 4):
        return None
    return mask if mask.ndim == 2 else _of_tokens(mask)


def _of_tokens(mask: Tensor) -> Tensor:
    """``(B, S)`` from a mask ``(B, 1, S, S)`` of which token sees which: padding is alone with itself."""
    # Bool or 0/1: what is seen; otherwise what is added to the scores, 0 for what is seen.
    sees = mask[:, 0] == 0 if bool((mask < 0).any()) else mask[:, 0] != 0
    others = (sees.sum(-1) > 1) | (sees.sum(-2) > 1)
    # A sequence of one token has no others.
    return (others | ~others.any(1, keepdim=True)).to(torch.int64)


def join(
    batches: Mapping[int, Batch], *, max_padding: float | None = None
) -> tuple[dict[str, Tensor], TokenBatch] | None:
    """One batch from the batches of several tasks, padded to a common length.

    Args:
        batches: task index -> batch.
        max_padding: give up when the joined batch has more than this many times the tokens of the parts.

    Returns:
        The joined batch and its task ids, or None where the parts cannot go through the model together:
        different inputs, different shapes beyond the sequence length, inputs with other rows than the
        sequences (the patches of all images in one list), or too much padding.
    """
    parts = list(batches.values())
    keys = set(parts[0]) | {key for part in parts for key in part if key == "attention_mask"}
    if any(set(part) | {"attention_mask"} != keys | {"attention_mask"} for part in parts):
        return None
    if any(value.ndim == 0 or value.shape[0] != rows(part) for part in parts for value in part.values()):
        return None
    lengths = [length_of(part) for part in parts]
    if any(length is None for length in lengths) and len({_shape(part) for part in parts}) > 1:
        return None
    longest = max((length for length in lengths if length is not None), default=None)
    if longest is not None:
        if "attention_mask" in keys or len(set(lengths)) > 1:
            parts = [_with_mask(part) for part in parts]
            keys.add("attention_mask")
        real = sum(rows(part) * length for part, length in zip(parts, lengths, strict=True))
        if max_padding is not None and longest * sum(map(rows, parts)) > max_padding * real:
            return None
    out = {}
    for key in sorted(keys):
        tensors = [_pad(key, part[key], n, longest) for part, n in zip(parts, lengths, strict=True)]
        if len({t.shape[1:] for t in tensors}) > 1:
            return None
        out[key] = torch.cat(tensors)
    mask = out.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        return None
    task = torch.tensor([k for k, part in batches.items() for _ in range(rows(part))], device=_device(out))
    return out, _tokens(out, task, one_task=False)


def length_of(batch: Batch) -> int | None:
    """Sequence length, where the batch has one."""
    for key in ("input_ids", "inputs_embeds", "attention_mask"):
        if key in batch:
            return batch[key].shape[1]
    return None


def _shape(batch: Batch) -> tuple:
    return tuple(sorted((key, tuple(value.shape[1:])) for key, value in batch.items()))


def _with_mask(batch: Batch) -> dict[str, Tensor]:
    if "attention_mask" in batch:
        return dict(batch)
    shape = rows(batch), length_of(batch)
    return {**batch, "attention_mask": torch.ones(shape, dtype=torch.int64, device=_device(batch))}


def _pad(key: str, value: Tensor, length: int | None, longest: int | None) -> Tensor:
    """Zeros to the right in the sequence dimension."""
    if length is None or length == longest or value.ndim < 2 or value.shape[1] != length:
        return value
    if key.startswith(_NOT_TEXT):
        return value
    widths = [0, 0] * (value.ndim - 2) + [0, longest - length]
    return torch.nn.functional.pad(value, widths)


def _device(batch: Batch) -> torch.device:
    return next(iter(batch.values())).device
