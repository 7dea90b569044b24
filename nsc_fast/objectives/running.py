"""Running a model with low-rank updates added for a while, and looking at what its modules receive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Batch, BatchStream, without_labels
from ..batches import rows as rows_of
from ..dtypes import compute_dtype
from ..factors import LowRankUpdate

__all__ = ["adapted", "evaluating", "on_device", "sample", "watched"]


@contextmanager
def adapted(model: nn.Module, updates: Mapping[str, LowRankUpdate]) -> Iterator[nn.Module]:
    """Adds ``(z Q^T) C^T`` to the outputs of the named modules; no weight is touched.

    Works on layers of any kind, quantised ones too. The factors are used in float32 (float64 for a float64
    input) and the sum has the dtype of the module's output.

    Args:
        model: changed in place by hooks, which are gone when the block ends.
        updates: module path -> update.
    """
    handles = []
    try:
        for name, update in updates.items():
            handles.append(model.get_submodule(name).register_forward_hook(_adding(update), with_kwargs=True))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _adding(update: LowRankUpdate) -> Callable[..., Tensor]:
    kept: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        z = args[0] if args else next(iter(kwargs.values()))
        wide = compute_dtype(z.dtype)
        key = z.device, wide
        if key not in kept:
            kept[key] = update.basis.to(*key), update.columns.to(*key)
        basis, columns = kept[key]
        return output + ((z.to(wide) @ basis.T) @ columns.T).to(output.dtype)

    return hook


@contextmanager
def watched(
    model: nn.Module, modules: Iterable[str], see: Callable[[str, Tensor, Tensor], None]
) -> Iterator[nn.Module]:
    """Calls ``see(module path, input, output)`` whenever one of the modules has run."""
    handles = []

    def seeing(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            see(name, args[0] if args else next(iter(kwargs.values())), output)

        return hook

    try:
        for name in modules:
            handles.append(model.get_submodule(name).register_forward_hook(seeing(name), with_kwargs=True))
        yield model
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module, *, gradients: bool = False) -> Iterator[nn.Module]:
    """Evaluation mode, without gradients unless told otherwise; every module's mode comes back after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with nullcontext() if gradients else torch.no_grad():
            yield model
    finally:
        for module, training in modes.items():
            module.training = training


def on_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch's tensors on a device."""
    return {key: value.to(device) for key, value in batch.items()}


class _Resumed:
    """A source of batches of which the first were taken: they come first again, once."""

    def __init__(self, taken: list[Batch], rest: Iterator[Batch], source: Iterable[Batch]) -> None:
        self._taken, self._rest, self._source = taken, rest, source
        self._begun = False

    def __iter__(self) -> Iterator[Batch]:
        if self._begun:
            return iter(self._source)
        self._begun = True
        return self._first_round()

    def _first_round(self) -> Iterator[Batch]:
        yield from self._taken
        yield from self._rest


def sample(task: str, source: Iterable[Batch], rows: int) -> tuple[list[dict[str, Tensor]], Iterable[Batch]]:
    """Batches of about so many rows, and the source as if none had been taken.

    Of a list or tuple, batches spread evenly over it; of anything else, the first ones.

    Args:
        task: name, for messages.
        source: iterable of batches; one-shot iterators are read to their end.
        rows: sequences wanted; the last batch is taken whole, so there may be more.

    Returns:
        Checked batches, without label columns, and an iterable that gives what ``source`` would have given.

    Raises:
        MergeError: no batch, or one that is empty or fully masked.
    """
    if isinstance(source, Iterator):
        source = list(source)
    if isinstance(source, list | tuple):
        chosen = _spread(source, rows)
        rest: Iterable[Batch] = source
    else:
        chosen, iterator, count = [], iter(source), 0
        for batch in iterator:
            chosen.append(batch)
            count += _rows(batch)
            if count >= rows:
                break
        rest = _Resumed(list(chosen), iterator, source)
    # Not shuffled: the stream is here for its checks.
    stream = BatchStream(task, _Fixed(chosen), 0)
    return [stream.next() for _ in range(max(len(chosen), 1))], rest


class _Fixed:
    """Batches in their order; a list would be shuffled."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


def _spread(source: list | tuple, rows: int) -> list[Batch]:
    if not source:
        return []
    each = max(_rows(source[0]), 1)
    wanted = min(max(-(-rows // each), 1), len(source))
    return [source[i * len(source) // wanted] for i in range(wanted)]


def _rows(batch: Batch) -> int:
    tensors = {k: v for k, v in without_labels(batch).items() if isinstance(v, Tensor) and v.ndim}
    return rows_of(tensors) if tensors else 0
