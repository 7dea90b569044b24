"""What a merge will need of memory and time, from configs and headers alone, and what fits into a budget."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from .errors import MergeError
from .footprint import FakeMerge, Footprint, Objective
from .memory import Recompute, readable_bytes
from .objectives.metric import COLUMNS
from .objectives.waypoints import DIRECTIONS
from .recipe import Recipe
from .soap import SQUARE
from .workload import Workload, workload

__all__ = ["RESERVE", "Choice", "Need", "Plan", "make_plan"]

RESERVE = 10**9
"""Bytes left for what is not counted: the accelerator's context, its libraries, gaps between tensors, idle
memory."""

_WAYS: tuple[tuple[Recompute, bool], ...] = (
    ("never", False),
    ("feed_forward", False),
    ("always", False),
    ("always", True),
)
_ENDLESS = 1 << 24
"""Tokens that no row has."""


@dataclass(frozen=True)
class Choice:
    """How the batches go through the model.

    Attributes:
        recompute: see ``checkpointing`` of :class:`nsc_fast.parameters.Memory`.
        offload: what checkpointed blocks keep waits on the host.
        micro_batch: rows of each task in a pass.
        together: whether all tasks go through the model in one pass.
    """

    recompute: Recompute = "never"
    offload: bool = False
    micro_batch: int = 1
    together: bool = False

    def settings(self, objective: Objective = "ratio") -> dict[str, object]:
        """The same as parameters of a method, see :class:`nsc_fast.parameters.Memory`."""
        if objective == "moments":
            return {"micro_batch": self.micro_batch}
        batching = {} if self.together else {"batching": "never"}
        more = {"checkpointing": self.recompute, "offload": self.offload, "micro_batch": self.micro_batch}
        return {**more, **batching}

    def __str__(self) -> str:
        rows = f"{self.micro_batch} sequence{'s' * (self.micro_batch > 1)} of "
        rows += "each task in a pass" if self.together else "one task in a pass"
        offload = ", their inputs on the host" if self.offload else ""
        kept = {"never": "no part", "feed_forward": "feed-forward parts", "always": "blocks"}[self.recompute]
        return f"{rows}, {kept} computed again{offload}"


@dataclass(frozen=True)
class Need:
    """Bytes at the peak, and time.

    Attributes:
        device: on the accelerator: weights, factors, activations and :data:`RESERVE`.
        host: in the host's memory: the base model while it is loaded, adapters and their canonical factors,
            and what is offloaded. On a CPU everything is here, and ``device`` is the same number.
        time: of a step, in forward passes of the base model over the same tokens, by operations.
    """

    device: int
    host: int
    time: float


class _Costs:
    """Bytes and operations of any pass.

    What a pass needs is no simple function of its tokens: half precision is lifted in blocks of so many, and
    the peak wanders. To count a pass takes seconds at most, so that each is counted as it is; only
    lengths between the recipe's own, its doubles and its halves are interpolated, and those beyond the
    positions of the model are on a line.
    """

    def __init__(self, work: Workload) -> None:
        # All before the skeleton is taken apart.
        self.work, self.factors, self.limit = work, work.factor_numbers, work.limit
        self.moments = work.moments
        self.state_bytes = next(work.skeleton.parameters()).element_size()
        self._fake = FakeMerge(
            work.skeleton,
            work.ranks,
            work.targets,
            work.granularity,
            objective=work.objective,
            inputs=work.inputs,
        )
        self.text = bool(work.inputs.tokens)
        self._own = max(work.length, 1)
        doubled = [self._own << k for k in range(_ENDLESS.bit_length())]
        limit = max(self.limit or _ENDLESS, self._own)
        halved = [self._own >> k for k in range(1, self._own.bit_length())]
        self._lengths = [*sorted(halved), *(n for n in doubled if n < limit), limit]
        width, entries = self._fake.state_shape(work.length) if work.anchors else (0, 0)
        self.states = len(work.ranks) * work.anchors * entries
        columns = work.waypoints * min(DIRECTIONS, 2 * width)
        # Of a row, and of all tasks; in float32.
        self.way = 4 * columns * entries // max(width, 1)
        self.constants = 4 * len(work.ranks) * width * (2 * min(COLUMNS, width) + columns)
        self._runs: dict[tuple[int, int, Recompute], Footprint] = {}
        self._base: dict[int, int] = {}

    def run(self, rows: int, length: int, recompute: Recompute) -> Footprint:
        """Counts of a pass; a row alone has no padding."""
        key = rows, length if self.text else 0, recompute
        if key not in self._runs:
            self._runs[key] = self._fake.run(*key, masked=rows > 1)
        return self._runs[key]

    def of(self, name: str, recompute: Recompute, rows: int, length: int) -> float:
        """Bytes of ``rows`` rows of ``length`` tokens; ``name``: "peak" or "inputs"."""
        place = bisect_left(self._lengths, length)
        if not self.text or length in self._lengths[place : place + 1]:
            return getattr(self.run(rows, length, recompute), name)
        if place == len(self._lengths):
            # Beyond the positions, one row alone: no attention keeps its length squared.
            near = self._lengths[-2:]
        else:
            # The two lengths around it and the one before.
            near = self._lengths[max(place - 2, 0) : max(place, 2) + 1]
        return _between([(n, getattr(self.run(rows, n, recompute), name)) for n in near], length)

    def time(self, recompute: Recompute, rows: int) -> float:
        """Operations of a step, in forward passes of the base model."""
        few = min(rows, 2)
        if few not in self._base:
            self._base[few] = self._fake.base_flops(few, self.work.length, masked=few > 1)
        return self.run(rows, self.work.length, recompute).flops * few / (self._base[few] * rows)


def _between(points: Sequence[tuple[int, float]], length: int) -> float:
    """Value at ``length`` on the line through the last two of three points, bent as the three are.

    They are not bent downward, which is how blocks of a fixed size look from afar. Two points are a line.
    """
    (middle, between), (end, last) = points[-2:]
    slope = (last - between) / (end - middle)
    bend = 0.0
    if len(points) == 3:
        (x, y), *_ = points
        bend = max((slope - (between - y) / (middle - x)) / (end - x), 0.0)
    return between + slope * (length - middle) + bend * (length - middle) * (length - end)


class Plan:
    """What each choice needs, and the first that fits.

    Args:
        work: the merge.
        budget: bytes of the device.
        device: type of the device; on "cpu" the host's memory is the device's.
    """

    def __init__(self, work: Workload, budget: int, device: str = "cuda") -> None:
        self.work, self.budget, self.device = work, budget, device
        self._costs = _Costs(work)
        self.limit = self._costs.limit
        self._refused: set[Recompute] = set()

    def choices(self) -> Iterator[Choice]:
        """All choices, the quickest first."""
        for way in self._ways():
            yield from self._choices(*way)

    def _choices(self, recompute: Recompute, offload: bool) -> list[Choice]:
        """Those of one way to compute again, from the largest need to the smallest."""
        joined = len(self.work.ranks) > 1 and self.work.alike and self.work.objective != "moments"
        own = [Choice(recompute, offload, rows, joined) for rows in self._sizes]
        return [*own, Choice(recompute, offload, self._sizes[-1], False)] if joined else own

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        """Rows of each task in a pass, the most first."""
        rows = self.work.rows
        if not self.work.inputs.divisible:
            return (rows,)
        return tuple(dict.fromkeys(max(rows >> k, 1) for k in range(rows.bit_length())))

    def _ways(self) -> Iterator[tuple[Recompute, bool]]:
        for recompute, offload in _WAYS if self.work.objective != "moments" else _WAYS[:1]:
            if self.device == "cpu" and offload:
                continue
            if recompute not in self._refused:
                try:
                    self._costs.run(1, self.work.length, recompute)
                except MergeError:
                    if recompute == "never":
                        raise
                    # This model has no such part.
                    self._refused.add(recompute)
                    continue
                yield recompute, offload

    def need(self, choice: Choice, length: int | None = None) -> Need:
        """Of a choice, with rows of ``length`` tokens."""
        length = length or self.work.length
        rows = choice.micro_batch * (len(self.work.ranks) if choice.together else 1)
        active, offloaded = self._active(choice, rows, length)
        # Canonical factors in float64, once more stacked, and those of finished merges.
        canonical = (16 + 8 * self.work.merges) * self._costs.factors
        kept = self.work.adapter_bytes + self.work.data_bytes
        kept += self._costs.states * self._costs.state_bytes
        kept += len(self.work.ranks) * self.work.anchors * self._costs.way
        if self.work.merges:
            # Methods that finish merges beside their own work take them from second moments.
            kept += self._costs.moments[1]
        host = kept + max(self.work.weight_bytes, canonical) + offloaded
        device = self.fixed + active
        if self.device == "cpu":
            device = host = device + kept + canonical
        return Need(int(device), int(host), self._costs.time(choice.recompute, rows))

    @property
    def fixed(self) -> int:
        """Bytes on the device that no choice changes: weights, factors in float32, the reserve.

        And cores with their gradients and the optimiser's state, and of every task the metrics of two views
        of the states and the directions of the waypoints. For second moments, the factors of one task at a
        time and its sums.
        """
        costs = self._costs
        factors = costs.moments[0] if self.work.objective == "moments" else 4 * costs.factors
        more = 4 * SQUARE * self.work.core_numbers + costs.constants
        return self.work.weight_bytes + factors + more + RESERVE

    def _active(self, choice: Choice, rows: int, length: int) -> tuple[float, float]:
        peak = self._costs.of("peak", choice.recompute, rows, length)
        # Until the backward pass, each token's distances to its anchor on the way.
        peak += rows * self._costs.way * (length / self.work.length if self.work.length else 1)
        if not choice.offload:
            return peak, 0.0
        inputs = self._costs.of("inputs", choice.recompute, rows, length)
        counted = self._costs.run(1, self.work.length, choice.recompute)
        blocks = sum(count for count, _ in counted.blocks.values())
        # Two are on the device: the one that is worked on and the next on its way.
        return peak - inputs * max(blocks - 2, 0) / blocks, inputs

    def longest(self, recompute: Recompute, offload: bool) -> int | None:
        """Tokens of the longest row that fits when one goes through the model at a time; 0 for none.

        None where rows have no tokens that there could be more of.
        """
        if not self._costs.text:
            return None

        def fits(length: int) -> bool:
            return self.need(Choice(recompute, offload), length).device <= self.budget

        # With images, a row has their tokens at least.
        least, low = max(self.work.inputs.image_tokens, 1), self.work.length
        while low > least and not fits(low):
            low = max(low // 2, least)
        if not fits(low):
            return 0
        high = 2 * low
        while high < _ENDLESS and fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _fitting(self, choices: Sequence[Choice]) -> Choice | None:
        """The first that fits of choices that need less and less."""
        place = bisect_left(choices, True, key=lambda choice: self.need(choice).device <= self.budget)
        return choices[place] if place < len(choices) else None

    @cached_property
    def chosen(self) -> Choice:
        """The quickest choice within the budget.

        Raises:
            MergeError: none is; says what the smallest need is.
        """
        last = []
        for way in self._ways():
            own = self._choices(*way)
            if (found := self._fitting(own)) is not None:
                return found
            last.append(own[-1])
        choice = min(last, key=lambda one: self.need(one).device)
        need = self.need(choice).device
        size = f", {self.work.length} tokens" if self._costs.text else ""
        shorter = f"set data.max_length below {self.work.length}"
        smaller = "set a smaller data.batch_size"
        ways = [shorter] * self._costs.text + [smaller] * (not self.work.inputs.divisible)
        raise MergeError(
            f"nothing fits into {readable_bytes(self.budget)}: the smallest need is {readable_bytes(need)} "
            f"({choice}{size}), of which {readable_bytes(self.work.weight_bytes)} are the base model. Give "
            f"more memory{''.join(f', {way}' for way in ways)}, or load the base in a smaller dtype"
        )

    @property
    def unit(self) -> str:
        """What bytes of a block are told of."""
        return "token" if self._costs.text else "row"

    def blocks(self, recompute: Recompute) -> dict[str, tuple[int, float]]:
        """Kind of block, named by its first -> (how many, bytes that one keeps of a :attr:`unit`)."""
        if self.work.objective == "moments":
            return {}
        blocks = self._costs.run(1, self.work.length, recompute).blocks
        return {name: (count, size / max(self.work.length, 1)) for name, (count, size) in blocks.items()}

    def table(self) -> list[tuple[Choice, Need, int | None]]:
        """One choice for each way to compute again: the largest that fits, or the smallest there is."""
        out = []
        for way in self._ways():
            own = self._choices(*way)
            choice = self._fitting(own) or own[-1]
            out.append((choice, self.need(choice), self.longest(*way)))
        return out


def make_plan(recipe: Recipe, budget: int, device: str = "cuda") -> Plan:
    """The plan of a recipe; no weight is read.

    Raises:
        MergeError: a method whose memory is not planned, or a sequence longer than the model's positions.
        AdapterError: an adapter that cannot be read.
    """
    return Plan(workload(recipe), budget, device)
