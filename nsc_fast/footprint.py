"""Bytes and operations of one forward and backward pass, counted on tensors that have a shape and no data.

The model is run as it is, module by module, on fake tensors: what autograd keeps is counted, not guessed.
Blocks of one kind (same class, shapes, adapters and targets) need the same, so one of each kind is run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .coefficients import Granularity
from .driver import Driver, backbone, forward_options
from .errors import MergeError
from .factors import LowRankUpdate
from .layers import features, install, remove
from .memory import LiveBytes, Recompute, blocks_of, checkpointed
from .monitor import TokenBatch
from .objectives.anchored import states
from .siblings import share

__all__ = ["FakeMerge", "Footprint"]

_aten = torch.ops.aten


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


class _Flops(TorchDispatchMode):
    """Adds up operations. torch's own counter keeps tensors alive, which would be counted as kept."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in _FLOPS:
            self.total += _FLOPS[packet](*args, **kwargs)
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


@dataclass(frozen=True)
class Footprint:
    """One pass over some sequences, for the whole model.

    Attributes:
        kept: bytes alive when the backward pass begins.
        peak: the most bytes alive at any time. Both without weights and factors.
        inputs: bytes of the inputs of all blocks, the part of ``kept`` that can wait on the host.
        blocks: kind of block, named by its first -> (how many there are, bytes that each adds to ``kept``).
        flops: of forward and backward pass, in the blocks that were run.
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
        targets: modules whose ratio enters the loss; none where the distance of the last states is the loss.
        granularity: of the coefficients.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        ranks: Mapping[str, Mapping[str, int]],
        targets: Sequence[str],
        granularity: Granularity = "layer",
    ) -> None:
        self._granularity = granularity
        self._kinds, moved = _shorten(skeleton, ranks, targets)
        self._model = skeleton.eval()
        self._ranks = {
            task: {moved[m]: rank for m, rank in own.items() if m in moved} for task, own in ranks.items()
        }
        self._targets = [moved[t] for t in targets if t in moved]
        self._runner = backbone(skeleton, self._targets or tuple(moved.values()))
        self._options = forward_options(self._runner)
        self._fake = FakeTensorMode()
        with self._fake:
            _fill(skeleton)

    def base_flops(self, rows: int, length: int, *, masked: bool = True) -> int:
        """Operations of the base model's forward pass alone, in the blocks that :meth:`run` runs."""
        with self._fake, torch.no_grad(), _single_sequences():
            inputs = _inputs(rows, length, masked)
            with _Flops() as counter:
                self._runner(**inputs, **self._options)
        return counter.total

    def run(
        self, rows: int, length: int, recompute: Recompute = "never", *, masked: bool = True
    ) -> Footprint:
        """Counts for ``rows`` sequences of ``length`` tokens.

        Args:
            masked: with a mask of padding, of which most kinds of attention make ``rows x length x length``.

        Raises:
            MergeError: a model that takes no token ids or whose shapes depend on values, or nothing to
                compute again, see :func:`nsc_fast.memory.checkpointed`.
        """
        if "input_ids" not in inspect.signature(self._runner.forward).parameters:
            raise MergeError(
                f"memory is planned for text, and {type(self._model).__name__} takes no token ids"
            )
        with self._fake, _single_sequences():
            try:
                return self._run(_inputs(rows, length, masked), recompute)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise MergeError(
                    f"memory cannot be planned for {type(self._model).__name__}, whose shapes depend on "
                    f"values ({error})"
                ) from error
            finally:
                remove(self._model)

    def _run(self, inputs: dict[str, Tensor], recompute: Recompute) -> Footprint:
        model = self._model
        driver: Driver | None = None
        installation = install(
            model,
            self._adapters(),
            targets=self._targets,
            granularity=self._granularity,
            on_recorded=lambda: driver.count(),
        )
        blocks = blocks_of(model, installation.modules)
        before: dict[str, int] = {}
        grown: dict[str, int] = {}
        sizes: dict[str, int] = {}
        # A task for each token: spreading those of the rows has no fake counterpart.
        tasks = torch.zeros_like(inputs["input_ids"])
        if self._targets:
            driver = Driver(model, installation)
            driver.look(inputs, TokenBatch(tasks))
        else:
            share(model, lambda: self._runner(**inputs, **self._options))
        fixed = [*model.parameters(), *model.buffers(), *installation.coefficients.parameters()]
        with ExitStack() as stack:
            stack.enter_context(checkpointed(model, installation.modules, recompute))
            counter = stack.enter_context(_Flops())
            live = stack.enter_context(LiveBytes().ignore([*fixed, *inputs.values(), tasks]))
            for name, block in blocks.items():
                stack.enter_context(_growth(block, name, live, before, grown, sizes))
            if driver is None:
                loss = self._distance(inputs)
            else:
                loss = driver.forward(inputs, TokenBatch(tasks))
            if loss is None:
                raise MergeError(f"no target module runs in a forward pass over {', '.join(inputs)}")
            kept = live.now
            # The pass ends inside of the last block that it needs: what comes after a block does not run.
            grown |= {name: kept - was for name, was in before.items() if name not in grown}
            loss.backward()
            installation.monitor.clear()
        # Behind the last target nothing runs.
        ran = {name: kind for name, kind in self._kinds.items() if name in grown}
        rest = sum((count - 1) * grown[name] for name, (_, count) in ran.items())
        return Footprint(
            kept=kept + rest,
            peak=live.peak + rest,
            inputs=sum(count * sizes[name] for name, (_, count) in ran.items()),
            blocks={first: (count, grown[name]) for name, (first, count) in ran.items()},
            flops=counter.total,
        )

    def _distance(self, inputs: dict[str, Tensor]) -> Tensor:
        """A loss of the last states, with tensors like those of :mod:`nsc_fast.objectives.anchored`."""
        found = states(self._runner(**inputs, **self._options))
        wide = torch.float64 if found.dtype == torch.float64 else torch.float32
        off = found.reshape(-1, found.shape[-1]).to(wide) - torch.zeros((), dtype=wide)
        return ((off @ off.new_empty(off.shape[1], off.shape[1])) * off).sum(1).mean()

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


