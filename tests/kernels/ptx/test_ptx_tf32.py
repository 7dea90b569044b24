"""The compiled sm_80 code of the tf32 products, executed: what the matrix units make of a float32 factor is
tf32 rounded to nearest, and nothing more is lost. The executor's matrix unit cuts the low bits off, as the
device's does, so operands that the programs did not round would show.

sm_90's code multiplies float32 by wgmma, which the executor has for 16-bit numbers only.
"""

import kernel_oracle as oracle
import pytest
import torch
from nsc_fast.kernels.coefficient_grads import coefficient_grads
from nsc_fast.kernels.expand import input_gradient
from nsc_fast.kernels.project import project
from nsc_fast.kernels.ratio_backward import ratio_backward
from nsc_fast.kernels.tf32 import factor_operand
from ptx_device import PtxDevice

CLAMP, N, D, RANK = 1e-6, 70, 208, 48
FLOOR = 1e-6


def rounded(x):
    return factor_operand(x, 1, "tf32")


def close(name, got, expected, allowed):
    error = (got.double() - expected).abs()
    assert (error <= allowed).all(), f"{name}: off by {error.max().item():.3g}, {(error / allowed).max():.3g}"


@pytest.fixture
def sizes():
    torch.manual_seed(0)
    segment = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), RANK // 3)
    q = torch.cat([torch.linalg.qr(torch.randn(D, RANK // 3))[0].T for _ in range(3)])
    return torch.randn(N, D), q, segment, torch.randint(-1, 3, (N,), dtype=torch.int32)


def finish(device):
    assert not device.hazards, device.hazards
    assert device.flops > 0, "the matrix units were not used"


def test_project(sizes):
    z, q, segment, task = sizes
    with PtxDevice("sm_80").on() as device:
        out = project(z, q, segment, 3, task=task, clamp=CLAMP, precision="tf32")
    p = oracle.project(rounded(z), rounded(q), segment, 3)[0]
    close("p", out.p, p, FLOOR * p.abs().max())
    norm2 = z.double().square().sum(1)
    close("norm2", out.norm2, norm2, FLOOR * norm2)
    omega = oracle.project(z, q, segment, 3, task=task, clamp=CLAMP)[2][:, 0]
    close("omega", out.omega, omega, 1e-3)
    finish(device)


def test_coefficient_grads(sizes):
    z, q, segment, task = sizes
    p, norm2, omega, _ = oracle.project(z, q, segment, 3, task=task, clamp=CLAMP)
    p, g, c_mat, coef = p.float(), torch.randn(N, D), torch.randn(D, RANK), torch.rand(RANK)
    how = {"a": torch.randn(N), "omega": omega[:, 0].float(), "norm2": norm2.float(), "segment": segment}
    how |= {"task": task, "clamp": CLAMP}
    with PtxDevice("sm_80").on() as device:
        got = coefficient_grads(g, c_mat, p, coef, num_segments=3, precision="tf32", **how)
    dp, dcoef, row_scale = oracle.coefficient_grads(rounded(g), rounded(c_mat), p, coef, segments=3, **how)
    close("dp", got.dp, dp, FLOOR * dp.abs().max())
    close("dcoef", got.dcoef, dcoef, 5 * FLOOR * dcoef.abs().max())
    close("row_scale", got.row_scale, row_scale, FLOOR * row_scale.abs().max())
    finish(device)


def test_input_gradient(sizes):
    z, q, _, _ = sizes
    x, row_scale = torch.randn(N, RANK), torch.randn(N)
    with PtxDevice("sm_80").on() as device:
        dz = input_gradient(x, q, row_scale=row_scale, z=z, precision="tf32")
    expected = oracle.expand(rounded(x), rounded(q), row_scale=row_scale, z=z)
    close("dz", dz, expected, FLOOR * expected.abs().max())
    finish(device)


def test_ratio_backward(sizes):
    z, q, segment, task = sizes
    p, norm2, omega, _ = oracle.project(z, q, segment, 3, task=task, clamp=CLAMP)
    p, norm2, omega, a = p.float(), norm2.float(), omega[:, 0].float(), torch.randn(N)
    with PtxDevice("sm_80").on() as device:
        dz = ratio_backward(z, q, p, norm2, omega, a, segment, 3, task=task, clamp=CLAMP, precision="tf32")
    exact = oracle.ratio_backward(z, q, p, norm2, omega, a, segment, 3, task, clamp=CLAMP)
    args = (z, rounded(q), rounded(p), norm2, omega, a, segment, 3)
    expected = oracle.ratio_backward(*args, task, clamp=CLAMP)
    # -t P / |t| is P but for float32's last digit, which tips the rounding of a few elements over.
    assert (dz - expected).norm() <= 0.1 * (exact - expected).norm()
    finish(device)
