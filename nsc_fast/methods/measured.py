"""What the methods that run the model share: sampled rows, and the signal measured on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from ..batches import Batch
from ..checkpoint import digest
from ..driver import target_modules
from ..errors import MergeError
from ..objectives.running import sample
from ..packing import parts
from ..parameters import NSCParameters
from ..result import MergeResult
from ..signal import SignalProbe
from .base import MergeInputs, merged_updates, per_task

__all__ = ["default_targets", "sampled", "signal_probe", "with_signal"]


def sampled(inputs: MergeInputs, rows: int) -> tuple[dict[str, list[dict[str, Tensor]]], MergeInputs]:
    """Batches of about ``rows`` rows of every task, and the inputs with their data as if none were taken.

    Raises:
        MergeError: no rows, or other rows than in the first of several processes.
    """
    chosen: dict[str, list[dict[str, Tensor]]] = {}
    data: dict[str, Iterable[Batch]] = {}
    for task in inputs.tasks:
        chosen[task], data[task] = sample(task, inputs.data[task], rows)
    if inputs.processes is not None:
        facts = {}
        for task, own in chosen.items():
            facts[f"rows of {task}"] = digest(item for batch in own for item in sorted(batch.items()))
        inputs.processes.check_same(facts)
    return chosen, replace(inputs, data=data)


def default_targets(inputs: MergeInputs) -> tuple[str, ...]:
    """The modules that 'nsc' looks at by default; all adapted ones where the model has no numbered blocks."""
    try:
        return target_modules(inputs.model, inputs.updates, NSCParameters())
    except (ValueError, MergeError):
        return tuple(dict.fromkeys(module for own in inputs.updates.values() for module in own))


def signal_probe(
    inputs: MergeInputs, targets: Sequence[str], rows: int, micro_batch: int | None = None
) -> tuple[MergeInputs, SignalProbe]:
    """The probe over ``rows`` rows of every task, ``micro_batch`` at a time, and the inputs to go on with."""
    batches, inputs = sampled(inputs, rows)
    batches = {task: [p for batch in own for p in parts(batch, micro_batch)] for task, own in batches.items()}
    return inputs, SignalProbe(inputs.model, inputs.updates, targets, batches)


def with_signal(
    inputs: MergeInputs, result: MergeResult, init: float, rows: int, micro_batch: int | None = None
) -> MergeResult:
    """The result with the signal, beginning at task arithmetic with ``init``; no notices.

    Nothing of it is optimised here, so that a weak signal is no reason for a warning.
    """
    if not rows:
        return result
    inputs, probe = signal_probe(inputs, default_targets(inputs), rows, micro_batch)
    signal = probe.before(merged_updates(inputs, per_task(inputs, init)))
    return replace(result, signal=probe.after(signal, result.updates).to_dict())
