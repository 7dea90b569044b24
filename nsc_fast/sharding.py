"""A base model that does not fit on one device: its blocks are sharded over the processes (FSDP2).

Every process keeps a part of each block and gathers the block while it runs. What stands outside the blocks
(embeddings, head) is whole in every process. Two things are not as in training:

- The ratios are formed inside the target modules' blocks, so that their gradients enter these blocks from
  within. FSDP gathers a block again when a gradient arrives at its output, which would be too late: the
  blocks with target modules stay gathered from the forward pass to the backward pass.
- Gathering takes all processes, so that all make the same number of passes, each to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import MergeError
from .memory import blocks_of
from .monitor import TokenBatch

__all__ = ["check_sharding", "gathered", "is_sharded", "shard", "with_idle_passes"]


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


def check_sharding(model: nn.Module, modules: Iterable[str]) -> None:
    """Whether a sharded model is sharded the way it can be used.

    Raises:
        MergeError: names a weight that is not.
    """
    blocks = set(blocks_of(model, modules).values())
    inside = {p for b in blocks if hasattr(b, "set_reshard_after_forward") for p in b.parameters()}
    for name, parameter in model.named_parameters():
        if _is_shard(parameter) and parameter not in inside:
            raise MergeError(
                f"the base model is sharded ({name}) in a way in which its weights are not there when a "
                "merge needs them: leave the sharding to nsc_fast.sharding.shard"
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


Pass = tuple[dict[str, Tensor], TokenBatch]


def with_idle_passes(passes: list[Pass], tasks: int, agree: Callable[[int], int]) -> list[Pass]:
    """As many passes as the process with the most has; what is added counts for nothing.

    Args:
        passes: of this process, at least one.
        tasks: number of all tasks.
        agree: largest of a number over all processes.
    """
    inputs, tokens = passes[-1]
    idle = inputs, replace(tokens, whole=nothing(range(tasks)))
    return passes + [idle] * (agree(len(passes)) - len(passes))


def nothing(tasks: Iterable) -> Mapping:
    """Sizes of whole batches of which any part is nothing."""
    return {task: (float("inf"), float("inf")) for task in tasks}
