"""Several merges, judged without labels on rows that none of them was fitted to; the best one is returned.

A merge is judged by how far its last states are from those of each adapter alone on the adapter's own task
(:mod:`nsc_fast.objectives.score`). Candidates that need no data are there at several settings, so that the
result is, by that score, never behind them; the others are fitted to the remaining rows.

A fitted merge lowers the very distance it is judged by, so that at equal distance it is worth less than one
that was not fitted. It is chosen only where it is clearly nearer than every merge that needs no data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import Field, field_validator

from ..batches import Batch, rows
from ..driver import check_data
from ..errors import MergeError
from ..objectives.anchors import Anchors, anchors
from ..objectives.least_squares import second_moments
from ..objectives.score import Score, held_out, score
from ..parameters import Memory
from ..result import MergeResult
from . import anchored, closed_form
from .base import MergeInputs, Method, modules_of, require_model_and_data
from .measured import sampled, with_signal


class Parameters(Memory):
    """
    Attributes:
        rows: unlabeled rows of every task; a quarter of them is held out.
        data_free: methods without data that compete, with their published defaults.
        scales: coefficients of task arithmetic that compete.
        closed_form_scales: of the closed form; empty to leave it out.
        anchored_steps: of anchored merging, which starts from the best of ``scales``; 0 to leave it out.
        anchored_rate: its learning rate.
        anchored_waypoints: whether it compares the states between the blocks, too.
        margin: a fitted merge may be chosen where its value is at most so many times the lowest value of a
            merge that needs no data.
        signal_rows: rows of every task on which the null-space signal is measured (``nsc_fast.signal``), for
            the report alone; 0 for no measurement.
    """

    rows: int = Field(256, ge=2)
    data_free: tuple[str, ...] = ("iso_c", "tsv", "knots_ties")
    scales: tuple[float, ...] = Field((0.2, 0.3, 0.4, 0.5, 0.7), min_length=1)
    closed_form_scales: tuple[float, ...] = (1.0, 1.3, 1.6)
    anchored_steps: int = Field(200, ge=0)
    anchored_rate: float = Field(1e-2, gt=0)
    anchored_waypoints: bool = True
    margin: float = Field(0.8, ge=0)
    signal_rows: int = Field(32, ge=0)

    @field_validator("data_free")
    @classmethod
    def _without_data(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        from . import get

        for name in value:
            method = get(name)
            if method.needs_data or not method.one_model:
                raise ValueError(f"{name!r} is no method that gives one merge without data")
        return value


@dataclass(frozen=True)
class _Judged:
    """A candidate's score."""

    label: str
    score: Score
    fitted: bool

    def eligible(self, limit: float) -> bool:
        """Whether it may be chosen."""
        return not self.fitted or _value(self) <= limit


def run(inputs: MergeInputs, parameters: Parameters) -> MergeResult:
    require_model_and_data("auto", inputs)
    check_data(inputs.updates, inputs.data)
    modules_of(inputs)
    if inputs.weights:
        raise MergeError(
            "method 'auto' finds the coefficients itself: leave the weights out, or choose a method that "
            "takes them, such as 'anchored'"
        )
    batches, inputs = sampled(inputs, parameters.rows)
    try:
        fitted, kept = held_out(batches)
    except ValueError as error:
        raise MergeError(str(error)) from error
    micro = parameters.micro_batch
    judge = _Judge(inputs, anchors(inputs.model, inputs.updates, kept, micro_batch=micro), micro)
    for name, own in _candidates(inputs, parameters):
        judge.add(name, own)
    scales = {_arithmetic(scale): scale for scale in parameters.scales}
    start = min((one for one in judge.judged if one.label in scales), key=_value).label
    if parameters.closed_form_scales:
        moments = second_moments(inputs.model, inputs.updates, fitted, micro_batch=micro)
        for scale in parameters.closed_form_scales:
            chosen = closed_form.Parameters(scale=scale, rows=parameters.rows)
            judge.add(
                f"closed_form {scale:g}", lambda c=chosen: closed_form.solve(inputs, moments, c), fitted=True
            )
    anchoring = 0
    if parameters.anchored_steps:
        chosen = anchored.Parameters(
            rows=parameters.rows,
            steps=parameters.anchored_steps,
            learning_rate=parameters.anchored_rate,
            waypoints=parameters.anchored_waypoints,
            init=scales[start],
            **{name: getattr(parameters, name) for name in Memory.model_fields},
        )
        fixed = anchors(inputs.model, inputs.updates, fitted, micro_batch=micro, waypoints=chosen.waypoints)
        judge.add(f"anchored from {start}", lambda: anchored.fit(inputs, fixed, chosen), fitted=True)
        # Anchors, and the base model and each adapter over the rows that show the directions on the way.
        anchoring = 2 * sum(own.rows + own.sampled for own in fixed.values())
    result = _finished(parameters, judge, _cost(parameters, judge, fitted, anchoring))
    return with_signal(inputs, result, scales[start], parameters.signal_rows, micro)


