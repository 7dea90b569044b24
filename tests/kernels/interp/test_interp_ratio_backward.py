"""ratio_backward against autograd through the textbook formula in float64."""

import kernel_oracle as oracle
import pytest
import torch
from interp_support import DTYPES, TARGETS, basis, close, ids, segments
from nsc_fast.kernels.launch import expand_choice
from nsc_fast.kernels.project import project
from nsc_fast.kernels.ratio_backward import ratio_backward

CLAMP = 1e-6
FLOOR = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}


def compare(z, q, segment, num_segments, target="sm_90", **how):
    out = project(z, q, segment, num_segments, clamp=CLAMP, **how)
    a = torch.randn_like(out.omega)
    choice = expand_choice(q.shape[0], z.dtype, target, step="ratio_backward")
    dz = ratio_backward(
        z, q, out.p, out.norm2, out.omega, a, segment, num_segments, clamp=CLAMP, choice=choice, **how
    )
    expected = oracle.ratio_gradient(z, q, a, segment, num_segments, clamp=CLAMP, **how)
    close("dz", dz, expected, FLOOR[z.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "n, d, ranks", [(1, 16, [1]), (130, 600, [16]), (77, 200, [5, 7, 9]), (20, 330, [150])]
)
def test_every_segment(n, d, ranks, target, dtype):
    compare(torch.randn(n, d).to(dtype), basis(ranks, d, dtype), segments(ranks), len(ranks), target)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("siblings", [1, 2])
def test_own_segment(siblings, dtype):
    n, d, ranks = 70, 72, [3, 8, 5] * siblings
    task = torch.randint(-1, 3, (n,), dtype=torch.int32)
    z = torch.randn(n, d).to(dtype)
    for how in ({"task": task}, {"task": 1}):
        compare(z, basis(ranks, d, dtype), segments(ranks), len(ranks), siblings=siblings, **how)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_gradient_is_zero_at_the_clamp_and_at_zero(dtype):
    q = basis([8], 32, torch.float32)
    z = torch.randn(24, 32)
    z[::3] = 0
    z[1::3] = torch.randn(8, 8) @ q
    z, q = z.to(dtype), q.to(dtype)
    out = project(z, q, clamp=0.05)
    dz = ratio_backward(z, q, out.p, out.norm2, out.omega, torch.ones_like(out.omega), clamp=0.05)
    assert (dz[::3] == 0).all() and (dz[1::3] == 0).all() and (dz[2::3] != 0).any(1).all()


def test_token_without_gradient_stays_clean_whatever_it_holds():
    z, q = torch.randn(6, 32), basis([4], 32, torch.float32)
    z[2] = float("nan")
    out = project(z, q)
    a = torch.ones_like(out.omega)
    a[2] = 0
    dz = ratio_backward(z, q, out.p, out.norm2, out.omega, a)
    assert dz[[0, 1, 3, 4, 5]].isfinite().all()


def test_small_float16_gradients_do_not_vanish_on_the_way():
    """t is 1e-10 here, far below float16; the result is not."""
    z = (torch.randn(20, 64) * 1000).half()
    q = basis([8], 64, torch.float16)
    out = project(z, q)
    a = torch.full_like(out.omega, 1e-2)
    dz = ratio_backward(z, q, out.p, out.norm2, out.omega, a)
    expected = oracle.ratio_gradient(z, q, a)
    assert (dz.double() - expected).abs().max() <= 2**-24


def test_empty():
    q = basis([4], 48, torch.float32)
    out = project(torch.randn(0, 48), q)
    assert ratio_backward(torch.randn(0, 48), q, *out[:3], torch.randn(0, 1)).shape == (0, 48)
