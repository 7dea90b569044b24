"""Bytes and operations of one forward and backward pass, counted on tensors that have a shape and no data.

The model is run as it is, module by module, on fake tensors: what autograd keeps is counted, not guessed.
Blocks of one kind (same class, shapes, adapters and targets) need the same, so one of each kind is run.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .batches import token_batch
from .coefficients import Granularity
from .driver import Driver, backbone, forward_options
from .dtypes import compute_dtype
from .errors import MergeError
from .factors import LowRankUpdate
from .layers import Installation, features, install, remove, stack_adapters
from .memory import LiveBytes, Recompute, blocks_of, checkpointed
from .monitor import TokenBatch
from .objectives.least_squares import Projections
from .objectives.metric import COLUMNS, Metric
from .objectives.states import states
from .row_inputs import RowInputs
from .shortened import Growth, Kinds, fill, shorten
from .siblings import share

__all__ = ["FakeMerge", "Footprint", "Objective", "Operations"]

Objective = Literal["ratio", "states", "moments"]

_aten = torch.ops.aten
# Switches off what transformers checks between inputs.
_CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"


def _attention(formula: Callable[..., int], *shapes: torch.Size) -> int:
    """Operations of attention whose keys and values may have fewer heads than the queries."""
    *_, q, k, v = shapes
    heads = [(k[0], q[1], *k[2:]), (v[0], q[1], *v[2:])]
    return formula(*shapes[:-2], *heads)


# What torch's formulas leave out: in-place products, and attention on a CPU.
_FLOPS = {
    _aten.addmm_: lambda _, a, b, **__: 2 * a.shape[0] * a.shape[1] * b.shape[1],
    _aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: _attention(sdpa_flop_count, q.shape, k.shape, v.shape)
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, **__: _attention(sdpa_backward_flop_count, g.shape, q.shape, k.shape, v.shape)
    ),
}


class Operations(TorchDispatchMode):
    """Adds up operations, those of a block once for each block that it stands for.

    torch's own counter keeps tensors alive, which would be counted as kept. In the backward pass a block's
    operations are those that follow the gradient of its output.

    Args:
        blocks: path -> block, of the shortened model.
        kinds: path -> (old path, how many it stands for).
    """

    def __init__(self, blocks: Mapping[str, nn.Module], kinds: Kinds) -> None:
        super().__init__()
        self.total = 0
        self._times = 1
        self._blocks, self._kinds = blocks, kinds
        self._handles: list[Any] = []

    def __enter__(self) -> Operations:
        for path, block in self._blocks.items():
            times = self._kinds[path][1]
            self._handles.append(block.register_forward_pre_hook(partial(self._entered, times)))
            self._handles.append(block.register_forward_hook(partial(self._left, times)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _entered(self, times: int, *_: Any) -> None:
        self._times = times

    def _left(self, times: int, _: nn.Module, args: Any, out: Any) -> None:
        self._times = 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(partial(self._entered, times))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in _FLOPS:
            self.total += self._times * _FLOPS[packet](*args, **kwargs)
        elif packet in flop_registry:
            self.total += self._times * flop_registry[packet](*args, **kwargs, out_val=out)
        return out


@dataclass(frozen=True)
class Footprint:
    """One pass over some sequences, for the whole model.

    Attributes:
        kept: bytes alive when the backward pass begins.
        peak: the most bytes alive at any time. Both without weights and factors.
        inputs: bytes of the inputs of all blocks, the part of ``kept`` that can wait on the host.
        blocks: kind of block, named by its first -> (how many there are, bytes that each adds to ``kept``).
        flops: of forward and backward pass, for the whole model.
    """

    kept: int
    peak: int
    inputs: int
    blocks: Mapping[str, tuple[int, int]]
    flops: int


class FakeMerge:
    """A merge on fake tensors.

    Args:
        skeleton: the base model on the meta device, in its dtype; it is taken apart.
        ranks: task -> module -> rank.
        targets: modules whose ratio enters the loss.
        granularity: of the coefficients.
        objective: the "ratio" at the targets, the distance of the last "states", or the "moments" of the
            projections, which need no backward pass.
        inputs: of the model.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        ranks: Mapping[str, Mapping[str, int]],
        targets: Sequence[str] = (),
        granularity: Granularity = "layer",
        *,
        objective: Objective = "ratio",
        inputs: RowInputs | None = None,
    ) -> None:
        self._granularity, self._objective, self._inputs = granularity, objective, inputs or RowInputs()
        self._kinds, moved = shorten(skeleton, ranks, targets)
        self._model = skeleton.eval()
        self._blocks = blocks_of(self._model, tuple(moved.values()))
        self._ranks = {
            task: {moved[m]: rank for m, rank in own.items() if m in moved} for task, own in ranks.items()
        }
        self._targets = [moved[t] for t in targets if t in moved]
        # A classifier looks at values to find what its head reads; its decoder's inputs are given here.
        headless = self._inputs.decoder < 0 and objective != "states"
        self._top = skeleton.base_model if headless else skeleton
        self._runner = backbone(self._top, self._targets or tuple(moved.values()))
        self._options = forward_options(self._runner)
        self._fake = FakeTensorMode()
        # What the passes have in common: it takes a quarter of the time that they take.
        self._installation: Installation | None = None
        self._driver: Driver | None = None
        self._seen: set[frozenset[str]] = set()
        with self._fake:
            fill(skeleton)

    def base_flops(self, rows: int, length: int, *, masked: bool = True) -> int:
        """Operations of the base model's forward pass alone, without its head."""
        with self._faking(), torch.no_grad():
            remove(self._model)
            self._installation = None
            inputs = self._batch(rows, length, masked)
            with Operations(self._blocks, self._kinds) as counter:
                self._runner(**inputs, **self._options)
        return counter.total

    def state_shape(self, length: int) -> tuple[int, int]:
        """Width of the last states, and their entries of one row of ``length`` tokens."""
        with self._faking(), torch.no_grad():
            found = states(self._runner(**self._batch(1, length, False), **self._options))
        return found.shape[-1], found.numel()

    def run(
        self, rows: int, length: int, recompute: Recompute = "never", *, masked: bool = True
    ) -> Footprint:
        """Counts for ``rows`` rows of ``length`` tokens.

        Args:
            masked: with a mask of padding, of which most kinds of attention make ``rows x length x length``.

        Raises:
            MergeError: a model whose shapes depend on values, or nothing to compute again, see
                :func:`nsc_fast.memory.checkpointed`.
        """
        with self._faking():
            inputs = self._batch(rows, length, masked)
            return self._moments(inputs) if self._objective == "moments" else self._run(inputs, recompute)

    @contextmanager
    def _faking(self) -> Iterator[None]:
        with self._fake, _without_values(), _uncollected():
            try:
                yield
            except IndexError as error:
                raise MergeError(
                    f"memory cannot be planned for {type(self._model).__name__}, which selects states of "
                    f"blocks by number ({error}), and here one block stands for all of its kind; leave "
                    "--max-memory out, and set micro_batch yourself"
                ) from error
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise MergeError(
                    f"memory cannot be planned for {type(self._model).__name__}, whose shapes depend on "
                    f"values ({error}); leave --max-memory out, and set micro_batch yourself"
                ) from error

    def _batch(self, rows: int, length: int, masked: bool) -> dict[str, Tensor]:
        return self._inputs.batch(rows, length, masked=masked)

    def _run(self, inputs: dict[str, Tensor], recompute: Recompute) -> Footprint:
        model, tokens = self._model, token_batch(inputs, 0, torch.device("cpu"))
        installation = self._installed()
        self._look(inputs, tokens)
        fixed = [*model.parameters(), *model.buffers(), *installation.coefficients.parameters()]
        with ExitStack() as stack:
            stack.enter_context(checkpointed(model, installation.modules, recompute))
            counter = stack.enter_context(Operations(self._blocks, self._kinds))
            live = stack.enter_context(LiveBytes().ignore([*fixed, *inputs.values(), tokens.task]))
            grown = stack.enter_context(Growth(self._blocks, self._kinds, live))
            ratio = self._driver is not None
            loss = self._driver.forward(inputs, tokens) if ratio else self._distance(inputs)
            if loss is None:
                raise MergeError(
                    f"no target module runs in a forward pass over {', '.join(inputs)}; widen "
                    "parameters.scope, or give data that reach them"
                )
            grown.end()
            kept = live.now
            loss.backward()
            installation.monitor.clear()
        installation.coefficients.zero_grad()
        return _footprint(grown, kept, counter.total)

    def _installed(self) -> Installation:
        if self._installation is None:
            self._installation = install(
                self._model,
                self._adapters(),
                targets=self._targets,
                granularity=self._granularity,
            )
            self._seen.clear()
            if self._objective == "ratio":
                self._driver = Driver(self._top, self._installation)
        return self._installation

    def _look(self, inputs: dict[str, Tensor], tokens: TokenBatch) -> None:
        """As a merge does before its first pass with such inputs."""
        if frozenset(inputs) in self._seen:
            return
        self._seen.add(frozenset(inputs))
        if self._driver is not None:
            self._driver.look(inputs, tokens)
        else:
            share(self._model, lambda: self._runner(**inputs, **self._options))

    def _moments(self, inputs: dict[str, Tensor]) -> Footprint:
        """Of the task whose adapter is the largest."""
        stacks = stack_adapters(self._adapters())
        task = max(self._ranks, key=lambda t: sum(self._ranks[t].values()))
        model = self._model
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            own = stack.enter_context(Projections(task, stacks).installed(model))
            own.tokens = token_batch(inputs, 0, torch.device("cpu"))
            stack.enter_context(_NoPadding())
            # The factors come to the device in the first pass, and stay.
            self._runner(**inputs, **self._options)
            counter = stack.enter_context(Operations(self._blocks, self._kinds))
            fixed = [*model.parameters(), *model.buffers(), *inputs.values(), *own.held()]
            live = stack.enter_context(LiveBytes().ignore([*fixed, own.tokens.task]))
            grown = stack.enter_context(Growth(self._blocks, self._kinds, live))
            self._runner(**inputs, **self._options)
            grown.end()
        return _footprint(grown, 0, counter.total)

    def _distance(self, inputs: dict[str, Tensor]) -> Tensor:
        """A loss of the last states, with tensors like those of :mod:`nsc_fast.objectives.anchors`."""
        found = states(self._runner(**inputs, **self._options))
        wide = compute_dtype(found.dtype)
        off = found.reshape(-1, found.shape[-1]).to(wide) - torch.zeros((), dtype=wide)
        d = off.shape[1]
        return Metric(off.new_empty(d, min(d, COLUMNS)), 1.0).of(off).mean()

    def _adapters(self) -> dict[str, dict[str, LowRankUpdate]]:
        out: dict[str, dict[str, LowRankUpdate]] = {}
        for task, own in self._ranks.items():
            out[task] = {}
            for module, rank in own.items():
                d_out, d_in = features(self._model.get_submodule(module))
                out[task][module] = LowRankUpdate(
                    columns=torch.empty(d_out, rank),
                    basis=torch.empty(rank, d_in),
                    singular_values=torch.ones(rank),
                )
        return out


def _footprint(grown: Growth, kept: int, flops: int) -> Footprint:
    return Footprint(kept, grown.live.peak, grown.inputs, grown.by_kind, flops)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection: it takes a fifth of the time, and counts would depend on when it comes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _without_values() -> Iterator[None]:
    """Tells transformers what it would read from values, which fake tensors do not have.

    Rows hold one sequence each: it looks at the positions for packed ones, and supposes that there are some.
    Attention without a mask would be counted with one. And there are as many places for images in the texts
    as images: it need not check that.
    """
    from transformers import masking_utils

    found, checks = masking_utils.find_packed_sequence_indices, os.environ.get(_CHECKS)
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    os.environ[_CHECKS] = "1"
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = found
        if checks is None:
            del os.environ[_CHECKS]
        else:
            os.environ[_CHECKS] = checks


class _NoPadding(TorchDispatchMode):
    """A mask of rows takes all of them: how many it would take is a matter of values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is _aten.index.Tensor and [getattr(i, "dtype", None) for i in args[1]] == [torch.bool]:
            tensor, (mask,) = args
            return tensor.new_empty(mask.numel(), *tensor.shape[mask.ndim :])
        return func(*args, **(kwargs or {}))