def _candidates(inputs: MergeInputs, parameters: Parameters) -> list[tuple[str, Callable[[], MergeResult]]]:
    """Those without data."""
    from . import get

    out: list[tuple[str, Callable[[], MergeResult]]] = []
    arithmetic = get("task_arithmetic")
    for scale in parameters.scales:
        chosen = arithmetic.parameters(scaling=scale)
        out.append((_arithmetic(scale), lambda c=chosen: arithmetic.run(inputs, c)))
    for name in parameters.data_free:
        method = get(name)
        out.append((name, lambda m=method: m.run(inputs, m.parameters())))
    return out


def _arithmetic(scale: float) -> str:
    return f"task_arithmetic {scale:g}"


@dataclass
class _Judge:
    """Makes candidates and keeps what they are worth.

    Of those with data and of those without, the nearest is kept: a merge of a large model takes gigabytes.
    """

    inputs: MergeInputs
    fixed: Mapping[str, Anchors]
    micro_batch: int | None

    def __post_init__(self) -> None:
        self.judged: list[_Judged] = []
        self.nearest: dict[bool, tuple[_Judged, MergeResult]] = {}
        self.steps = 0

    def add(self, label: str, make: Callable[[], MergeResult], *, fitted: bool = False) -> None:
        result = make()
        found = score(self.inputs.model, result.updates, self.fixed, micro_batch=self.micro_batch)
        if self.inputs.processes is not None:
            # They may differ in the last bits where the devices do, and all have to choose alike.
            found = self.inputs.processes.gather(found)[0]
        one = _Judged(label, found, fitted)
        self.judged.append(one)
        self.steps += len(result.history)
        if fitted not in self.nearest or _value(one) < _value(self.nearest[fitted][0]):
            self.nearest[fitted] = one, result


def _value(one: _Judged) -> float:
    """What is compared; a merge under which states overflow comes last."""
    return one.score.value if math.isfinite(one.score.value) else math.inf


def _cost(
    parameters: Parameters, judge: _Judge, fitted: Mapping[str, Sequence[Batch]], anchoring: int
) -> str:
    """What was run, in rows of all tasks together; ``anchoring``: for the anchors of the fitted rows."""
    kept = sum(own.rows for own in judge.fixed.values())
    # Base model and adapter alone on the held-out rows, then each candidate.
    forward = (2 + len(judge.judged)) * kept + anchoring
    if parameters.closed_form_scales:
        forward += sum(rows(batch) for own in fitted.values() for batch in own)
    told = f", and {judge.steps} optimisation steps" if parameters.anchored_steps else ""
    return f"{forward} rows forward{told}"


def _finished(parameters: Parameters, judge: _Judge, cost: str) -> MergeResult:
    """The best candidate, with the reasons."""
    ranked = sorted(judge.judged, key=_value)
    limit = parameters.margin * min(_value(one) for one in ranked if not one.fitted)
    best = next(one for one in ranked if one.eligible(limit))
    # All of its kind are eligible or none but nearer ones: it is the nearest of its kind.
    _, result = judge.nearest[best.fitted]
    held = ", ".join(f"{task} {own.rows}" for task, own in judge.fixed.items())
    notices = (
        f"auto chose {best.label} among {len(ranked)} merges. Distance to each adapter alone on held-out "
        f"rows ({held}), 1 is the base model; ordered by half the mean and half the worst:\n"
        f"{_table(ranked, limit)}\n  cost: {cost}",
    )
    return replace(
        result,
        method="auto",
        parameters=parameters.model_dump(mode="json"),
        notices=(*result.notices, *notices),
    )


def _table(ranked: list[_Judged], limit: float) -> str:
    """One line a candidate, best first."""
    lines = [
        f"  {one.label}: {one.score.value:.3f} (mean {one.score.mean:.3f}, "
        + ", ".join(f"{task} {value:.3f}" for task, value in one.score.distances.items())
        + ")"
        + ("" if one.eligible(limit) else f"; not chosen: fitted, and above {limit:.3f}")
        for one in ranked
    ]
    return "\n".join(lines)


METHOD = Method(
    name="auto",
    parameters=Parameters,
    run=run,
    needs_data=True,
    paper="choice among the other methods by agreement with the adapters alone, without labels",
    output_rank="that of the chosen candidate, sum of ranks at most for most",
    cost="that of 'anchored', and one forward pass over a quarter of the rows for each candidate",
    sharded_base=True,
)
