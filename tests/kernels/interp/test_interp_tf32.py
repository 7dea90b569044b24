"""tf32: only where torch was asked for it, and then every factor is rounded to nearest before it is used.

The interpreter multiplies in float32. The programs round the operands themselves, so what it computes is what
the matrix units compute, and the float64 oracle of the rounded operands is met to float32's last digits.
"""

import warnings

import kernel_oracle as oracle
import pytest
import torch
from interp_support import basis, close, segments
from nsc_fast.kernels.coefficient_grads import coefficient_grads
from nsc_fast.kernels.expand import input_gradient, low_rank_output
from nsc_fast.kernels.launch import expand_choice, project_choice
from nsc_fast.kernels.project import low_rank_input, project
from nsc_fast.kernels.ratio_backward import ratio_backward
from nsc_fast.kernels.tf32 import factor_operand
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder

from nsc_fast.kernels import launch
from nsc_fast.ops import merged_linear, null_space_ratio, selftest
from nsc_fast.ops.precision import tf32_allowed

RANKS = [20, 13, 31]
CLAMP = 1e-6
TARGETS = ["sm_80", "sm_90"]
FLOOR = 2e-6


def rounded(x):
    """To tf32's 11 significant bits, ties away from zero, by way of float64."""
    mantissa, exponent = torch.frexp(x.double())
    scaled = mantissa * 2**11
    whole = torch.where(scaled >= 0, (scaled + 0.5).floor(), (scaled - 0.5).ceil())
    return torch.ldexp(whole, exponent - 11)


def problem(n=75, d=136):
    segment = segments(RANKS)
    z, q = torch.randn(n, d), basis(RANKS, d, torch.float32)
    z[::7] = 0
    task = torch.randint(-1, len(RANKS), (n,), dtype=torch.int32)
    return z, q, segment, task


def test_factors_are_rounded_to_nearest_and_keep_what_is_no_number():
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1.0, 1 + 2**-11, -1 - 2**-11, 1 + 2**-12])
    matrix = torch.cat([special, torch.randn(56), torch.randn(64) * 1e-30]).view(16, 8)
    got = factor_operand(matrix, 1, "tf32")
    finite = torch.isfinite(matrix)
    assert torch.equal(got[finite].double(), rounded(matrix)[finite])
    assert torch.equal(got[~finite], matrix[~finite])
    assert got[0, 5] == 1 + 2**-10 and got[0, 7] == 1
    nan = torch.tensor([[0x7FFFFFFF, -1, 0x7FC00000]], dtype=torch.int32).view(torch.float32)
    assert factor_operand(nan, 0, "tf32").isnan().all()


def test_rounded_factors_are_laid_out_along_the_contracted_dimension():
    for matrix in (torch.randn(6, 4), torch.randn(4, 6).T):
        assert factor_operand(matrix, 0, "tf32").stride(0) == 1
        assert factor_operand(matrix, 1, "tf32").stride(1) == 1
        assert factor_operand(matrix, 0, "ieee") is matrix
    half = torch.randn(6, 4, dtype=torch.bfloat16)
    assert factor_operand(half, 0, "tf32") is half


@pytest.mark.parametrize("target", TARGETS)
def test_project(target):
    z, q, segment, task = problem()
    choice = project_choice(len(q), z.dtype, target, precision="tf32")
    out = project(z, q, segment, 3, task=task, clamp=CLAMP, precision="tf32", choice=choice)
    p, _, _, _ = oracle.project(rounded(z), rounded(q), segment, 3)
    close("p", out.p, p, floor=FLOOR)
    # The norm is float32's: only the product is rounded.
    close("norm2", out.norm2, z.double().square().sum(1), floor=FLOOR)
    ieee = project(z, q, segment, 3, task=task, clamp=CLAMP).p
    close("default", ieee, z.double() @ q.double().T, floor=FLOOR)
    assert (out.p - ieee).abs().max() > 1e-5
    only = low_rank_input(z, q, precision="tf32", choice=project_choice(64, z.dtype, target, ratio=False))
    close("p alone", only, p, floor=FLOOR)


def test_the_ratio_is_not_biased():
    """Cut instead of rounded, the share inside the row space would be 1.4e-3 too small for every token."""
    d, r, n = 1024, 32, 64
    q = torch.linalg.qr(torch.randn(d, r))[0].T.contiguous()
    z = torch.randn(n, d) / d**0.5 + torch.randn(n, r) @ q
    omega = project(z, q, clamp=CLAMP, precision="tf32").omega[:, 0]
    _, _, truth, _ = oracle.project(z, q, clamp=CLAMP)
    assert 0.1 < truth.mean() < 0.3
    off = (omega.double() / truth[:, 0] - 1).mean()
    assert abs(off) < 1e-3


@pytest.mark.parametrize("target", TARGETS)
def test_coefficient_grads(target):
    z, q, segment, task = problem()
    p, norm2, omega, _ = oracle.project(z, q, segment, 3, task=task, clamp=CLAMP)
    g, c_mat, coef, a = torch.randn(75, 72), torch.randn(72, len(q)), torch.randn(len(q)), torch.randn(75)
    how = {"a": a, "omega": omega[:, 0].float(), "norm2": norm2.float(), "segment": segment, "task": task}
    choice = project_choice(len(q), z.dtype, target, ratio=False, precision="tf32")
    p = p.float()
    got = coefficient_grads(
        g, c_mat, p, coef, num_segments=3, clamp=CLAMP, precision="tf32", choice=choice, **how
    )
    dp, dcoef, row_scale = oracle.coefficient_grads(
        rounded(g), rounded(c_mat), p, coef, segments=3, clamp=CLAMP, **how
    )
    close("dp", got.dp, dp, floor=FLOOR)
    close("dcoef", got.dcoef, dcoef, floor=5 * FLOOR)
    close("row_scale", got.row_scale, row_scale, floor=FLOOR)


