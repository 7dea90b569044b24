"""Times neighbours of a launch choice on this device and remembers the fastest. Only on request:

    from nsc_fast.kernels import tune, tuned

    for step in tuned.STEPS:
        print(tune.tune(step, rank=96, dim=4096))
    tuned.save("launches.json")          # later processes: NSC_FAST_TUNED=launches.json

A neighbour differs from the plain choice in one size: tokens per program, features per step, warps, stages
or the register limit. It counts only after its results, on inputs of its own, agree with the plain choice's;
one that does not compile, does not fit or does not agree is passed over, and the reason is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from . import coefficient_grads, expand, project, ratio_backward
from .launch import Launch, current_target, rank_bin
from .tuned import STEPS, Case, is_neighbour, remember

# A timing varies by a few percent from run to run: a neighbour must beat the plain choice by more.
MARGIN = 0.03
# Largest difference from the plain choice's result, relative to the largest value: the order of the float32
# sums, and one rounding of the result.
AGREEMENT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SEGMENTS, CLAMP = 4, 1e-6
# Characters kept of an error: some carry the whole program.
REASON = 300


@dataclass(frozen=True)
class Trial:
    """One choice: its time in milliseconds, or the reason why it does not count."""

    choice: Launch
    milliseconds: float | None
    reason: str = ""


@dataclass(frozen=True)
class Tuning:
    """Result for one case; ``trials[0]`` is the plain choice."""

    case: Case
    trials: tuple[Trial, ...]
    best: Launch

    def __str__(self) -> str:
        plain = self.trials[0]
        times = {trial.choice: trial.milliseconds for trial in self.trials}
        passed_over = sum(trial.milliseconds is None for trial in self.trials)
        kept = "kept" if self.best == plain.choice else f"replaced by {self.best}, {times[self.best]:.4g} ms"
        return (
            f"{self.case}: plain choice {plain.milliseconds:.4g} ms, {kept} "
            f"({len(self.trials)} tried, {passed_over} passed over)"
        )


def neighbours(plain: Launch) -> list[Launch]:
    """The choices that differ from ``plain`` in one size."""
    changes = [
        {"num_stages": plain.num_stages + 1},
        {"num_stages": plain.num_stages - 1},
        {"block_n": plain.block_n // 2},
        {"block_d": plain.block_d // 2},
        {"maxnreg": None},
    ]
    if plain.maxnreg is None:
        # Under a register limit, what needs more of them per thread spills or does not compile.
        changes += [
            {"num_warps": 12 - plain.num_warps},
            {"block_n": plain.block_n * 2},
            {"block_d": plain.block_d * 2},
        ]
    found = [replace(plain, **change) for change in changes]
    return [choice for choice in found if choice != plain and is_neighbour(choice, plain)]


def tune(
    step: str,
    rank: int,
    dim: int,
    *,
    tokens: int = 8192,
    dtype: torch.dtype = torch.bfloat16,
    precision: str = "ieee",
    device: str | torch.device = "cuda",
    timer: Callable[[Callable[[], object]], float] | None = None,
) -> Tuning:
    """Tries the neighbours of one step's plain choice, and remembers the fastest for this process.

    Args:
        step: one of ``tuned.STEPS``.
        rank, dim, tokens: sizes of the problem that is timed, R, d and N. The result is used for every rank
            of the same bin and for every d that is as well aligned.
        precision: "ieee" or "tf32", for float32.
        timer: milliseconds of a call; Triton's ``do_bench`` (median) if None.

    Raises:
        ValueError: an unknown step, or a device on which nothing can be timed.
        Exception: whatever the plain choice raises when it cannot run.
    """
    device = torch.device(device)
    if step not in STEPS:
        raise ValueError(f"step is {step!r}; choose one of {', '.join(STEPS)}")
    if timer is None:
        if device.type == "cpu":
            raise ValueError("launch choices are timed on a GPU; device is cpu")
        timer = _median
    name, target = str(dtype).removeprefix("torch."), current_target(device)
    case = Case(step, rank_bin(rank), name, target, dim % 16 == 0, precision)
    plain = case.plain()

    def problem(seed: int) -> Callable[[Launch], tuple[Tensor, ...]]:
        return _problem(step, rank, dim, tokens, dtype, precision, device, seed)

    run = problem(0)
    run(plain)
    trials = [Trial(plain, timer(lambda: run(plain)))]
    for seed, choice in enumerate(neighbours(plain), 1):
        trials.append(_try(choice, plain, problem(seed), timer))
    fastest = min((t for t in trials if t.milliseconds is not None), key=lambda t: t.milliseconds)
    worth_it = fastest.milliseconds < (1 - MARGIN) * trials[0].milliseconds
    best = fastest.choice if worth_it else plain
    remember(case, best)
    return Tuning(case, tuple(trials), best)


def _try(choice: Launch, plain: Launch, run: Callable, timer: Callable) -> Trial:
    # Inputs of its own: memory that still holds the right numbers of an earlier run cannot pass for a result.
    expected = run(plain)
    try:
        reason = _disagreement(run(choice), expected)
        return Trial(choice, None, reason) if reason else Trial(choice, timer(lambda: run(choice)))
    # Compilers and drivers raise anything at all; what they raised is the reason.
    except Exception as error:  # noqa: BLE001
        return Trial(choice, None, f"{type(error).__name__}: {str(error).strip()[:REASON]}")


def _disagreement(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str:
    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        scale = float(other.abs().max())
        error = float((one.double() - other.double()).abs().max()) / max(scale, 1e-30)
        limit = AGREEMENT[one.dtype]
        if not error <= limit:  # NaN is no agreement
            return f"result {number} differs from the plain choice's by {error:.1e}, more than {limit:.1e}"
    return ""


def _median(call: Callable[[], object]) -> float:
    return triton.testing.do_bench(call, return_mode="median")


def _problem(
    step: str,
    rank: int,
    dim: int,
    tokens: int,
    dtype: torch.dtype,
    precision: str,
    device: torch.device,
    seed: int,
) -> Callable[[Launch], tuple[Tensor, ...]]:
    """A merge over SEGMENTS adapters, as a function of the launch choice alone."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    z, q = draw(tokens, dim).to(dtype), (draw(rank, dim) / dim**0.5).to(dtype)
    p, c_mat, coef = draw(tokens, rank).to(dtype), draw(dim, rank).to(dtype), draw(rank)
    norm2, a, omega = z.float().square().sum(1), draw(tokens), draw(tokens).sigmoid()
    segment = (torch.arange(rank, device=device) * SEGMENTS // rank).to(torch.int32)
    task = (torch.arange(tokens, device=device) % SEGMENTS).to(torch.int32)
    own = {"task": task, "clamp": CLAMP}

    def run(choice: Launch) -> tuple[Tensor, ...]:
        how = {"precision": precision, "choice": choice}
        if step == "project":
            made = project.project(z, q, segment, SEGMENTS, **own, **how)
            return made.p, made.norm2, made.omega
        if step == "low_rank_input":
            return (project.low_rank_input(z, q, **how),)
        if step == "coefficient_grads":
            ratio = {"a": a, "omega": omega, "norm2": norm2, "segment": segment, "num_segments": SEGMENTS}
            made = coefficient_grads.coefficient_grads(z, c_mat, p, coef, **ratio, **own, **how)
            return tuple(made)
        if step == "input_gradient":
            return (expand.input_gradient(p, q, row_scale=a, z=z, **how),)
        if step == "low_rank_output":
            return (expand.low_rank_output(p, c_mat, coef, **how),)
        return (ratio_backward.ratio_backward(z, q, p, norm2, omega, a, segment, SEGMENTS, **own, **how),)

    return run
