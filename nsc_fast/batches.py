"""Unlabeled batches of several tasks: checked, repeated in a fixed order, joined into one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from .errors import MergeError
from .monitor import TokenBatch

__all__ = ["Batch", "BatchStream", "join", "token_batch", "without_labels"]

Batch = Mapping[str, Tensor]

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
    """

    def __init__(self, task: str, source: Iterable[Batch], seed: int) -> None:
        self.task = task
        self._source = list(source) if isinstance(source, Iterator) else source
        self._generator = torch.Generator().manual_seed(seed)
        self._iterator: Iterator[Batch] = iter(())

    def next(self) -> dict[str, Tensor]:
        """The next batch, checked: not empty, not fully masked."""
        batch = next(self._iterator, None)
        if batch is None:
            self._iterator = self._round()
            batch = next(self._iterator, None)
        if batch is None:
            raise MergeError(f"task {self.task!r}: the data holds no batch")
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
        return inputs

    def _round(self) -> Iterator[Batch]:
        if isinstance(self._source, list | tuple):
            order = torch.randperm(len(self._source), generator=self._generator).tolist()
            return iter([self._source[i] for i in order])
        return iter(self._source)


def rows(batch: Batch) -> int:
    """Number of sequences of a batch."""
    return next(iter(batch.values())).shape[0]


def token_batch(batch: Batch, task: int, device: torch.device) -> TokenBatch:
    """Task ids and mask of a batch that belongs to one task."""
    mask = batch.get("attention_mask")
    ids = torch.full((rows(batch),), task, dtype=torch.int64, device=device)
    return TokenBatch(ids, mask if mask is None or mask.ndim == 2 else None)


def join(
    batches: Mapping[int, Batch], *, max_padding: float | None = None
) -> tuple[dict[str, Tensor], TokenBatch] | None:
    """One batch from the batches of several tasks, padded to a common length.

    Args:
        batches: task index -> batch.
        max_padding: give up when the joined batch has more than this many times the tokens of the parts.

    Returns:
        The joined batch and its task ids, or None where the parts cannot go through the model together:
        different inputs, different shapes beyond the sequence length, or too much padding.
    """
    parts = list(batches.values())
    keys = set(parts[0]) | {key for part in parts for key in part if key == "attention_mask"}
    if any(set(part) | {"attention_mask"} != keys | {"attention_mask"} for part in parts):
        return None
    lengths = [_length(part) for part in parts]
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
        tensors = [_pad(part[key], n, longest) for part, n in zip(parts, lengths, strict=True)]
        if len({t.shape[1:] for t in tensors}) > 1:
            return None
        out[key] = torch.cat(tensors)
    mask = out.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        return None
    task = torch.tensor([k for k, part in batches.items() for _ in range(rows(part))], device=_device(out))
    return out, TokenBatch(task, mask)


def _length(batch: Batch) -> int | None:
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
    shape = rows(batch), _length(batch)
    return {**batch, "attention_mask": torch.ones(shape, dtype=torch.int64, device=_device(batch))}


def _pad(value: Tensor, length: int | None, longest: int | None) -> Tensor:
    """Zeros to the right in the sequence dimension."""
    if length is None or length == longest or value.ndim < 2 or value.shape[1] != length:
        return value
    widths = [0, 0] * (value.ndim - 2) + [0, longest - length]
    return torch.nn.functional.pad(value, widths)


def _device(batch: Batch) -> torch.device:
    return next(iter(batch.values())).device
