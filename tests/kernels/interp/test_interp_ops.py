"""The differentiable operations on the interpreted kernels: the glue between them and the launchers."""

import pytest
import torch

from nsc_fast import reference
from nsc_fast.factors import canonical, stack
from nsc_fast.ops import Sibling, merged_linear, merged_siblings, null_space_ratio, selftest

SHAPES = [(20, 40, 23, (5, 3)), (70, 33, 65, (16, 1, 2))]


def problem(n, d_in, d_out, ranks):
    torch.manual_seed(0)
    downs = [torch.randn(r, d_in, dtype=torch.float64) for r in ranks]
    ups = [torch.randn(d_out, r, dtype=torch.float64) for r in ranks]
    stacked = stack([(str(k), canonical(a, b)) for k, (a, b) in enumerate(zip(downs, ups, strict=True))])
    factors = (stacked.basis.float(), stacked.columns.float(), stacked.segment)
    weight, bias = torch.randn(d_out, d_in), torch.randn(d_out)
    task = (torch.arange(n) % (len(ranks) + 1) - 1).to(torch.int32)
    return downs, ups, factors, weight, bias, task, torch.randn(n, d_in)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per", ["task", "direction", "core"])
@pytest.mark.parametrize("wanted", ["both", "output", "ratio"])
def test_merged_linear_is_the_same_on_the_kernels_and_on_torch(shape, per, wanted):
    _, _, factors, weight, bias, task, z = problem(*shape)
    ranks = shape[3]
    c = torch.linspace(-0.5, 0.9, len(ranks) if per == "task" else sum(ranks))
    if per == "core":
        c = c.diag() + torch.randn(sum(ranks), sum(ranks)) / 10
    results = []
    for impl in ("triton", "torch"):
        z_, c_ = z.clone().requires_grad_(), c.clone().requires_grad_()
        own = None if wanted == "output" else task
        y, omega, _ = merged_linear(z_, weight, bias, *factors, c_, num_tasks=len(ranks), task=own, impl=impl)
        loss = 0.0
        if wanted != "ratio":
            loss = loss + (y * torch.arange(y.shape[1])).sum()
        if wanted != "output":
            loss = loss + (omega * torch.linspace(0, 1, len(z))).sum()
        loss.backward()
        results.append([y, omega, z_.grad, c_.grad])
    for got, expected in zip(*results, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            assert (got - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("targets", [(), (1,), (0, 1, 2)])
@pytest.mark.parametrize("per", ["task", "core"])
def test_siblings_are_the_same_on_the_kernels_and_on_torch(targets, per):
    problems = [problem(20, 40, width, ranks) for width, ranks in ((23, (5, 3)), (8, (2, 2)), (17, (1, 9)))]
    z, task = problems[0][6], problems[0][5]
    basis = torch.cat([p[2][0] for p in problems])
    segment = torch.cat([p[2][2] + 2 * s for s, p in enumerate(problems)])
    results = []
    for impl in ("triton", "torch"):
        z_ = z.clone().requires_grad_()
        cs = [torch.tensor([0.3, -0.8]) for _ in problems]
        if per == "core":
            cs = [c[p[2][2].long()].diag() + 0.1 for c, p in zip(cs, problems, strict=True)]
        cs = [c.requires_grad_() for c in cs]
        layers = [
            Sibling(columns, own, c, weight, bias)
            for (_, _, (_, columns, own), weight, bias, _, _), c in zip(problems, cs, strict=True)
        ]
        how = {"num_tasks": 2, "task": task if targets else None, "impl": impl}
        done = merged_siblings(z_, basis, segment, layers, **how)
        loss = sum((one.y * torch.arange(one.y.shape[1])).sum() for one in done[:2])
        for s in targets:
            loss = loss + (s + 1) * (done[s].omega * torch.linspace(0, 1, len(z))).sum()
        loss.backward()
        results.append(
            [*(one.y for one in done), *(done[s].omega for s in targets), z_.grad, cs[0].grad, cs[1].grad]
        )
        assert cs[2].grad is None
    for got, expected in zip(*results, strict=True):
        assert (got - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_ratio_agrees_with_the_oracle(shape):
    downs, _, (basis, _, _), *_, z = problem(*shape)
    z = z.requires_grad_()
    omega = null_space_ratio(z, basis, ranks=shape[3], impl="triton")
    slope = torch.randn(omega.shape)
    (dz,) = torch.autograd.grad((omega * slope).sum(), z)
    wide = z.detach().double().requires_grad_()
    truth = torch.stack([reference.null_space_ratio(wide, a) for a in downs], dim=1)
    (expected,) = torch.autograd.grad((truth * slope).sum(), wide)
    assert (omega - truth).abs().max() <= 1e-6
    assert (dz - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("size", [0.0, 1e-15, 1e-20, 1e-30])
def test_tiny_and_zero_tokens_have_a_value_and_a_gradient(size):
    torch.manual_seed(0)
    z = (torch.randn(5, 16) * size).requires_grad_()
    basis = torch.linalg.qr(torch.randn(16, 3))[0].T.contiguous()
    omega = null_space_ratio(z, basis, impl="triton")
    (dz,) = torch.autograd.grad(omega.sum(), z)
    plain = null_space_ratio(z.detach(), basis, impl="torch")
    assert torch.isfinite(dz).all()
    torch.testing.assert_close(omega, plain, rtol=0, atol=1e-6)
    if size != 1e-15:
        assert (omega == 1).all() and (dz == 0).all()


@pytest.mark.parametrize("dtype", list(selftest.TOLERANCES))
def test_the_self_test_passes_for_sound_kernels(dtype):
    findings = [f for f in selftest.run("cpu", None, "triton") if f.dtype == dtype]
    assert len(findings) == 2 and all(f.passed for f in findings), findings


@pytest.mark.parametrize("damage", ["wrong", "silent", "raising"])
def test_the_self_test_notices_a_bad_kernel(monkeypatch, caplog, damage):
    from nsc_fast.ops import triton_steps

    sound = triton_steps.low_rank_output

    def bad(p, c, coef, **more):
        if damage == "raising":
            raise RuntimeError("no such instruction")
        out = sound(p, c, coef, **more)
        return out * 1.2 if damage == "wrong" else torch.full_like(out, float("nan"))

    monkeypatch.setattr(triton_steps, "low_rank_output", bad)
    _ask_anew()
    try:
        findings = selftest.run("cpu", None, "triton")
        failed = {f.operation for f in findings if not f.passed}
        assert failed == {"merged_linear"}
        if damage == "raising":
            assert any("no such instruction" in f.reason for f in findings)
        # Every operation asks; the reason is told once for each dtype.
        assert not any(selftest.passed(torch.device("cpu")) for _ in range(3))
        assert [r.getMessage().count("failed its self-test on cpu") for r in caplog.records] == [1, 1, 1]
    finally:
        _ask_anew()


def _ask_anew():
    selftest._run.cache_clear()
    selftest._passed.cache_clear()


def test_checkpointed_and_compiled_forms_agree():
    _, _, factors, weight, bias, task, z = problem(*SHAPES[0])
    c = torch.tensor([0.4, 0.7], requires_grad=True)

    def run(z, c):
        y, omega, _ = merged_linear(z, weight, bias, *factors, c, num_tasks=2, task=task, impl="triton")
        return y.square().sum() + omega.sum() + null_space_ratio(z, factors[0], impl="triton").sum()

    z = z.requires_grad_()
    expected = torch.autograd.grad(run(z, c), (z, c))
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(run, z, c, use_reentrant=False), (z, c))
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(z, c), (z, c))
    for a, b, e in zip(again, compiled, expected, strict=True):
        assert torch.equal(a, e)
        assert (b - e).abs().max() <= 1e-6 * e.abs().max()
