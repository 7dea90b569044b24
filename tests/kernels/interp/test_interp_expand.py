"""expand and its two launchers against the float64 oracle."""

import kernel_oracle as oracle
import pytest
import torch
from interp_support import DTYPES, TARGETS, close, ids
from nsc_fast.kernels.expand import expand, input_gradient, low_rank_output
from nsc_fast.kernels.launch import expand_choice

SCALED = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}  # x * scale is rounded once more


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "n, d, rank", [(1, 16, 1), (130, 600, 16), (77, 200, 21), (40, 72, 130), (20, 530, 96)]
)
def test_input_gradient(n, d, rank, target, dtype):
    dp, q, z = torch.randn(n, rank).to(dtype), torch.randn(rank, d).to(dtype), torch.randn(n, d).to(dtype)
    row_scale = torch.randn(n)
    choice = expand_choice(rank, dtype, target)
    out = input_gradient(dp, q, row_scale=row_scale, z=z, choice=choice)
    close("dz", out, oracle.expand(dp, q, row_scale=row_scale, z=z), floor=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("rank", [5, 64, 200])
@pytest.mark.parametrize("accumulate", [False, True])
def test_low_rank_output(rank, accumulate, dtype):
    p, c_mat, coef = torch.randn(70, rank).to(dtype), torch.randn(90, rank).to(dtype), torch.randn(rank)
    bias = torch.randn(90).to(dtype)
    base = torch.randn(70, 90).to(dtype)
    out = base.clone() if accumulate else None
    got = low_rank_output(p, c_mat, coef, bias=bias, out=out, accumulate=accumulate)
    want = oracle.expand(p, c_mat.T, coef, bias, base=base if accumulate else None)
    close("y", got, want, floor=SCALED[dtype])


def test_strides():
    x, m, z = torch.randn(30, 40)[:, 3:15], torch.randn(50, 12).T, torch.randn(30, 2, 50)[:, 0]
    out = torch.full((30, 80), float("nan"))
    row_scale = torch.randn(60)[::2]
    expand(x, m, row_scale=row_scale, z=z, out=out[:, 10:60])
    close("out", out[:, 10:60], oracle.expand(x, m, row_scale=row_scale, z=z), floor=1e-6)
    assert out[:, :10].isnan().all() and out[:, 60:].isnan().all()
    close("copied", expand(x, torch.randn(24, 100)[::2, ::2] * 0 + m), oracle.expand(x, m), floor=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("first, rank, total", [(16, 32, 64), (5, 16, 37), (3, 7, 37), (130, 160, 300)])
def test_columns_of_a_wider_stack(first, rank, total, dtype):
    """P and dP of one sibling: columns of the (N, R) matrix of all, aligned or not."""
    p = torch.randn(40, total).to(dtype)
    mine = p[:, first : first + rank]
    q, c_mat, coef = torch.randn(rank, 72).to(dtype), torch.randn(72, rank).to(dtype), torch.randn(rank)
    close("dz", input_gradient(mine, q), oracle.expand(mine, q), floor=2e-6)
    close("y", low_rank_output(mine, c_mat, coef), oracle.expand(mine, c_mat.T, coef), floor=SCALED[dtype])


def test_a_poisoned_out_is_overwritten_and_never_read():
    x, m = torch.randn(30, 8), torch.randn(8, 50)
    out = expand(x, m, out=torch.full((30, 50), float("nan")))
    close("out", out, oracle.expand(x, m), floor=1e-6)


def test_empty():
    assert expand(torch.randn(0, 8), torch.randn(8, 50)).shape == (0, 50)


def test_refusals():
    x, m = torch.randn(6, 4), torch.randn(4, 8)
    with pytest.raises(ValueError, match="go together"):
        expand(x, m, z=torch.randn(6, 8))
    with pytest.raises(ValueError, match="accumulate needs out"):
        expand(x, m, accumulate=True)
    with pytest.raises(ValueError, match="m must have shape"):
        expand(x, m.T)
