"""The optimisation of merge coefficients on unlabeled data (Algorithm 1 of the paper), without the model zoo.

One step: a batch of every task goes through the merged model, in one forward pass where the batches can be
joined; the pass stops at the last target module; the backward pass emits the gradients of the coefficients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .batches import Batch, BatchStream, join, token_batch
from .errors import MergeError
from .factors import LowRankUpdate
from .layers import Installation, install, remove
from .parameters import NSCParameters
from .targets import select_targets

__all__ = ["Driver", "Objective", "StepRecord", "optimise"]


class _LastTargetReached(Exception):
    """Ends a forward pass after the last target module: nothing behind it enters the loss."""


@dataclass(frozen=True)
class StepRecord:
    """One optimisation step, as kept in the history."""

    step: int
    loss: float
    ratios: dict[str, float]
    learning_rate: float
    coefficients: dict[str, dict[str, float]] | None = None


class Objective(Protocol):
    """What the optimisation minimises. :class:`Driver`, the null-space ratio, is one."""

    installation: Installation

    def losses(self, batches: Mapping[str, Batch]) -> tuple[float, dict[str, float]]:
        """Forward and backward for one batch of every task; returns the loss and every task's part of it."""
        ...


@dataclass
class Driver:
    """Forward and backward of one step on an installed model; see :func:`optimise` for the loop.

    Attributes:
        model: the base model with merged layers in it.
        installation: what ``install`` returned.
        together: "auto" joins the tasks' batches where it saves time, "always" insists, "never" runs them one
            after another.
    """

    model: nn.Module
    installation: Installation
    together: str = "auto"
    _runner: nn.Module = field(init=False)
    _options: dict[str, Any] = field(init=False)
    _calls: int = 0
    _expected: int | None = None

    def __post_init__(self) -> None:
        self._runner = _backbone(self.model, self.installation.monitor.targets)
        # A cache of keys and values serves generation; here it would only cost memory.
        accepted = inspect.signature(self._runner.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in accepted else {}

    def count(self) -> None:
        """To be called after each target module: stops the pass when all have run."""
        self._calls += 1
        if self._expected is not None and self._calls >= self._expected:
            raise _LastTargetReached

    def losses(self, batches: Mapping[str, Batch]) -> tuple[float, dict[str, float]]:
        """Forward and backward for one batch of every task; gradients add up in the coefficients.

        Returns:
            The loss and the mean ratio of every task.

        Raises:
            MergeError: a loss that is not finite, or batches that cannot be joined though they must.
        """
        monitor = self.installation.monitor
        device = next(self.installation.coefficients.parameters()).device
        moved = {
            monitor.tasks.index(task): {key: value.to(device) for key, value in batch.items()}
            for task, batch in batches.items()
        }
        joined = None
        if self.together != "never" and len(moved) > 1:
            joined = join(moved, max_padding=1.5 if self.together == "auto" else None)
            if joined is None and self.together == "always":
                raise MergeError(
                    "the tasks' batches cannot go through the model together (different inputs or shapes); "
                    "set batching to 'auto' or 'never'"
                )
        if joined is not None:
            passes = [joined]
        else:
            passes = [(dict(batch), token_batch(batch, k, device)) for k, batch in moved.items()]
        total, ratios = 0.0, {}
        try:
            for inputs, tokens in passes:
                monitor.begin(tokens)
                self._forward(inputs)
                monitor.end()
                seen = monitor.task_means()
                present = {monitor.tasks[k] for k in tokens.task.unique().tolist()}
                ratios.update({task: value for task, value in seen.items() if task in present})
                total += self._backward(monitor.loss)
        finally:
            monitor.clear()
        return total, ratios

    def _forward(self, inputs: dict[str, Tensor]) -> None:
        self._calls = 0
        try:
            self._runner(**inputs, **self._options)
        except _LastTargetReached:
            return
        # The first pass runs to the end and counts: shared layers run more than once.
        self._expected = self._calls

    def _backward(self, loss: Tensor | None) -> float:
        if loss is None:
            targets = ", ".join(list(self.installation.monitor.targets)[:3])
            raise MergeError(f"no target module ran in the forward pass (targets: {targets}, ...)")
        value = float(loss.detach())
        if value != value or value in (float("inf"), float("-inf")):
            raise MergeError(f"the loss is {value}: {self._culprit()}")
        if loss.requires_grad:
            loss.backward()
        return value

    def _culprit(self) -> str:
        for module, ratios in self.installation.monitor.ratios.items():
            for task, ratio in zip(self.installation.monitor.tasks, ratios.tolist(), strict=True):
                if ratio != ratio:
                    return (
                        f"the null-space ratio of task {task!r} at {module!r} is not a number; activations "
                        "overflow. Lower the learning rate or load the base model in float32"
                    )
        return "lower the learning rate or load the base model in float32"


def optimise(
    model: nn.Module,
    adapters: Mapping[str, Mapping[str, LowRankUpdate]],
    data: Mapping[str, Iterable[Batch]],
    parameters: NSCParameters | None = None,
    *,
    init: Mapping[str, float] | None = None,
    seed: int = 0,
    impl: str = "auto",
    on_step: Callable[[StepRecord], None] | None = None,
    objective: Callable[[nn.Module, Installation], Objective] | None = None,
) -> tuple[dict[str, Tensor], list[StepRecord], bool]:
    """Finds merge coefficients that minimise the mean null-space ratio on unlabeled data.

    Args:
        model: base model; in evaluation mode and unchanged when the function returns.
        adapters: task -> module path -> canonical update.
        data: task -> iterable of batches (dicts of model inputs; label columns are not read).
        parameters: of the method; the paper's by default.
        init: initial coefficient per task. Default: ``parameters.init`` for all.
        seed: of the order of the data. Two runs with one seed give the same bits.
        impl: "auto", "triton" or "torch".
        on_step: called after each step.
        objective: makes another objective than the null-space ratio from the installed model.

    Returns:
        Coefficients per module, the history, and whether the user interrupted the run (Ctrl-C): what was
        reached by then is returned.

    Raises:
        MergeError: data missing for a task, a loss that is not finite, empty batches.
        ValueError: targets or modules that do not exist.
    """
    parameters = parameters or NSCParameters()
    _check_data(adapters, data)
    targets = () if objective is not None else _targets(model, adapters, parameters)
    # One seed for all: lists of equal length are shuffled alike, so that batches of like length, sorted
    # alike, meet in one forward pass with little padding.
    streams = {task: BatchStream(task, data[task], seed) for task in adapters}
    modes = {module: module.training for module in model.modules()}
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    driver: Objective | None = None
    model.eval()
    try:
        installation = install(
            model,
            adapters,
            targets=targets,
            granularity=parameters.granularity,
            init=parameters.init if init is None else init,
            preferences=parameters.preferences,
            on_recorded=lambda: driver.count(),
            impl=impl,
        )
        if objective is None:
            driver = Driver(model, installation, parameters.batching)
        else:
            driver = objective(model, installation)
        history, interrupted = _loop(driver, streams, parameters, on_step)
        return installation.coefficients.by_module(), history, interrupted
    finally:
        remove(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen[name])
        for module, training in modes.items():
            module.training = training


def _targets(
    model: nn.Module, adapters: Mapping[str, Mapping[str, LowRankUpdate]], parameters: NSCParameters
) -> tuple[str, ...]:
    """Target modules of the null-space ratio."""
    updates = list(dict.fromkeys(m for own in adapters.values() for m in own))
    order = [name for name, _ in model.named_modules()]
    known = set(updates)
    targets = select_targets(
        [m for m in order if m in known] or updates,
        layers=parameters.scope.layers,
        names=parameters.scope.filter,
        all_modules=order,
    )
    for task, own in adapters.items():
        if not any(t in own for t in targets):
            raise MergeError(
                f"task {task!r} adapts none of the {len(targets)} target modules; widen the scope "
                f"(layers={parameters.scope.layers!r}, filter={parameters.scope.filter!r})"
            )
    return targets


def _loop(
    driver: Objective,
    streams: Mapping[str, BatchStream],
    parameters: NSCParameters,
    on_step: Callable[[StepRecord], None] | None,
) -> tuple[list[StepRecord], bool]:
    coefficients = driver.installation.coefficients
    optimizer = torch.optim.AdamW(
        coefficients.parameters(), lr=parameters.learning_rate, weight_decay=parameters.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, parameters.rate_at)
    history: list[StepRecord] = []
    stopper = _EarlyStop(parameters)
    try:
        for step in range(parameters.steps):
            optimizer.zero_grad(set_to_none=True)
            loss, ratios = driver.losses({task: stream.next() for task, stream in streams.items()})
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            schedule.step()
            logged = step % parameters.log_coefficients_every == 0 or step + 1 == parameters.steps
            record = StepRecord(step + 1, loss, ratios, rate, coefficients.table() if logged else None)
            history.append(record)
            if on_step is not None:
                on_step(record)
            if stopper.done(loss):
                break
    except KeyboardInterrupt:
        return history, True
    return history, False


class _EarlyStop:
    """Stops when no loss of the last ``patience`` steps was below the best before by ``min_delta``."""

    def __init__(self, parameters: NSCParameters) -> None:
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


def _check_data(adapters: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    if not adapters:
        raise MergeError("there is no adapter to merge")
    for task in adapters:
        if task not in data:
            raise MergeError(f"task {task!r} has no unlabeled data; give it some, or use a data-free method")
    unknown = [task for task in data if task not in adapters]
    if unknown:
        raise MergeError(f"data was given for {unknown[0]!r}, which is no adapter ({', '.join(adapters)})")


def _backbone(model: nn.Module, targets: Sequence[str] | Mapping[str, Any]) -> nn.Module:
    """The part of a transformers model without its head, if all targets stand inside it."""
    prefix = getattr(model, "base_model_prefix", "")
    inner = getattr(model, prefix, None) if prefix else None
    if isinstance(inner, nn.Module) and all(t.startswith(prefix + ".") for t in targets):
        return inner
    return model