@pytest.mark.parametrize("rank", [24, 70])
def test_expand(rank):
    """Below and above the columns that a program keeps."""
    x, m, z = torch.randn(75, rank), torch.randn(rank, 200), torch.randn(75, 200)
    row_scale, coef = torch.randn(75), torch.rand(rank)
    choice = expand_choice(rank, x.dtype, "sm_90", precision="tf32")
    got = input_gradient(x, m, row_scale=row_scale, z=z, precision="tf32", choice=choice)
    close("dz", got, oracle.expand(rounded(x), rounded(m), row_scale=row_scale, z=z), floor=FLOOR)
    y = low_rank_output(x, m.T, coef, precision="tf32", choice=choice)
    close("y", y, oracle.expand(rounded(x * coef), rounded(m)), floor=FLOOR)


def test_ratio_backward():
    z, q, segment, task = problem()
    p, norm2, omega, _ = oracle.project(z, q, segment, 3, task=task, clamp=CLAMP)
    a, p, norm2, omega = torch.randn(75), p.float(), norm2.float(), omega[:, 0].float()
    how = {"task": task, "clamp": CLAMP}
    dz = ratio_backward(z, q, p, norm2, omega, a, segment, 3, precision="tf32", **how)
    ieee = ratio_backward(z, q, p, norm2, omega, a, segment, 3, **how)
    exact = oracle.ratio_backward(z, q, p, norm2, omega, a, segment, 3, **how)
    largest = exact.abs().max()
    assert (ieee - exact).abs().max() < FLOOR * largest
    args = (z, rounded(q), rounded(p), norm2, omega, a, segment, 3)
    expected = oracle.ratio_backward(*args, **how)
    assert (expected - exact).abs().max() > 1e-5 * largest
    # -t P / |t| is P but for float32's last digit, which tips the rounding of a few elements over.
    assert (dz - expected).norm() <= 0.1 * (exact - expected).norm()


@pytest.fixture
def torch_setting():
    """Torch's setting, put back afterwards."""
    yield
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    assert not tf32_allowed()


def legacy_flag(value):
    torch.backends.cuda.matmul.allow_tf32 = value


def newer_flag(value):
    torch.backends.cuda.matmul.fp32_precision = "tf32" if value else "ieee"


WAYS = {
    "precision": lambda value: torch.set_float32_matmul_precision("high" if value else "highest"),
    "flag": legacy_flag,
    "backend": newer_flag,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_asking_torch_counts(torch_setting, way):
    if way == "backend" and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has the older settings only")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not tf32_allowed()
        WAYS[way](True)
        assert tf32_allowed()
        WAYS[way](False)
        assert not tf32_allowed()


def test_older_torch_has_the_flag_only(monkeypatch):
    for allowed in (True, False):
        older = type("matmul", (), {"allow_tf32": allowed})()
        monkeypatch.setattr(torch.backends.cuda, "matmul", older)
        assert tf32_allowed() is allowed


@pytest.fixture
def precisions(monkeypatch):
    """The precision that each product asked for."""
    seen = []
    create_dot = InterpreterBuilder.create_dot

    def recording(self, a, b, d, precision, *rest):
        seen.append(precision)
        return create_dot(self, a, b, d, precision, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", recording)
    return seen


def every_operation(dtype=torch.float32):
    z, q, segment, task = problem(n=20, d=48)
    z = z.to(dtype).requires_grad_()
    c = torch.randn(3, requires_grad=True)
    weight, columns = torch.randn(24, 48, dtype=dtype), torch.randn(24, len(q))
    y, omega, _ = merged_linear(
        z, weight, None, q, columns, segment, c, num_tasks=3, task=task, impl="triton"
    )
    alone = null_space_ratio(z, q, ranks=RANKS, impl="triton")
    (y.float().square().sum() + omega.sum() + alone.sum()).backward()


def test_the_request_reaches_every_product(torch_setting, precisions):
    every_operation()
    assert precisions and set(precisions) == {ir.INPUT_PRECISION.IEEE}
    count = len(precisions)
    precisions.clear()
    torch.set_float32_matmul_precision("high")
    every_operation()
    assert len(precisions) >= count // 2 and set(precisions) == {ir.INPUT_PRECISION.TF32}
    precisions.clear()
    every_operation(torch.bfloat16)
    assert set(precisions) == {ir.INPUT_PRECISION.IEEE}


@pytest.mark.parametrize("target", ["gfx942", "sm_75"])
def test_devices_without_it_stay_with_float32(torch_setting, precisions, monkeypatch, target):
    torch.set_float32_matmul_precision("high")
    monkeypatch.setattr(launch, "current_target", lambda device: target)
    every_operation()
    assert precisions and set(precisions) == {ir.INPUT_PRECISION.IEEE}


def test_the_self_test_expects_what_was_asked_for(torch_setting, monkeypatch):
    tight = selftest.TOLERANCES[torch.float32]
    monkeypatch.setattr(selftest, "TOLERANCES", {torch.float32: tight})
    selftest._run.cache_clear()
    assert all(f.limit == tight and f.passed for f in selftest.run("cpu", None, "triton"))
    torch.set_float32_matmul_precision("high")
    found = selftest.run("cpu", None, "triton")
    assert all(f.limit == selftest.TF32_TOLERANCE and f.passed for f in found)
    # The limit matters: float32's own would not be met.
    assert all(f.error > tight for f in found), found
    # torch's products on the CPU are not what the setting speaks of.
    assert all(f.limit == tight and f.passed for f in selftest.run("cpu", None, "torch"))
    selftest._run.cache_clear()
