"""The compiled sm_80 and sm_90 code of every kernel, executed: right, free of hazards and bank conflicts.

What this sees and the interpreter cannot: layouts, swizzles, pipelining, asynchronous copies (which land as
late as they may) and what two warps do to one shared-memory word. N and the last tile of d are ragged.
"""

import kernel_oracle as oracle
import pytest
import torch
from nsc_fast.kernels.coefficient_grads import coefficient_grads
from nsc_fast.kernels.expand import input_gradient, low_rank_output
from nsc_fast.kernels.project import low_rank_input, project
from nsc_fast.kernels.ratio_backward import ratio_backward
from nsc_fast.kernels.reduce import reduce_partials
from ptx_device import PtxDevice

CLAMP = 1e-6
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
TARGETS = ["sm_80", "sm_90"]
HALF = [torch.bfloat16, torch.float16]


def close(name, actual, expected, unit=1e-5, floor=1e-5):
    error = (actual.double() - expected).abs()
    allowed = unit * expected.abs() + floor * expected.abs().max()
    assert (error <= allowed).all(), f"{name}: off by {(error - allowed).max().item():.3g}"


@pytest.fixture
def make(monkeypatch):
    """Inputs of a merge over three tasks; fresh memory is NaN."""
    torch.manual_seed(0)
    empty = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *a, **k: t.fill_(float("nan")) if (t := empty(*a, **k)).is_floating_point() else t,
    )

    def inputs(dtype, rank, n=150, d=208):
        part = rank // 3
        ranks = [part, part, rank - 2 * part]
        segment = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor(ranks))
        q = torch.cat([torch.linalg.qr(torch.randn(d, r))[0].T for r in ranks]).to(dtype)
        z = torch.randn(n, d).to(dtype)
        z[7] = 0
        task = torch.randint(-1, 3, (n,), dtype=torch.int32)
        return z, q, segment, task

    return inputs


def finish(device: PtxDevice, conflict_limit=1.1):
    assert not device.hazards, device.hazards
    assert device.conflicts() <= conflict_limit


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rank", [32, 48, 96, 144])
def test_project(make, rank, dtype, target):
    z, q, segment, task = make(dtype, rank)
    weight = torch.rand(len(z))
    with PtxDevice(target).on() as device:
        out = project(z, q, segment, 3, task=task, weight=weight, clamp=CLAMP)
    p, norm2, omega, loss = oracle.project(z, q, segment, 3, task=task, weight=weight, clamp=CLAMP)
    close("p", out.p, p, UNIT[dtype])
    close("norm2", out.norm2, norm2)
    close("omega", out.omega, omega[:, 0])
    close("loss", out.loss_partials.double().sum(0), loss)
    finish(device)


@pytest.mark.parametrize("target", TARGETS)
def test_project_every_segment(make, target):
    z, q, segment, _ = make(torch.bfloat16, 48)
    with PtxDevice(target).on() as device:
        out = project(z, q, segment, 3, weight=torch.ones(len(z)), clamp=CLAMP)
        only_p = low_rank_input(z, q)
    _, _, omega, loss = oracle.project(z, q, segment, 3, weight=torch.ones(len(z)), clamp=CLAMP)
    close("omega", out.omega, omega)
    close("loss", out.loss_partials.double().sum(0), loss)
    assert torch.equal(only_p, out.p)
    finish(device)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rank", [32, 48, 96, 144])
def test_coefficient_grads(make, rank, dtype, target):
    z, q, segment, task = make(dtype, rank)
    p, norm2, omega, _ = oracle.project(z, q, segment, 3, task=task, clamp=CLAMP)
    p, norm2, omega = p.to(dtype), norm2.float(), omega[:, 0].float()
    g, c_mat = torch.randn_like(z), torch.randn(z.shape[1], rank).to(dtype)
    coef, a = torch.rand(rank), torch.randn(len(z))
    how = {"a": a, "omega": omega, "norm2": norm2, "segment": segment, "task": task, "clamp": CLAMP}
    with PtxDevice(target).on() as device:
        got = coefficient_grads(g, c_mat, p, coef, num_segments=3, **how)
        tasks = reduce_partials(got.dcoef[None], segment, 3)
    dp, dcoef, row_scale = oracle.coefficient_grads(g, c_mat, p, coef, segments=3, **how)
    close("dp", got.dp, dp, UNIT[dtype])
    close("dcoef", got.dcoef, dcoef)
    close("row_scale", got.row_scale, row_scale)
    close("per task", tasks, torch.zeros(3).double().index_add_(0, segment.long(), dcoef))
    assert device.launched == ["coefficient_grads_kernel", "column_sums_kernel", "segment_sums_kernel"]
    finish(device)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rank", [32, 48, 96, 144])
def test_input_gradient(make, rank, dtype, target):
    z, q, _, _ = make(dtype, rank)
    dp, row_scale = torch.randn(len(z), rank).to(dtype), torch.randn(len(z))
    with PtxDevice(target).on() as device:
        dz = input_gradient(dp, q, row_scale=row_scale, z=z)
    close("dz", dz, oracle.expand(dp, q, row_scale=row_scale, z=z), UNIT[dtype])
    finish(device)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rank", [48, 96, 144])
def test_low_rank_output(make, rank, dtype, target):
    z, _, _, _ = make(dtype, rank)
    p, c_mat, coef = torch.randn(len(z), rank).to(dtype), torch.randn(208, rank).to(dtype), torch.rand(rank)
    bias, base = torch.randn(208).to(dtype), torch.randn(len(z), 208).to(dtype)
    with PtxDevice(target).on() as device:
        y = low_rank_output(p, c_mat, coef, bias=bias, out=base.clone(), accumulate=True)
    close("y", y, oracle.expand(p, c_mat.T, coef, bias, base=base), UNIT[dtype], floor=UNIT[dtype])
    finish(device)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rank", [32, 96, 144])
def test_ratio_backward(make, rank, dtype, target):
    z, q, segment, task = make(dtype, rank, d=304)
    p, norm2, omega, _ = oracle.project(z, q, segment, 3, task=task, clamp=CLAMP)
    p, norm2, omega, a = p.to(dtype), norm2.float(), omega[:, 0].float(), torch.randn(len(z))
    with PtxDevice(target).on() as device:
        dz = ratio_backward(z, q, p, norm2, omega, a, segment, 3, task=task, clamp=CLAMP)
    expected = oracle.ratio_backward(z, q, p, norm2, omega, a, segment, 3, task=task, clamp=CLAMP)
    close("dz", dz, expected, UNIT[dtype], floor=UNIT[dtype] if rank > 128 else 1e-5)
    finish(device)


@pytest.mark.parametrize("target", TARGETS)
def test_unaligned_sizes(make, target):
    """d = 93: the small tiles."""
    z, q, segment, task = make(torch.bfloat16, 21, n=45, d=93)
    with PtxDevice(target).on() as device:
        out = project(z, q, segment, 3, task=task, clamp=CLAMP)
        dz = ratio_backward(z, q, out.p, out.norm2, out.omega, out.omega, segment, 3, task=task, clamp=CLAMP)
    p, norm2, omega, _ = oracle.project(z, q, segment, 3, task=task, clamp=CLAMP)
    close("p", out.p, p, 2**-8)
    close("norm2", out.norm2, norm2)
    close("omega", out.omega, omega[:, 0])
    args = (z, q, out.p, out.norm2, out.omega, out.omega, segment, 3)
    close("dz", dz, oracle.ratio_backward(*args, task=task, clamp=CLAMP), 2**-8)
    assert not device.hazards, device.hazards
