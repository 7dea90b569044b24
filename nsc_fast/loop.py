"""The optimisation loop on the coefficients or cores of an objective, in one process or in many."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from .batches import Batch
from .checkpoint import Checkpoints, Recorder, Stateful, digest
from .layers import Installation
from .parameters import Descent
from .processes import Processes, Shared
from .soap import SOAP

__all__ = ["Objective", "StepRecord", "Stream", "minimise"]


@dataclass(frozen=True)
class StepRecord:
    """One optimisation step, as kept in the history."""

    step: int
    loss: float
    ratios: dict[str, float]
    learning_rate: float
    coefficients: dict[str, dict[str, float]] | None = None


class Objective(Protocol):
    """What the optimisation minimises.

    Attributes:
        installation: what ``install`` returned.
        finished: whether nothing is left to optimise.
    """

    installation: Installation

    @property
    def finished(self) -> bool: ...

    def losses(self, batches: Mapping[str, Batch]) -> tuple[float, dict[str, float]]:
        """Forward and backward for one batch of every task; returns the loss and every task's part of it."""
        ...


class Stream(Stateful, Protocol):
    """Endless batches of one task; a batch is what the objective takes.

    Attributes:
        seen: digest of the batches of this round, where ``watch`` could not tell that of the data.
    """

    seen: str

    def next(self) -> Any: ...

    def watch(self) -> str:
        """Digest of the data; where they are not known beforehand, batches are digested as they come."""
        ...


def minimise(
    driver: Objective,
    streams: Mapping[str, Stream],
    parameters: Descent,
    on_step: Callable[[StepRecord], None] | None,
    checkpoints: Checkpoints | None = None,
    processes: Processes | None = None,
) -> tuple[list[StepRecord], bool]:
    """The loop: until the steps are done or nothing is left to do. AdamW on coefficients, SOAP on cores.

    Args:
        driver: the objective.
        streams: task -> batches.
        parameters: of the loop.
        on_step: called after each step that is made here, not for those before a checkpoint.
        checkpoints: where the run is kept, so that it can go on. Default: nowhere.
        processes: among which the batches of a step are divided. Default: this one alone.

    Returns:
        The history, and whether the user interrupted it. Ctrl-C lets the running step finish, a second one
        does not; among several processes none waits.
    """
    coefficients = driver.installation.coefficients
    kind = SOAP if coefficients.granularity == "core" else torch.optim.AdamW
    optimizer = kind(
        coefficients.parameters(), lr=parameters.learning_rate, weight_decay=parameters.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, parameters.rate_at)
    history: list[StepRecord] = []
    stopper = _EarlyStop(parameters)
    recorder, ended = None, False
    with (
        _interrupts(wait=processes is None) as interrupted,
        nullcontext() if processes is None else processes.guarded(),
    ):
        try:
            if checkpoints is not None or processes is not None:
                facts = {} if checkpoints is None else dict(checkpoints.facts)
                facts |= _facts(coefficients, streams, parameters, processes)
            if checkpoints is not None:
                parts = {"coefficients": coefficients, "optimizer": optimizer, "schedule": schedule}
                parts |= {"early stopping": stopper, **{f"data of {t}": s for t, s in streams.items()}}
                if isinstance(driver, Stateful):
                    parts["objective"] = driver
                recorder = Recorder(checkpoints, parts, facts, processes)
            if processes is not None:
                processes.check_same(facts)
                driver = Shared(driver, streams, processes)
            if recorder is not None:
                before, ended = recorder.begin()
                history += [StepRecord(**record) for record in before]
            while not ended:
                optimizer.zero_grad(set_to_none=True)
                loss, ratios = driver.losses({task: stream.next() for task, stream in streams.items()})
                rate = optimizer.param_groups[0]["lr"]
                optimizer.step()
                schedule.step()
                step = len(history) + 1
                logged = (step - 1) % parameters.log_coefficients_every == 0 or step == parameters.steps
                record = StepRecord(step, loss, ratios, rate, coefficients.table() if logged else None)
                history.append(record)
                if on_step is not None:
                    on_step(record)
                ended = stopper.done(loss) or driver.finished or step == parameters.steps
                if recorder is not None:
                    recorder.step(history, ended)
                if interrupted():
                    return history, True
        except KeyboardInterrupt:
            return history, True
        finally:
            if recorder is not None:
                recorder.close()
    return history, False


@contextmanager
def _interrupts(*, wait: bool) -> Iterator[Callable[[], bool]]:
    """Tells whether Ctrl-C was pressed, and keeps the first of them from raising anything.

    What a signal raises while a finaliser runs is lost, and a step runs many. Elsewhere than in the main
    thread, or where somebody else handles the signal, nothing is changed.

    Args:
        wait: False changes nothing either.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not (wait and ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        yield lambda: False
        return
    pressed = False

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            signal.default_int_handler(number, frame)
        pressed = True

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _facts(
    coefficients: nn.Module,
    streams: Mapping[str, Stream],
    parameters: Descent,
    processes: Processes | None,
) -> dict[str, Any]:
    """What the loop depends on, to be compared with another process or a later run."""
    return {
        "parameters": parameters.model_dump(mode="json"),
        "initial coefficients": digest(coefficients.named_parameters()),
        "processes": 1 if processes is None else processes.size,
        **{f"data of {task}": stream.watch() for task, stream in streams.items()},
    }


class _EarlyStop:
    """Stops when no loss of the last ``patience`` steps was below the best before by ``min_delta``."""

    def __init__(self, parameters: Descent) -> None:
        self._rule = parameters.early_stopping
        self._best, self._waited = float("inf"), 0

    def done(self, loss: float) -> bool:
        if self._rule is None:
            return False
        if loss < self._best - self._rule.min_delta:
            self._best, self._waited = loss, 0
        else:
            self._waited += 1
        return self._waited >= self._rule.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best, self._waited = state["best"], state["waited"]
