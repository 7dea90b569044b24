"""coefficient_grads and its second stage against the float64 oracle."""

import kernel_oracle as oracle
import pytest
import torch
from interp_support import DTYPES, TARGETS, basis, close, ids, segments
from nsc_fast.kernels.coefficient_grads import coefficient_grads
from nsc_fast.kernels.launch import project_choice
from nsc_fast.kernels.project import project
from nsc_fast.kernels.reduce import reduce_partials

CLAMP = 1e-6


def compare(n, d_out, ranks, dtype, target="sm_90", with_g=True, with_a=True, **how):
    d, rank, count = 64, sum(ranks), len(ranks)
    segment = segments(ranks)
    z = torch.randn(n, d).to(dtype)
    z[::5] = 0
    out = project(z, basis(ranks, d, dtype), segment, count, clamp=CLAMP, **how)
    g = torch.randn(n, d_out).to(dtype) if with_g else None
    c_mat = torch.randn(d_out, rank).to(dtype) if with_g else None
    coef = torch.randn(rank) if with_g else None
    ratio = {}
    if with_a:
        ratio = {"a": torch.randn_like(out.omega), "omega": out.omega, "norm2": out.norm2}
    choice = project_choice(rank, dtype, target, ratio=False)
    got = coefficient_grads(
        g,
        c_mat,
        out.p,
        coef,
        segment=segment,
        num_segments=count,
        clamp=CLAMP,
        choice=choice,
        **ratio,
        **how,
    )
    dp, dcoef, row_scale = oracle.coefficient_grads(
        g, c_mat, out.p, coef, segment=segment, segments=count, clamp=CLAMP, **ratio, **how
    )
    close("dp", got.dp, dp, floor=1e-6)
    if with_g:
        close("dcoef", got.dcoef, dcoef, floor=2e-6)
        tasks = coefficient_grads(
            g, c_mat, out.p, coef, segment=segment, num_segments=count, per_segment=True, choice=choice
        )
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, segment.long(), dcoef)
        close("dcoef per segment", tasks.dcoef, sums, floor=1e-5)
    if with_a:
        close("row_scale", got.row_scale, row_scale, floor=1e-6)
    assert (got.dcoef is None) == (not with_g) and (got.row_scale is None) == (not with_a)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "n, d_out, ranks", [(1, 16, [1]), (140, 72, [16] * 6), (77, 200, [5, 7, 9]), (20, 40, [300])]
)
def test_every_segment(n, d_out, ranks, target, dtype):
    compare(n, d_out, ranks, dtype, target)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("with_g, with_a", [(True, False), (False, True)])
def test_parts(with_g, with_a, dtype):
    compare(60, 40, [3, 9], dtype, with_g=with_g, with_a=with_a)


@pytest.mark.parametrize("siblings", [1, 3])
def test_own_segment(siblings):
    task = torch.randint(-1, 2, (90,), dtype=torch.int32)
    compare(90, 40, [3, 9] * siblings, torch.float32, task=task, siblings=siblings)
    compare(90, 40, [3, 9] * siblings, torch.float32, task=1, siblings=siblings)


def test_a_token_without_a_task_has_no_gradient():
    """Whatever stands in its place of omega and a."""
    p, task = torch.randn(6, 8), torch.tensor([0, -1, 1, -1, 0, 1], dtype=torch.int32)
    half = torch.full((6,), 0.5)
    got = coefficient_grads(
        None,
        None,
        p,
        None,
        a=half,
        omega=half,
        norm2=half,
        segment=segments([4, 4]),
        num_segments=2,
        task=task,
    )
    assert (got.row_scale[task < 0] == 0).all() and (got.dp[task < 0] == 0).all()
    assert (got.row_scale[task >= 0] > 0).all()


