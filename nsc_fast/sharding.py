"""A base model that does not fit on one device: its blocks are sharded over the processes (FSDP2).

Every process keeps a part of each block and gathers the block while it runs. What stands outside the blocks
(embeddings, head) is whole in every process. Two things are not as in training:

- The ratios are formed inside the target modules' blocks, so that their gradients enter these blocks from
  within. FSDP gathers a block again when a gradient arrives at its output, which would be too late: the
  blocks with target modules stay gathered from the forward pass to the backward pass.
- Gathering takes all processes, so that all make the same passes in the same order, each to its end. Where a
  step is divided among them, :class:`InStep` fills up what one of them has less. What nothing is divided of
  (anchors, second moments, scores, the signal) every process computes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import MergeError
from .memory import blocks_of
from .monitor import Whole

if TYPE_CHECKING:
    from .processes import Processes

__all__ = ["InStep", "check_sharding", "counted_for_nothing", "gathered", "is_sharded", "shard"]


def shard(model: nn.Module, modules: Iterable[str], device: str | torch.device) -> nn.Module:
    """Shards the blocks of a frozen model over all processes and moves the rest to ``device``.

    Args:
        model: changed in place; on the CPU, so that no device has to hold it whole.
        modules: paths of adapted modules; the stacks of blocks in which they stand are sharded.
        device: of this process.

    Raises:
        MergeError: no blocks, or only one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized() or dist.get_world_size() < 2:
        raise MergeError("a base model is sharded over several processes: start them with torchrun")
    blocks = blocks_of(model, modules)
    if not blocks:
        raise MergeError(f"{type(model).__name__} has no numbered blocks that could be sharded")
    model.requires_grad_(False)
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for block in blocks.values():
        # Each for itself, without a common root: a pass may begin at any part of the model.
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    whole = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in whole:
        if not _is_shard(tensor) and tensor.device.type != torch.device(device).type:
            owner, _, own = name.rpartition(".")
            holder = model.get_submodule(owner)
            if isinstance(tensor, nn.Parameter):
                setattr(holder, own, nn.Parameter(tensor.to(device), requires_grad=False))
            else:
                setattr(holder, own, tensor.to(device))
    return model


def _is_shard(tensor: Tensor) -> bool:
    # By its name: importing it takes longer than a small merge.
    return type(tensor).__name__ == "DTensor"


def is_sharded(model: nn.Module) -> bool:
    """Whether a part of the model's weights is in other processes."""
    return any(_is_shard(parameter) for parameter in model.parameters())


def check_sharding(model: nn.Module, modules: Iterable[str], processes: Processes | None) -> None:
    """Whether a model, if it is sharded, is sharded the way it can be used.

    Args:
        model: sharded or not.
        modules: paths of adapted modules.
        processes: among which the passes are divided.

    Raises:
        MergeError: names a weight that is sharded in another way; or the processes were not given.
    """
    if not is_sharded(model):
        return
    blocks = set(blocks_of(model, modules).values())
    inside = {p for b in blocks if hasattr(b, "set_reshard_after_forward") for p in b.parameters()}
    for name, parameter in model.named_parameters():
        if _is_shard(parameter) and parameter not in inside:
            raise MergeError(
                f"the base model is sharded ({name}) in a way in which its weights are not there when a "
                "merge needs them: leave the sharding to nsc_fast.sharding.shard"
            )
    if processes is None:
        raise MergeError(
            "the base model is sharded over several processes, and the merge was not told of them: give "
            "processes=nsc_fast.processes.launched()"
        )


@contextmanager
def gathered(model: nn.Module, targets: Iterable[str]) -> Iterator[None]:
    """While the block runs, blocks with target modules stay gathered between forward and backward pass."""
    targets = tuple(targets)
    within = [
        block
        for path, block in blocks_of(model, targets).items()
        if any(target.startswith(f"{path}.") for target in targets)
    ]
    try:
        for block in within:
            block.set_reshard_after_forward(False, recurse=False)
        yield
    finally:
        for block in within:
            block.set_reshard_after_forward(True, recurse=False)
            block.reshard()


# Inputs, and what the caller needs beside them.
Pass = tuple[dict[str, Tensor], Any]
Kind = tuple[str, ...]


class InStep:
    """Gives every process as many passes as the one with the most has, in an order that is the same in all.

    Passes with other inputs may reach other parts of a model (text alone no vision tower). They are counted
    by kind, the names of their inputs, and made kind after kind. What a process lacks are idle passes, which
    count for nothing; one of a kind that it never had is sent to it.

    Args:
        processes: over which the model is sharded.
        device: of this process's inputs.
    """

    def __init__(self, processes: Processes, device: torch.device) -> None:
        self._processes = processes
        self._device = device
        self._idle: dict[Kind, Pass] = {}

    def __call__(self, passes: Sequence[Pass], idle: Callable[[Pass], Pass]) -> list[Pass]:
        """The passes of this process and idle ones; takes all processes.

        Args:
            passes: may be none.
            idle: makes of a pass one that counts for nothing. What it has beside the inputs is sent, too, and
                holds no tensors unless it is a token batch.
        """
        own: dict[Kind, list[Pass]] = {}
        for one in passes:
            own.setdefault(tuple(sorted(one[0])), []).append(one)
        for kind, some in own.items():
            self._idle.setdefault(kind, idle(some[0]))
        told = self._processes.gather(({kind: len(some) for kind, some in own.items()}, list(self._idle)))
        kinds = sorted({kind for counts, _ in told for kind in counts})
        self._complete(kinds, [known for _, known in told])
        out: list[Pass] = []
        for kind in kinds:
            mine, most = own.get(kind, []), max(counts.get(kind, 0) for counts, _ in told)
            out += mine + [self._idle[kind]] * (most - len(mine))
        return out

    def _complete(self, kinds: Sequence[Kind], known: Sequence[Sequence[Kind]]) -> None:
        """Sends an idle pass of every kind that a process does not know; ``known`` in their order."""
        sender = {
            kind: next(rank for rank, own in enumerate(known) if kind in own)
            for kind in kinds
            if not all(kind in own for own in known)
        }
        if not sender:
            return
        mine = [kind for kind, rank in sender.items() if rank == self._processes.rank]
        for sent in self._processes.gather({kind: _moved(self._idle[kind], "cpu") for kind in mine}):
            for kind, one in sent.items():
                self._idle.setdefault(kind, _moved(one, self._device))


def _moved(one: Pass, device: str | torch.device) -> Pass:
    """An idle pass on a device."""
    inputs, tokens = one
    if is_dataclass(tokens):
        values = ((f.name, getattr(tokens, f.name)) for f in fields(tokens))
        tokens = replace(tokens, **{name: v.to(device) for name, v in values if isinstance(v, Tensor)})
    return {key: value.to(device) for key, value in inputs.items()}, tokens


def counted_for_nothing(one: Pass, tasks: int) -> Pass:
    """A pass whose token batch is a part, of weight 0, of batches of all ``tasks``."""
    inputs, tokens = one
    without_end = Whole(*[float("inf")] * len(Whole._fields))
    return inputs, replace(tokens, whole=dict.fromkeys(range(tasks), without_end))
