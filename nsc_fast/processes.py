"""One merge in many processes, as torchrun or ``accelerate launch`` start them.

Every process holds the model, all tasks' batches and the coefficients. Each step's batches are divided among
them; what they exchange are the gradients of the coefficients (a few KB) and the losses, which every process
adds up in the order of the processes. So all take the same optimizer step, and the result depends on their
number only in the rounding. The first process reads and writes files.

The exchange goes through gloo, on any device: a process that dies is noticed at once, and one that fails
tells the others why.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist

from .batches import Batch, cut, rows
from .checkpoint import differences
from .errors import MergeError
from .monitor import Whole
from .packing import divisible, whole_of

if TYPE_CHECKING:
    from .loop import Objective, Stream

__all__ = ["Divisible", "ProcessError", "Processes", "Shared", "launched", "share"]

TIMEOUT = 600.0
"""Seconds that a process waits for the others in a step."""

# Of launchers that do not connect the processes as torch expects it.
_FOREIGN = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


class ProcessError(MergeError):
    """Another process failed or is gone."""


@dataclass(frozen=True)
class _Failure:
    text: str


class Processes:
    """This process among those that a launcher started; made by :func:`launched`.

    Attributes:
        rank: number of this process, from 0.
        size: number of all.
        local_rank: number of this process on its machine.
        tells: whether an error is sent to the others. Not where they may wait for something else: there the
            end of this process ends theirs.
    """

    def __init__(self, rank: int, size: int, local_rank: int, timeout: float = TIMEOUT) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        # Of its own: what else the program sends must not meet it.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._over = False
        self.tells = True

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order.

        Args:
            value: plain values and CPU tensors.

        Raises:
            ProcessError: another process has failed, or does not answer any more.
        """
        found = self._exchange(value)
        for rank, one in enumerate(found):
            if isinstance(one, _Failure):
                self._over = True
                raise ProcessError(f"process {rank} failed: {one.text}")
        return found

    def _exchange(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, value, group=self._group)
        except RuntimeError as error:
            self._over = True
            raise ProcessError(
                f"process {self.rank} of {self.size} lost the others: one has ended or does not answer; its "
                f"own message says why ({str(error).splitlines()[0]})"
            ) from error
        return found

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """An error inside ends all processes: it is sent to those that wait for this one."""
        try:
            yield
        except Exception as error:
            if self._over or not self.tells:
                raise
            self._over = True
            text = str(error) or type(error).__name__
            try:
                found = self._exchange(_Failure(text))
            except ProcessError:
                raise error from None
            if self.rank and found[0] == _Failure(text):
                # Told once, by the first.
                raise ProcessError(f"process 0 failed: {text}") from error
            raise

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Whether all processes are about to do the same.

        Raises:
            MergeError: names the process and what differs.
        """
        for rank, other in enumerate(found := self.gather(dict(facts))):
            wrong, free = differences(found[0], other)
            if wrong or free:
                raise MergeError(f"process {rank} has other inputs than process 0: {'; '.join(wrong + free)}")

    def device(self, kind: str) -> str:
        """The device of this process, an accelerator of its own; it becomes torch's current one.

        Raises:
            MergeError: there are not enough.
        """
        if kind in ("cpu", "mps") or ":" in kind:
            return kind
        count = getattr(torch, kind).device_count()
        if self.local_rank >= count:
            raise MergeError(
                f"process {self.local_rank} of this machine has no {kind} device of its own (there are "
                f"{count}): start at most {count} processes on it, or use --device cpu"
            )
        getattr(torch, kind).set_device(self.local_rank)
        return f"{kind}:{self.local_rank}"


def launched(timeout: float = TIMEOUT) -> Processes | None:
    """The processes that a launcher started with this one, connected; None if it is alone.

    Reads the variables that torchrun and ``accelerate launch`` set: RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR, MASTER_PORT.

    Args:
        timeout: seconds that a process waits for the others.

    Raises:
        MergeError: processes that are not connected: started by MPI alone, for example; or one process of a
            launcher that was asked for several.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        for name in _FOREIGN:
            if int(os.environ.get(name, 1)) > 1:
                raise MergeError(
                    f"{name} tells of several processes that would all do the same; start them with torchrun "
                    "or accelerate launch"
                )
        if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
            # What accelerate sets where it was asked for several processes and cannot start them.
            raise MergeError(
                "accelerate launch was asked for several processes and has started this one alone, as it "
                "does with --cpu and without GPUs: write accelerate launch --multi_gpu --num_processes N, "
                "which starts them on CPUs, too, or torchrun --nproc_per_node N"
            )
        return None
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing and not dist.is_initialized():
        raise MergeError(
            f"WORLD_SIZE is {size}, but {missing[0]} is not set: start the processes with torchrun or "
            "accelerate launch"
        )
    if not dist.is_initialized():
        # The second is used for a sharded base model alone.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    local = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    return Processes(dist.get_rank(), dist.get_world_size(), local, timeout)


