"""What a merge will need of memory and time, from configs and headers alone, and what fits into a budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from .errors import MergeError
from .footprint import FakeMerge, Footprint
from .memory import Recompute, readable_bytes
from .recipe import Recipe
from .workload import Workload, workload

__all__ = ["RESERVE", "Choice", "Need", "Plan", "make_plan"]

RESERVE = 10**9
"""Bytes left for what is not counted: the accelerator's context, its libraries and gaps between tensors."""

_WAYS: tuple[tuple[Recompute, bool], ...] = (
    ("never", False),
    ("feed_forward", False),
    ("always", False),
    ("always", True),
)
# What is counted: so many sequences, of so many tokens and of half as many.
_ROWS, _LENGTH = 2, 2048


@dataclass(frozen=True)
class Choice:
    """How the batches go through the model.

    Attributes:
        recompute: see ``checkpointing`` of :class:`nsc_fast.parameters.Memory`.
        offload: what checkpointed blocks keep waits on the host.
        micro_batch: sequences of each task in a pass.
        together: whether all tasks go through the model in one pass.
    """

    recompute: Recompute = "never"
    offload: bool = False
    micro_batch: int = 1
    together: bool = False

    def settings(self) -> dict[str, object]:
        """The same as parameters of a method, see :class:`nsc_fast.parameters.Memory`."""
        batching = {} if self.together else {"batching": "never"}
        more = {"checkpointing": self.recompute, "offload": self.offload, "micro_batch": self.micro_batch}
        return {**more, **batching}

    def __str__(self) -> str:
        rows = f"{self.micro_batch} sequence{'s' * (self.micro_batch > 1)} of "
        rows += "each task in a pass" if self.together else "one task in a pass"
        offload = ", their inputs on the host" if self.offload else ""
        kept = {"never": "nothing", "feed_forward": "feed-forward parts", "always": "blocks"}[self.recompute]
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
    """Bytes and operations of any pass, from counts of two: they grow with the tokens and tokens x length."""

    def __init__(self, work: Workload) -> None:
        # Both before the skeleton is taken apart.
        self.work, self.factors, self.limit = work, work.factor_numbers, work.limit
        longest = min(_LENGTH, self.limit or _LENGTH)
        self.lengths = max(longest // 2, 1), max(longest, 2)
        self.states = work.state_numbers if work.anchors else (0, 0)
        self.state_bytes = next(work.skeleton.parameters()).element_size()
        self._fake = FakeMerge(work.skeleton, work.ranks, work.targets, work.granularity)
        self._counted: dict[tuple[Recompute, bool], tuple[Footprint, Footprint]] = {}
        self._base: dict[bool, int] = {}

    def counted(self, recompute: Recompute, masked: bool) -> tuple[Footprint, Footprint]:
        key = recompute, masked
        if key not in self._counted:
            self._counted[key] = tuple(
                self._fake.run(_ROWS, length, recompute, masked=masked) for length in self.lengths
            )
        return self._counted[key]

    def activations(self, recompute: Recompute, masked: bool, name: str) -> tuple[float, float]:
        """Bytes a token, and a token and position; ``name``: "kept", "peak" or "inputs"."""
        small, large = (
            getattr(f, name) / (_ROWS * n)
            for f, n in zip(self.counted(recompute, masked), self.lengths, strict=True)
        )
        growth = max((large - small) / (self.lengths[1] - self.lengths[0]), 0.0)
        return large - growth * self.lengths[1], growth

    def time(self, recompute: Recompute, masked: bool) -> float:
        if masked not in self._base:
            self._base[masked] = self._fake.base_flops(_ROWS, self.lengths[1], masked=masked)
        return self.counted(recompute, masked)[1].flops / self._base[masked]


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
        for recompute, offload in self._ways():
            rows = self.work.rows
            while len(self.work.ranks) > 1 and rows > 1:
                yield Choice(recompute, offload, rows, True)
                rows //= 2
            if len(self.work.ranks) > 1:
                yield Choice(recompute, offload, 1, True)
            yield Choice(recompute, offload, 1, False)

    def _ways(self) -> Iterator[tuple[Recompute, bool]]:
        for recompute, offload in _WAYS:
            if self.device == "cpu" and offload:
                continue
            if recompute not in self._refused:
                try:
                    self._costs.counted(recompute, False)
                except MergeError:
                    if recompute == "never":
                        raise
                    # This model has no such part.
                    self._refused.add(recompute)
                    continue
                yield recompute, offload

    def need(self, choice: Choice, length: int | None = None) -> Need:
        """Of a choice, with sequences of ``length`` tokens."""
        length = length or self.work.length
        rows = choice.micro_batch * (len(self.work.ranks) if choice.together else 1)
        active, offloaded = self._active(choice, rows, length)
        fixed, factors = self.fixed, self._costs.factors
        # Canonical factors in float64, once more stacked, and those of finished merges.
        canonical = (16 + 8 * self.work.merges) * factors
        anchors = self._costs.states[1] * self._costs.state_bytes
        host = self.work.adapter_bytes + max(self.work.weight_bytes, canonical) + anchors + offloaded
        device = fixed + active
        if self.device == "cpu":
            device = host = device + self.work.adapter_bytes + canonical + anchors
        return Need(int(device), int(host), self._costs.time(choice.recompute, rows > 1))

    @property
    def fixed(self) -> int:
        """Bytes on the device that no choice changes: weights, factors in float32, the reserve.

        And cores with their gradients and the optimiser's moments, and the metric of two views of the states.
        """
        more = 16 * self.work.core_numbers + 2 * 4 * self._costs.states[0] ** 2
        return self.work.weight_bytes + 4 * self._costs.factors + more + RESERVE

    def _active(self, choice: Choice, rows: int, length: int) -> tuple[float, float]:
        tokens, masked = rows * length, rows > 1
        each, growing = self._costs.activations(choice.recompute, masked, "peak")
        peak = tokens * (each + growing * length)
        if not choice.offload:
            return peak, 0.0
        inputs, _ = self._costs.activations(choice.recompute, masked, "inputs")
        blocks = sum(count for count, _ in self._costs.counted(choice.recompute, masked)[0].blocks.values())
        # Two are on the device: the one that is worked on and the next on its way.
        return peak - tokens * inputs * max(blocks - 2, 0) / blocks, tokens * inputs

    def longest(self, recompute: Recompute, offload: bool) -> int:
        """Tokens of the longest sequence that fits when one goes through the model at a time; 0 for none."""
        low, high = 0, 1 << 24
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.need(Choice(recompute, offload), middle).device <= self.budget
            low, high = (middle, high) if fits else (low, middle)
        return low

    @cached_property
    def chosen(self) -> Choice:
        """The quickest choice within the budget.

        Raises:
            MergeError: none is; says what the smallest need is.
        """
        best: tuple[int, Choice] | None = None
        for choice in self.choices():
            need = self.need(choice).device
            if need <= self.budget:
                return choice
            if best is None or need < best[0]:
                best = need, choice
        need, choice = best
        raise MergeError(
            f"nothing fits into {readable_bytes(self.budget)}: the smallest need is {readable_bytes(need)} "
            f"({choice}, {self.work.length} tokens), of which {readable_bytes(self.work.weight_bytes)} are "
            "the base model. Give more memory, load the base in a smaller dtype, or set data.max_length "
            f"below {self.work.length}"
        )

    def blocks(self, recompute: Recompute) -> dict[str, tuple[int, float]]:
        """Kind of block, named by its first -> (how many, bytes that one keeps of a token)."""
        counted = self._costs.counted(recompute, False)[1]
        tokens = _ROWS * self._costs.lengths[1]
        return {name: (count, size / tokens) for name, (count, size) in counted.blocks.items()}

    def table(self) -> list[tuple[Choice, Need, int]]:
        """One choice for each way to compute again: the largest that fits, or the smallest there is."""
        out = []
        for way in self._ways():
            own = [c for c in self.choices() if (c.recompute, c.offload) == way]
            fitting = [c for c in own if self.need(c).device <= self.budget]
            choice = (fitting or own[-1:])[0]
            out.append((choice, self.need(choice), self.longest(*way)))
        return out


def make_plan(recipe: Recipe, budget: int, device: str = "cuda") -> Plan:
    """The plan of a recipe; no weight is read.

    Raises:
        MergeError: a method whose memory is not planned, or a sequence longer than the model's positions.
        AdapterError: an adapter that cannot be read.
    """
    return Plan(workload(recipe), budget, device)
