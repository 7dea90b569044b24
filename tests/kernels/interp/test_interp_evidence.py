"""What the access checker proves: bounds, no races, any program order, and the bytes that move.

Inputs are ragged on purpose (a missing mask cannot show on exact sizes), and views of larger matrices, so an
access outside a view but inside its storage is caught as well.
"""

import kernel_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interp_support import DTYPES, TARGETS, basis, checked, close, ids, needs_checker, segments
from nsc_fast.kernels.coefficient_grads import coefficient_grads
from nsc_fast.kernels.expand import expand, input_gradient, low_rank_output
from nsc_fast.kernels.launch import expand_choice, project_choice
from nsc_fast.kernels.project import project
from nsc_fast.kernels.ratio_backward import ratio_backward

CLAMP = 1e-6


def whole_path(n, d, ranks, siblings, dtype, target, by_task, shuffle=None, seed=0):
    """Every kernel once, on views with row strides of their own; the outputs by name."""
    g = torch.Generator().manual_seed(seed)
    count, rank, tasks = len(ranks), sum(ranks), len(ranks) // siblings
    wide = torch.randn(2 * n, d + 5, generator=g).to(dtype)
    z, upstream = wide[:n, 2 : d + 2], wide[n:, 1 : d + 1]
    z[n // 2] = 0
    q, segment = basis(ranks, d, dtype, seed), segments(ranks)
    c_mat = torch.randn(d, rank + 3, generator=g).to(dtype)[:, :rank]
    coef, weight = torch.rand(rank, generator=g), torch.rand(n, generator=g)
    how = {"clamp": CLAMP}
    if by_task:
        task = torch.randint(-1, tasks, (n,), generator=g, dtype=torch.int32)
        how.update(task=task, siblings=siblings)
    a = torch.randn(n, siblings if by_task else count, generator=g)
    wide_choice = {k: project_choice(rank, dtype, target, ratio=k) for k in (True, False)}
    flat_choice = expand_choice(rank, dtype, target)
    with checked(shuffle):
        first = project(z, q, segment, count, weight=weight, choice=wide_choice[True], **how)
        ratio = {"omega": first.omega, "norm2": first.norm2, "segment": segment, "num_segments": count}
        grads = coefficient_grads(
            upstream,
            c_mat,
            first.p,
            coef,
            a=a.view(first.omega.shape),
            choice=wide_choice[False],
            **ratio,
            **how,
        )
        per_task = coefficient_grads(
            upstream,
            c_mat,
            first.p,
            coef,
            segment=segment,
            num_segments=count,
            per_segment=True,
            choice=wide_choice[False],
        )
        dz = input_gradient(grads.dp, q, row_scale=grads.row_scale, z=z, choice=flat_choice)
        y = low_rank_output(first.p, c_mat, coef, choice=flat_choice)
        y = expand(first.p, c_mat.T, out=y, accumulate=True, choice=flat_choice)
        alone = ratio_backward(
            z, q, first.p, first.norm2, first.omega, a.view(first.omega.shape), segment, count, **how
        )
    outputs = first._asdict() | {f"grads.{k}": v for k, v in grads._asdict().items()}
    outputs |= {"per_task": per_task.dcoef, "dz": dz, "y": y, "alone": alone}
    how.pop("clamp")
    truth = oracle.project(z, q, segment, count, weight=weight, clamp=CLAMP, **how)
    return outputs, truth


@needs_checker
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("by_task", [False, True])
def test_in_bounds_and_bitwise_equal_in_any_program_order(by_task, dtype, target):
    args = (137, 93, [5, 3] * 3, 3, dtype, target, by_task)
    straight, truth = whole_path(*args)
    for shuffle in (1, 2):
        shuffled, _ = whole_path(*args, shuffle=shuffle)
        for name, value in straight.items():
            assert value.isfinite().all(), name
            assert torch.equal(value, shuffled[name]), f"{name} depends on the order of programs"
    close("p", straight["p"], truth[0], floor=1e-6)


@needs_checker
@settings(max_examples=15, derandomize=True, deadline=None)
@given(
    n=st.integers(1, 150),
    d=st.integers(1, 150),
    ranks=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    target=st.sampled_from([*TARGETS, "unknown"]),
    by_task=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(n, d, ranks, dtype, target, by_task, seed):
    ranks = [min(r, max(1, d // 2)) for r in ranks]
    outputs, (p, norm2, omega, loss) = whole_path(n, d, ranks, 1, dtype, target, by_task, seed, seed)
    for name, value in outputs.items():
        assert value.isfinite().all(), name
    close("p", outputs["p"], p, floor=1e-6)
    close("norm2", outputs["norm2"], norm2, floor=1e-6)
    close("omega", outputs["omega"], omega.view(outputs["omega"].shape), floor=3e-6)
    close("loss", outputs["loss_partials"].double().sum(0), loss, floor=3e-6)


D, R = 4096, 96


@needs_checker
@pytest.mark.slow
@pytest.mark.parametrize("target, n", [("sm_80", 4096), ("sm_90", 512)])
def test_project_moves_the_bytes_it_must(target, n):
    """d = 4096, R = 96, bfloat16: within 1.02 of one read of Z and Q and one write of each output, and no
    element of Z is asked for twice; Q again for every block of tokens, from the cache."""
    z = torch.randn(n, D, dtype=torch.bfloat16)
    q = torch.randn(R, D, dtype=torch.bfloat16)
    choice = project_choice(R, z.dtype, target)
    with checked() as checker:
        project(z, q, segments([16] * 6), 6, task=3, choice=choice)
    report = checker.report()
    assert report["dram_min"] <= 1.02 * (2 * (n * D + R * D + n * R) + 4 * (2 * n + R))
    again = 2 * R * D * (n // choice.block_n)
    assert report["stat"]["load"]["bytes"] - again <= 1.02 * 2 * n * D
    assert report["stat"]["store"]["bytes"] == 2 * n * R + 8 * n


@needs_checker
@pytest.mark.slow
@pytest.mark.parametrize("target, n", [("sm_80", 4096), ("sm_90", 512)])
def test_input_gradient_moves_the_bytes_it_must(target, n):
    """dP, Q and Z in, dZ out, each once; Q again for every block of tokens, dP for every stretch of d."""
    dp = torch.randn(n, R, dtype=torch.bfloat16)
    q = torch.randn(R, D, dtype=torch.bfloat16)
    z = torch.randn(n, D, dtype=torch.bfloat16)
    choice = expand_choice(R, z.dtype, target)
    with checked() as checker:
        input_gradient(dp, q, row_scale=torch.rand(n), z=z, choice=choice)
    report = checker.report()
    assert report["dram_min"] <= 1.02 * (2 * (2 * n * D + R * D + n * R) + 4 * n)
    stretches = D // (choice.block_d * choice.tiles)
    again = 2 * R * D * (n // choice.block_n) + stretches * (2 * n * R + 4 * n)
    assert report["stat"]["load"]["bytes"] - again <= 1.02 * 2 * n * D
    assert report["stat"]["store"]["bytes"] == 2 * n * D


@needs_checker
def test_siblings_move_little_more_than_one_module():
    """Queries, keys and values, r = 16: forward and backward of the three ratios against those of one, in
    bytes through device memory, and in bytes asked for, the cache's included."""
    n, d, r, target = 1024, 1024, 16, "sm_90"
    z = torch.randn(n, d, dtype=torch.bfloat16)
    moved = {}
    for siblings in (1, 3):
        rank = siblings * r
        q = torch.randn(rank, d, dtype=torch.bfloat16) / d**0.5
        segment, how = segments([r] * siblings), {"task": 0, "siblings": siblings, "clamp": CLAMP}
        with checked() as checker:
            first = project(z, q, segment, siblings, choice=project_choice(rank, z.dtype, target), **how)
            a, flat = torch.rand(first.omega.shape), expand_choice(rank, z.dtype, target)
            state = first.p, first.norm2, first.omega, a, segment, siblings
            ratio_backward(z, q, *state, choice=flat, **how)
        report = checker.report()
        moved[siblings] = report["dram_min"], report["stat"]["load"]["bytes"]
    assert moved[3][0] <= 1.1 * moved[1][0]
    assert moved[3][1] <= 1.4 * moved[1][1]


@needs_checker
def test_accumulating_costs_one_more_read_of_the_output():
    """The reason why expand runs before the base product: alone it moves N d, accumulating 2 N d."""
    p, c_mat, coef = torch.randn(128, 16), torch.randn(512, 16), torch.randn(16)
    moved = {}
    for accumulate in (False, True):
        with checked() as checker:
            low_rank_output(p, c_mat, coef, out=torch.zeros(128, 512), accumulate=accumulate)
        moved[accumulate] = checker.report()["dram_min"]
    assert moved[True] - moved[False] == 4 * 128 * 512
