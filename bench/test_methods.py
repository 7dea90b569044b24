"""Merging methods in their low-rank form against the dense form of the same rule, and what a module costs.

The dense forms grow as d^3, the low-rank ones as d R^2 with R the sum of the ranks, so the ratio grows as
d^2: a ratio at a small d is a lower bound of that at 4096. ``--size full`` times d = 4096 itself, which takes
the dense forms minutes a call.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nsc_fast import methods
from nsc_fast.adapters import LoraFactors
from nsc_fast.factors import LowRankUpdate, canonical
from nsc_fast.methods import MergeInputs

SHAPES = {  # name -> width, tasks, rank
    "smoke": {"256 K6 r4": (256, 6, 4)},
    "cpu": {"512 K6 r16": (512, 6, 16), "1024 K6 r16": (1024, 6, 16)},
    "full": {"1024 K6 r16": (1024, 6, 16), "4096 K6 r16": (4096, 6, 16)},
}
MODULES = {  # what one module costs: width, tasks, rank, and its growth in K and r
    "smoke": [(256, 3, 4), (256, 6, 4)],
    "cpu": [(4096, 6, 16), (4096, 3, 16), (4096, 6, 8), (1024, 6, 16)],
    "full": [(4096, 6, 16), (4096, 12, 16), (4096, 3, 16), (4096, 6, 32), (4096, 6, 8), (1024, 6, 16)],
}
LOW_RANK = (
    "task_arithmetic",
    "knots_ties",
    "knots_dare_ties",
    "core_space",
    "tsv",
    "iso_c",
    "iso_cts",
    "lore",
    "lego",
    "robust_merge",
)
DENSITY = 0.2
# What a method may need beside its inputs and its result, in dense float64 updates, at the width, tasks and
# rank of the goal.
EXTRA, GOAL = 1 / 20, (4096, 6, 16)


@pytest.fixture
def rounds(size: str) -> int:
    """Few: a dense form takes seconds to minutes."""
    return {"smoke": 3, "cpu": 3, "full": 2}[size]


@pytest.fixture(autouse=True)
def _one_thread():
    """A factorisation of a tall thin matrix gains nothing from threads, and loses much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _inputs(width: int, tasks: int, rank: int) -> MergeInputs:
    factors = {
        f"task{k}": {
            "module": LoraFactors(torch.randn(rank, width) / width**0.5, torch.randn(width, rank) * 0.02, 2.0)
        }
        for k in range(tasks)
    }
    updates = {
        task: {m: canonical(f.down, f.up, f.scaling) for m, f in own.items()} for task, own in factors.items()
    }
    return MergeInputs(updates=updates, factors=factors)


def _dense(inputs: MergeInputs) -> list[Tensor]:
    return [own["module"].dense() for own in inputs.updates.values()]


def _call(name: str, inputs: MergeInputs, **parameters: object) -> Callable[[], LowRankUpdate]:
    method = methods.get(name)
    chosen = method.parameters(**parameters)
    return lambda: method.run(inputs, chosen).updates["module"]


def dense_knots(updates: list[Tensor], scaling: float) -> Tensor:
    """As published: the decomposition of all updates side by side, then TIES on its right factor."""
    left, s, right = torch.linalg.svd(torch.cat(updates, dim=1), full_matrices=False)
    kept = s > 1e-10 * s[0]
    aligned = torch.stack((s[kept, None] * right[kept]).chunk(len(updates), dim=1))
    magnitude = aligned.abs().flatten(1)
    cut = magnitude.kthvalue(magnitude.shape[1] - int(magnitude.shape[1] * DENSITY), dim=1).values
    aligned = torch.where(aligned.abs() >= cut[:, None, None], aligned, 0.0)
    aligned = torch.where(aligned * aligned.sum(0).sign() > 0, aligned, 0.0)
    return scaling * left[:, kept] @ (aligned.sum(0) / (aligned != 0).sum(0).clamp(min=1))


def dense_tsv(updates: list[Tensor], rank: int) -> Tensor:
    """As published: the decomposition of every update, and two polar factors."""
    parts = [torch.linalg.svd(update, full_matrices=False) for update in updates]
    left = torch.cat([u[:, :rank] for u, _, _ in parts], dim=1)
    right = torch.cat([v[:rank] for _, _, v in parts])
    u, _, v = torch.linalg.svd(left, full_matrices=False)
    x, _, y = torch.linalg.svd(right, full_matrices=False)
    return u @ v * torch.cat([s[:rank] for _, s, _ in parts]) @ (x @ y)


def test_knots(compare, name, size) -> None:
    inputs = _inputs(*SHAPES[size][name])
    ours = _call("knots_ties", inputs, density=DENSITY, scaling=1.0)
    updates = _dense(inputs)
    _same(ours().dense(), dense_knots(updates, 1.0))
    compare(
        ours,
        {"dense SVD": lambda: dense_knots(updates, 1.0)},
        case=name,
        goals={"dense SVD": ">= 30 at d = 4096"},
    )


def test_tsv(compare, name, size) -> None:
    width, tasks, rank = SHAPES[size][name]
    inputs = _inputs(width, tasks, rank)
    ours = _call("core_space", inputs, rule="tsv")
    updates = _dense(inputs)
    _same(ours().dense(), dense_tsv(updates, rank))
    compare(
        ours,
        {"dense TSV-M": lambda: dense_tsv(updates, rank)},
        case=name,
        goals={"dense TSV-M": ">= 30 at d = 4096"},
    )


@pytest.mark.parametrize("method", LOW_RANK)
def test_one_module(benchmark, record, size, method) -> None:
    """Seconds and memory for one module; 224 modules of about this size make a model of 8B parameters."""
    for width, tasks, rank in MODULES[size]:
        inputs = _inputs(width, tasks, rank)
        run = _call(method, inputs)
        run()
        samples = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            samples.append(time.perf_counter() - start)
        case = f"d={width} K={tasks} r={rank}"
        seconds = sorted(samples)[1]
        record(case, method, 1e3 * seconds, f"ms a module; {224 * seconds:.0f} s for 224")
        dense = 8 * width * width
        share = _peak_bytes(run) / dense
        extra = share - _own_bytes(run()) / dense
        record(case, method, share, "peak memory with the result, in dense float64 updates")
        record(case, method, extra, "peak memory without the result, in dense float64 updates")
        benchmark.extra_info[case] = {
            "seconds": seconds,
            "peak share of a dense update": round(share, 4),
            "without the result": round(extra, 4),
        }
        assert extra < EXTRA or (width, tasks, rank) != GOAL
    benchmark.pedantic(run, rounds=1)


def _same(ours: Tensor, theirs: Tensor) -> None:
    """No speed is worth anything if the results differ."""
    assert (ours - theirs).abs().max() <= 1e-8 * theirs.abs().max()


def _own_bytes(update: LowRankUpdate) -> int:
    tensors = update.columns, update.basis, update.singular_values
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _peak_bytes(run: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        keep = run()
    del keep
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