@runtime_checkable
class Divisible(Protocol):
    """An objective whose batches may be divided."""

    def prepare(self, batches: Mapping[str, Batch]) -> None:
        """Is told the whole batches of all tasks first: what it decides by them is the same everywhere."""
        ...

    def part(
        self, batches: Mapping[str, Batch], wholes: Mapping[str, Whole] | None
    ) -> tuple[float, dict[str, float]]:
        """As ``losses``, for parts of batches: what all parts give adds up to what the whole batches give."""
        ...

    def observe(self, ratios: Mapping[str, float]) -> None:
        """Is told the ratios of all tasks."""
        ...


class Shared:
    """An objective whose batches are divided among processes; the same to the loop as the objective itself.

    Attributes:
        installation: of the objective.
    """

    def __init__(self, objective: Objective, streams: Mapping[str, Stream], processes: Processes) -> None:
        self._objective = objective
        self._streams = streams
        self._processes = processes
        self.installation = objective.installation
        self._sharded = getattr(objective, "in_step", None) is not None
        processes.tells = not self._sharded

    @property
    def finished(self) -> bool:
        """Of the objective; the same in all processes."""
        return self._objective.finished

    def losses(self, batches: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
        """The loss and the ratios over all processes; the gradients are the sums over all.

        Raises:
            MergeError: of this process or another, or batches that are not the same in all.
        """
        processes, divides = self._processes, isinstance(self._objective, Divisible)
        mine, wholes = share(batches, processes.rank, processes.size, divide=divides)
        loss, ratios, objective = 0.0, {}, self._objective
        if divides:
            objective.prepare(batches)
        # Where the base is sharded all processes run, those too that have nothing to do.
        if mine or self._sharded:
            loss, ratios = objective.part(mine, wholes) if divides else objective.losses(mine)
        parameters = list(self.installation.coefficients.parameters())
        gradients = [None if p.grad is None else p.grad.detach().cpu() for p in parameters]
        seen = {task: self._streams[task].seen for task in batches}
        found = processes.gather((loss, ratios, gradients, seen))
        for rank, (*_, other) in enumerate(found):
            for task, own in seen.items():
                if other[task] != own:
                    raise MergeError(
                        f"task {task!r}: processes {processes.rank} and {rank} read different batches; give "
                        "a list of batches, or fix the order of the loader by a seed"
                    )
        for i, parameter in enumerate(parameters):
            parts = [g[i].to(torch.float64) for _, _, g, _ in found if g[i] is not None]
            # One after another: the same bits in every process and every run.
            parameter.grad = sum(parts[1:], parts[0]).to(parameter) if parts else None
        total = sum(one for one, *_ in found)
        ratios = {t: sum(r.get(t, 0.0) for _, r, *_ in found) for t in batches}
        if divides:
            objective.observe(ratios)
        return total, ratios


def share(
    batches: Mapping[str, Any], rank: int, size: int, *, divide: bool = True
) -> tuple[dict[str, Any], dict[str, Whole] | None]:
    """One process's part of a step: of about the same number of tokens as the others'.

    All sequences stand in a line, task after task, that is cut into as many pieces as there are processes. A
    process so has whole batches of few tasks, and parts of at most two.

    Args:
        batches: task -> batch.
        rank, size: of the process.
        divide: whether a batch may be cut; if not, or if one of them cannot be, each goes to one process.

    Returns:
        Task -> batch or part, for the tasks that the process has to do with; and, where batches may have been
        cut, the sizes of each whole batch (see ``TokenBatch.whole``).
    """
    divide = divide and all(divisible(batch) for batch in batches.values())
    counts = {task: rows(batch) if divide else 1 for task, batch in batches.items()}
    costs = {task: _length(batch) if divide else 1.0 for task, batch in batches.items()}
    total = sum(counts[task] * costs[task] for task in batches)
    mine, position = {}, 0.0
    for task, batch in batches.items():
        # Whose middle lies in this process's piece.
        middles = [(position + (i + 0.5) * costs[task]) * size / total for i in range(counts[task])]
        own = [i for i, middle in enumerate(middles) if min(int(middle), size - 1) == rank]
        position += counts[task] * costs[task]
        if own and divide:
            (mine[task],) = cut(batch, [own[0], own[-1] + 1])
        elif own:
            mine[task] = batch
    return mine, {task: whole_of(batches[task]) for task in mine} if divide else None


def _length(batch: Batch) -> float:
    """Tokens of a sequence with its padding; 1 where it is no text."""
    ids = batch.get("input_ids", batch.get("inputs_embeds"))
    return 1.0 if ids is None else float(ids.shape[1])