def _inputs(rows: int, length: int, masked: bool) -> dict[str, Tensor]:
    names = ("input_ids", "attention_mask") if masked else ("input_ids",)
    return {name: torch.ones(rows, length, dtype=torch.int64) for name in names}


@contextmanager
def _single_sequences() -> Iterator[None]:
    """Tells transformers that rows hold one sequence each.

    It looks at the positions for packed ones, and for fake tensors, which have no values, supposes that there
    are some: attention without a mask would be counted with one.
    """
    from transformers import masking_utils

    found = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = found


@contextmanager
def _growth(
    block: nn.Module,
    name: str,
    live: LiveBytes,
    before: dict[str, int],
    grown: dict[str, int],
    sizes: dict[str, int],
) -> Iterator[None]:
    """Notes the bytes alive before a block, how many more are after it, and the bytes of its input."""

    def enter(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        before[name] = live.now
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        sizes[name] = 0 if first is None else first.numel() * first.element_size()

    def leave(*_: Any) -> None:
        grown[name] = live.now - before[name]

    handles = [
        block.register_forward_pre_hook(enter, with_kwargs=True),
        block.register_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shorten(
    model: nn.Module, ranks: Mapping[str, Mapping[str, int]], targets: Sequence[str]
) -> tuple[dict[str, tuple[str, int]], dict[str, str]]:
    """Leaves one block of each kind in every stack.

    Returns:
        New path of each block left -> (old path, how many it stands for), and old module path -> new one for
        the adapted modules that are left.
    """
    modules = list(dict.fromkeys(m for own in ranks.values() for m in own))
    kinds: dict[str, tuple[str, int]] = {}
    moved = {m: m for m in modules}
    stacks: dict[str, list[tuple[str, nn.Module]]] = {}
    adapted = False
    for path, block in blocks_of(model, modules).items():
        stacks.setdefault(path.rpartition(".")[0], []).append((path, block))
    for stack, blocks in stacks.items():
        first: dict[tuple, int] = {}
        chosen: list[tuple[str, nn.Module, int]] = []
        layers = getattr(getattr(model, "config", None), "layer_types", None)
        last = max((i for i, (path, _) in enumerate(blocks) if _inside(path, targets)), default=-1)
        for i, (path, block) in enumerate(blocks):
            inside = _inside(path, modules)
            key = (
                type(block),
                tuple((name, p.shape) for name, p in block.named_parameters()),
                tuple((m[len(path) :], tuple(own.get(m) for own in ranks.values())) for m in inside),
                tuple(t[len(path) :] for t in targets if t in inside),
                layers[i] if layers is not None and len(layers) == len(blocks) else None,
                # The input of the first adapted block needs no gradient; the last block is left early.
                adapted,
                i == len(blocks) - 1,
                i > last,
            )
            adapted = adapted or bool(inside)
            if key in first:
                j = first[key]
                chosen[j] = (*chosen[j][:2], chosen[j][2] + 1)
                for m in inside:
                    del moved[m]
                continue
            first[key] = len(chosen)
            new = f"{stack}.{len(chosen)}".lstrip(".")
            chosen.append((path, block, 1))
            for m in inside:
                moved[m] = new + m[len(path) :]
        container = model.get_submodule(stack)
        if layers is not None and len(layers) == len(blocks):
            kept = {id(block) for _, block, _ in chosen}
            model.config.layer_types = [
                kind for kind, (_, block) in zip(layers, blocks, strict=True) if id(block) in kept
            ]
        for name in [name for name, _ in container.named_children() if name.isdigit()]:
            delattr(container, name)
        for j, (path, block, count) in enumerate(chosen):
            container.add_module(str(j), block)
            kinds[f"{stack}.{j}".lstrip(".")] = path, count
    return kinds, moved


def _inside(path: str, modules: Sequence[str]) -> list[str]:
    """Those of the modules that are in the block at ``path``."""
    return [m for m in modules if m.startswith(f"{path}.") or m == path]


def _fill(model: nn.Module) -> None:
    """Fake tensors on the CPU in place of those on the meta device, which have no attention of their own."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(new, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
