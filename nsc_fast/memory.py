"""Less memory during the optimisation: blocks that are computed again in the backward pass instead of kept.

The backward pass needs what the forward pass made. Kept per block of a decoder are the inputs of its norms,
the queries, keys, values and output of its attention and two feed-forward tensors, and for each adapted
module the projection P; what follows from these without a product is not (:mod:`nsc_fast.saved`). Computed
again, only the block's input is kept, for one more forward pass without the last product of each block,
which nothing that is kept comes after.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from .coefficients import block_of
from .errors import MergeError
from .saved import compact_saved, kept_once

__all__ = ["EndOfPass", "LiveBytes", "blocks_of", "checkpointed", "parse_bytes", "readable_bytes"]

Recompute = Literal["never", "feed_forward", "always"]

# Names of a block's part behind the attention, in transformers' models.
_FEED_FORWARD = re.compile(r"^(mlp|ffn|ff|feed_?forward|intermediate|block_sparse_moe|moe)$")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class EndOfPass(Exception):
    """Ends a forward pass: nothing that comes later is wanted."""


def blocks_of(model: nn.Module, modules: Iterable[str]) -> dict[str, nn.Module]:
    """The numbered blocks of every stack in which one of ``modules`` stands, in order, by path."""
    stacks = dict.fromkeys(block[0] for m in modules if (block := block_of(m)) is not None)
    return {
        f"{stack}.{name}".lstrip("."): child
        for stack in stacks
        for name, child in model.get_submodule(stack).named_children()
        if name.isdigit()
    }


@contextmanager
def checkpointed(
    model: nn.Module, modules: Iterable[str], recompute: Recompute = "always", *, offload: bool = False
) -> Iterator[nn.Module]:
    """For a while, blocks keep only their input for the backward pass and are computed again there.

    Works in evaluation mode, where transformers' own checkpointing does nothing. The gradients are the same.
    What is kept outside of such blocks is kept in its smaller form, see :func:`nsc_fast.saved.compact_saved`.

    Args:
        model: changed in place by wrapped ``forward`` methods, which are gone when the block ends.
        modules: paths of adapted modules; the stacks of blocks that they stand in are wrapped.
        recompute: "always" computes whole blocks again, "feed_forward" only the part behind the attention,
            "never" no block.
        offload: the kept inputs wait in the host's memory. Nothing changes for tensors that are there anyway.

    Raises:
        MergeError: no block, or none that is called as a module.
    """
    if recompute not in get_args(Recompute):
        raise MergeError(f"checkpointing={recompute!r}: choose one of {', '.join(get_args(Recompute))}")
    wrapped = [] if recompute == "never" else _recomputed(model, modules, recompute)
    before = {part: part.__dict__.get("forward") for part in wrapped}
    try:
        for part in before:
            part.forward = _recomputing(part.forward, offload)
        with compact_saved():
            yield model
    finally:
        for part, own in before.items():
            if own is None:
                part.__dict__.pop("forward", None)
            else:
                part.forward = own


def _recomputed(model: nn.Module, modules: Iterable[str], recompute: Recompute) -> list[nn.Module]:
    """The parts of the model that are computed again: blocks, or what is behind their attention."""
    found = list(blocks_of(model, modules).values())
    if recompute == "feed_forward":
        found = [child for b in found for name, child in b.named_children() if _FEED_FORWARD.match(name)]
    called = [part for part in found if type(part).forward is not nn.Module.forward]
    if not called:
        what = "numbered blocks" if recompute == "always" else "feed-forward part in numbered blocks"
        raise MergeError(
            f"checkpointing={recompute!r}: {type(model).__name__} has no {what} that could be computed "
            "again; set checkpointing to 'never' and micro_batch to a smaller number"
        )
    return called


def _recomputing(forward: Callable[..., Any], offload: bool) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        ended = False

        def inside(*args: Any, **kwargs: Any) -> Any:
            # A checkpoint that an exception leaves counts as unfinished, and its second run as a mismatch.
            # The exception is not kept: all activations of the frames that it went through hang on it.
            nonlocal ended
            try:
                return forward(*args, **kwargs)
            except EndOfPass:
                ended = True
                return None

        with _inputs_on_host(args) if offload else nullcontext():
            # Evaluation mode draws no random numbers whose state would have to be kept.
            out = checkpoint(inside, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        if ended:
            raise EndOfPass
        kept_once(out)
        return out

    return run


def _inputs_on_host(args: tuple[Any, ...]) -> Any:
    """While a checkpoint is made: its first input is kept on the host. What blocks share stays in place."""
    first = next((a for a in args if isinstance(a, Tensor)), None)

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if first is None or tensor.device.type == "cpu":
            return tensor
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            return tensor
        return tensor.device, to_host(tensor)

    def unpack(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[1].to(kept[0], non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory; pinned, and made alongside the computation, where CUDA is the source."""
    pinned = tensor.device.type == "cuda"
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    return kept.copy_(tensor, non_blocking=pinned)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is active and still alive.

    Works on real and on fake tensors. Tensors that were there before, and views of them, are not counted;
    name them with :meth:`ignore`. What an operation uses and frees inside itself is not seen.

    Attributes:
        now: bytes alive.
        peak: the largest value of ``now``.
        largest: elements of the largest tensor that was made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._known: set[int] = set()

    def ignore(self, tensors: Iterable[Tensor]) -> LiveBytes:
        """Leaves out tensors that live longer than this."""
        self._known.update(t.untyped_storage()._cdata for t in tensors)
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.largest = max(self.largest, tensor.numel())
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def parse_bytes(text: str) -> int:
    """``"24GB"`` (10^9), ``"24GiB"`` (2^30), ``"512 MB"`` or a plain number of bytes.

    Raises:
        MergeError: none of these.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise MergeError(f"{text!r} is no amount of memory; write it like 24GB or 22.5GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def readable_bytes(count: float) -> str:
    """In GB (10^9 bytes) or the largest unit below, with three figures."""
    for unit in ("GB", "MB", "KB"):
        if count >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:.3g} {unit}"
    return f"{count:.0f} bytes"