def test_sibling_columns_in_and_out_of_one_stack():
    """q/k/v: each sibling has its own G and C; P and dP are column ranges of one matrix."""
    p, dp = torch.randn(50, 24), torch.full((50, 24), float("nan"))
    for s in range(3):
        g, c_mat, coef = torch.randn(50, 32), torch.randn(32, 8), torch.randn(8)
        at = slice(8 * s, 8 * s + 8)
        got = coefficient_grads(g, c_mat, p[:, at], coef, out=dp[:, at])
        want, dcoef, _ = oracle.coefficient_grads(g, c_mat, p[:, at], coef)
        close("dp", dp[:, at], want, floor=1e-6)
        close("dcoef", got.dcoef, dcoef, floor=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("first, rank, total", [(16, 32, 64), (5, 16, 37), (3, 7, 37)])
def test_columns_of_a_wider_stack(first, rank, total, dtype):
    """One sibling's P and dP within the stack of all, aligned or not, with its own ratio; the columns of the
    others stay as they are."""
    p, dp = torch.randn(40, total).to(dtype), torch.full((40, total), float("nan"), dtype=dtype)
    at = slice(first, first + rank)
    g, c_mat, coef = torch.randn(40, 48).to(dtype), torch.randn(48, rank).to(dtype), torch.randn(rank)
    how = {"segment": segments([rank // 2, rank - rank // 2]), "clamp": CLAMP}
    how |= {"task": torch.randint(-1, 2, (40,), dtype=torch.int32), "norm2": torch.rand(40) + 1}
    how |= {"a": torch.randn(40), "omega": torch.rand(40) / 2 + 0.5}
    got = coefficient_grads(g, c_mat, p[:, at], coef, num_segments=2, out=dp[:, at], **how)
    want, dcoef, row_scale = oracle.coefficient_grads(g, c_mat, p[:, at], coef, segments=2, **how)
    close("dp", dp[:, at], want, floor=1e-6)
    close("dcoef", got.dcoef, dcoef, floor=2e-6)
    close("row_scale", got.row_scale, row_scale, floor=1e-6)
    assert dp[:, :first].isnan().all() and dp[:, first + rank :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_strides(dtype):
    p, coef = torch.randn(50, 12).to(dtype), torch.randn(12)
    g = torch.randn(50, 2, 40).to(dtype)[:, 1]
    for c_mat in (
        torch.randn(40, 12).to(dtype),
        torch.randn(12, 40).to(dtype).T,
        torch.randn(40, 24).to(dtype)[:, ::2],
    ):
        for upstream in (g, g.T.contiguous().T):
            got = coefficient_grads(upstream, c_mat, p, coef)
            dp, dcoef, _ = oracle.coefficient_grads(upstream, c_mat, p, coef)
            close("dp", got.dp, dp, floor=1e-6)
            close("dcoef", got.dcoef, dcoef, floor=1e-6)


@pytest.mark.parametrize("blocks, rank", [(1, 1), (64, 32), (200, 70), (65, 33)])
def test_reduce_partials(blocks, rank):
    partials = torch.randn(blocks, rank)
    close("sums", reduce_partials(partials), partials.double().sum(0), floor=1e-6)
    segment = torch.randint(0, 3, (rank,), dtype=torch.int32)
    sums = torch.zeros(3, dtype=torch.float64).index_add_(0, segment.long(), partials.double().sum(0))
    close("segment sums", reduce_partials(partials, segment, 3), sums, floor=1e-5)


def test_empty():
    got = coefficient_grads(torch.randn(0, 8), torch.randn(8, 4), torch.randn(0, 4), torch.randn(4))
    assert got.dp.shape == (0, 4) and torch.equal(got.dcoef, torch.zeros(4))


def test_refusals():
    g, c_mat, p, coef = torch.randn(6, 8), torch.randn(8, 4), torch.randn(6, 4), torch.randn(4)
    with pytest.raises(ValueError, match="both g and a"):
        coefficient_grads(None, None, p, None)
    with pytest.raises(ValueError, match="c_mat must have shape"):
        coefficient_grads(g, c_mat.T, p, coef)
    with pytest.raises(ValueError, match="omega and norm2"):
        coefficient_grads(g, c_mat, p, coef, a=torch.ones(6, 1))
    with pytest.raises(ValueError, match="unit stride"):
        coefficient_grads(g, c_mat, p, coef, out=torch.empty(4, 6).T)
