"""The optimisation of merge coefficients on unlabeled data (Algorithm 1 of the paper), without the model zoo.

One step: a batch of every task goes through the merged model, in one forward pass where the batches can be
joined; the pass stops at the last target module; the backward pass emits the gradients of the coefficients.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .batches import Batch, BatchStream
from .checkpoint import Checkpoints
from .errors import MergeError
from .factors import LowRankUpdate
from .layers import Installation, install, model_device, remove
from .loop import Objective, StepRecord, Stream, minimise
from .memory import EndOfPass, checkpointed
from .monitor import TokenBatch, Whole
from .objectives.running import evaluating
from .packing import Passes, backbone, check_positions, forward_options, positions
from .parameters import NSCParameters
from .processes import Processes
from .sharding import InStep, Pass, check_sharding, counted_for_nothing, gathered, is_sharded
from .siblings import Siblings, share
from .targets import routed, select_targets, tokens_of

__all__ = [
    "Driver",
    "Objective",
    "StepRecord",
    "Stream",
    "backbone",
    "check_data",
    "forward_options",
    "minimise",
    "optimise",
    "restored",
    "target_modules",
]


# Steps whose mean decides whether a task stops: one batch is too few rows.
_RECENT = 8


@dataclass
class Driver:
    """Forward and backward of one step on an installed model; see :func:`optimise` for the loop.

    Attributes:
        model: the base model with merged layers in it.
        installation: what ``install`` returned.
        together: "auto" joins the tasks' batches where it saves time, "always" insists, "never" runs them one
            after another.
        levels: task -> ratio at which the task stops: while its mean over the last steps is not above, the
            task is measured but gets no gradient. Default: no task stops.
        micro_batch: sequences of each task in one pass at most. Default: all of the batch.
        packing: "auto" joins batches without padding if the model keeps packed sequences apart, "always"
            insists, "never" does not.
        on_notice: is told what the user should know.
        in_step: keeps the passes of all processes in step, where the base model is sharded over them.
    """

    model: nn.Module
    installation: Installation
    together: str = "auto"
    levels: Mapping[str, float] = field(default_factory=dict)
    micro_batch: int | None = None
    packing: str = "never"
    on_notice: Callable[[str], None] | None = None
    in_step: InStep | None = None
    _recent: dict[str, deque[float]] = field(default_factory=dict)
    _runner: nn.Module = field(init=False)
    _options: dict[str, Any] = field(init=False)
    _expected: dict[frozenset[str], tuple[str, int]] = field(default_factory=dict)
    _siblings: list[Siblings] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._runner = backbone(self.model, self.installation.monitor.targets)
        self._options = forward_options(self._runner)
        how = self.together, self.micro_batch, self.packing
        self._passes = Passes(self._runner, self._options, positions(self.model), *how, self.on_notice)

    def losses(self, batches: Mapping[str, Batch]) -> tuple[float, dict[str, float]]:
        """Forward and backward for one batch of every task; gradients add up in the coefficients.

        Returns:
            The loss and the mean ratio of every task.

        Raises:
            MergeError: a loss that is not finite, or batches that cannot be joined though they must.
        """
        loss, ratios = self.part(batches)
        self.observe(ratios)
        return loss, ratios

    def prepare(self, batches: Mapping[str, Batch]) -> None:
        """Decides by the batches of all tasks whether they are packed; :meth:`part` knows some of them."""
        if self._passes.packed is None:
            self._divided(batches)

    def part(
        self, batches: Mapping[str, Batch], wholes: Mapping[str, Whole] | None = None
    ) -> tuple[float, dict[str, float]]:
        """As :meth:`losses`, for some tasks or parts of batches, without deciding which tasks stop.

        Args:
            batches: task -> batch, or part of one; none is for sharded base models.
            wholes: for parts: task -> sizes of its whole batch. The losses and ratios of all parts add up to
                those of the whole batches.
        """
        monitor = self.installation.monitor
        total, ratios = 0.0, {}
        try:
            passes = self._divided(batches, wholes) if batches else []
            if self.in_step is not None:
                passes = self.in_step(passes, self._idle)
            for inputs, tokens in passes:
                if frozenset(inputs) not in self._expected:
                    self.look(inputs, tokens)
                loss, means = self.forward(inputs, tokens), monitor.task_means()
                for task in (monitor.tasks[k] for k in tokens.task.unique().tolist()):
                    if task not in means:
                        raise MergeError(self._unreached(task))
                    ratios[task] = ratios.get(task, 0.0) + means[task]
                total += self._backward(loss)
        finally:
            monitor.clear()
            for group in self._siblings:
                group.forget()
        if self.levels:
            preferences = zip(monitor.tasks, monitor.preferences, strict=True)
            total = sum(pi * ratios.get(t, 0.0) for t, pi in preferences)
        return total, ratios

    def _divided(self, batches: Mapping[str, Batch], wholes: Mapping[str, Whole] | None = None) -> list[Pass]:
        device = next(self.installation.coefficients.parameters()).device
        return self._passes(batches, self.installation.monitor.tasks, device, wholes)

    def _idle(self, one: Pass) -> Pass:
        return counted_for_nothing(one, len(self.installation.monitor.tasks))

    @property
    def finished(self) -> bool:
        """Whether every task has stopped: no gradient is left."""
        monitor = self.installation.monitor
        return bool(self.levels) and monitor.stopped == set(monitor.tasks)

    def observe(self, ratios: Mapping[str, float]) -> None:
        """Decides from the ratios of the last steps which tasks get a gradient in the next one."""
        for task, level in self.levels.items():
            recent = self._recent.setdefault(task, deque(maxlen=_RECENT))
            recent.append(ratios[task])
            if sum(recent) / len(recent) <= level:
                self.installation.monitor.stopped.add(task)
            else:
                self.installation.monitor.stopped.discard(task)

    def state_dict(self) -> dict[str, Any]:
        """What the next steps depend on beside the coefficients."""
        return {
            "recent": {task: list(values) for task, values in self._recent.items()},
            "stopped": sorted(self.installation.monitor.stopped),
            "packing": (self.packing, self._passes.packed),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Back to what :meth:`state_dict` returned."""
        self._recent = {task: deque(values, maxlen=_RECENT) for task, values in state["recent"].items()}
        self.installation.monitor.stopped = set(state["stopped"])
        asked, packed = state["packing"]
        if asked == self.packing:
            self._passes.packed = packed

    def forward(self, inputs: dict[str, Tensor], tokens: TokenBatch) -> Tensor | None:
        """One pass; returns its part of the loss. The monitor stays active until it is cleared."""
        monitor = self.installation.monitor
        monitor.begin(tokens, self._expected.get(frozenset(inputs)) if self.in_step is None else None)
        self._run(inputs)
        monitor.end()
        return monitor.loss

    def look(self, inputs: dict[str, Tensor], tokens: TokenBatch) -> None:
        """A pass without gradients to the end of the model, before the first with such inputs.

        It shows which call of a target module is the last (text alone does not reach a vision tower, and
        shared layers run more than once) and which layers receive the same activations. All passes that
        count are then computed in the same way, those after a resumption too.
        """
        monitor = self.installation.monitor
        monitor.begin(tokens)
        self._siblings += share(self.model, lambda: self._run(inputs))
        self._expected[frozenset(inputs)] = monitor.latest_call
        monitor.clear()

    def _run(self, inputs: dict[str, Tensor]) -> None:
        with suppress(EndOfPass):
            self._runner(**inputs, **self._options)

    def _unreached(self, task: str) -> str:
        targets = [module for module, own in self.installation.monitor.targets.items() if task in own]
        more = ", ..." if len(targets) > 3 else ""
        text = (
            f"task {task!r}: a batch reaches none of the task's target modules "
            f"({', '.join(targets[:3])}{more}); widen parameters.scope to modules that every batch reaches"
        )
        if any(tokens_of(module) == "other" for module in targets):
            text += ", or leave rows without images or sound out of its data"
        return text

    def _backward(self, loss: Tensor) -> float:
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
    levels: Mapping[str, float] | None = None,
    on_notice: Callable[[str], None] | None = None,
    checkpoints: Checkpoints | None = None,
    processes: Processes | None = None,
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
        levels: of the null-space ratio, see :class:`Driver`.
        on_notice: is told what the user should know.
        checkpoints, processes: see :func:`nsc_fast.loop.minimise`.

    Returns:
        Coefficients per module, the history, and whether the user interrupted the run (Ctrl-C): what was
        reached by then is returned.

    Raises:
        MergeError: data missing for a task, a loss that is not finite, batches that are empty or reach no
            target module of their task.
        ValueError: targets or modules that do not exist.
    """
    parameters = parameters or NSCParameters()
    check_data(adapters, data)
    check_positions(model, data)
    check_sharding(model, [m for own in adapters.values() for m in own], processes)
    sharded = is_sharded(model)
    targets = () if objective is not None else target_modules(model, adapters, parameters)
    experts = routed(dict.fromkeys(m for own in adapters.values() for m in own)) if targets else ()
    if experts and on_notice is not None:
        on_notice(
            f"{len(experts)} modules inside the experts of a mixture ({experts[0]}, ...) are merged, but do "
            "not enter the loss: which tokens are routed to them is not known"
        )
    # One seed for all: lists of equal length are shuffled alike, so that batches of like length, sorted
    # alike, meet in one forward pass with little padding.
    streams = {task: BatchStream(task, data[task], seed) for task in adapters}
    driver: Objective | None = None
    with restored(model):
        try:
            installation = install(
                model,
                adapters,
                targets=targets,
                granularity=parameters.granularity,
                init=parameters.init if init is None else init,
                preferences=parameters.preferences,
                impl=impl,
            )
            recompute = gathering = nullcontext()
            if objective is not None:
                driver = objective(model, installation)
            else:
                how = parameters.batching, dict(levels or {}), parameters.micro_batch, parameters.packing
                driver = Driver(model, installation, *how, on_notice)
                again, offload = parameters.recompute, parameters.offload
                recompute = checkpointed(model, installation.modules, again, offload=offload)
            if sharded:
                if not hasattr(driver, "in_step"):
                    raise MergeError(
                        f"{type(driver).__name__} cannot run on a sharded base model, for which an objective "
                        "has to keep its passes in step (in_step): leave the base whole"
                    )
                driver.in_step = InStep(processes, model_device(model))
                gathering = gathered(model, targets)
            with gathering, recompute:
                history, interrupted = minimise(driver, streams, parameters, on_step, checkpoints, processes)
            return installation.coefficients.by_module(), history, interrupted
        finally:
            remove(model)


@contextmanager
def restored(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode for a while; modes and ``requires_grad`` come back as they were."""
    frozen = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with evaluating(model, gradients=True):
            yield model
    finally:
        for parameter, wanted in frozen.items():
            parameter.requires_grad_(wanted)


def target_modules(
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


def check_data(adapters: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Whether every task has data, and nothing else has.

    Raises:
        MergeError: names the task.
    """
    if not adapters:
        raise MergeError("there is no adapter to merge")
    for task in adapters:
        if task not in data:
            raise MergeError(f"task {task!r} has no unlabeled data; give it some, or use a data-free method")
    unknown = [task for task in data if task not in adapters]
    if unknown:
        raise MergeError(f"data was given for {unknown[0]!r}, which is no adapter ({', '.join(adapters)})")
