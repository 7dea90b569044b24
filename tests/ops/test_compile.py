"""The operations inside torch.compile, and as torch.library operators."""

import shutil

import pytest
import torch
from test_merged_linear import Case
from torch.library import opcheck

from nsc_fast.ops import low_rank_update, merged_linear, null_space_ratio

OPS = torch.ops.nsc_fast


@pytest.fixture
def case():
    case = Case(leading=(2, 3))
    for name in ("z", "coefficients"):
        setattr(case, name, getattr(case, name).detach().float().requires_grad_())
    case.weight, case.bias = case.weight.float(), case.bias.float()
    case.factors = (case.factors[0].float(), case.factors[1].float(), case.factors[2])
    return case


@pytest.mark.parametrize("want_z", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_ratio_is_a_sound_operator(case, want_z, dtype):
    z = case.z.detach().reshape(6, -1).to(dtype).requires_grad_(want_z)
    args = (z, case.factors[0], case.stack.segment, 3, 1e-6, "torch")
    opcheck(OPS.null_space_ratio.default, args)


@pytest.mark.parametrize("base", ["weight and bias", "weight", "output"])
@pytest.mark.parametrize("task", [True, False])
@pytest.mark.parametrize("per", ["task", "direction", "core"])
def test_the_merged_layer_is_a_sound_operator(case, base, task, per):
    z = case.z.detach().reshape(6, -1).requires_grad_()
    c = case.coefficients
    if per != "task":
        c = torch.randn((8,) if per == "direction" else (8, 8), requires_grad=True)
    y = torch.randn(6, 9, requires_grad=True) if base == "output" else None
    weight = None if base == "output" else case.weight
    bias = case.bias if base == "weight and bias" else None
    args = (z, *case.factors, c, weight, bias, y, 3, case.task if task else None, 1e-6, "torch")
    opcheck(OPS.merged_linear.default, args)


def everything(case):
    """A function of all operations, with gradients to z and the coefficients."""

    def f(z, c):
        y, omega, _ = merged_linear(z, case.weight, case.bias, *case.factors, c, **case.options)
        y2, _, _ = low_rank_update(torch.tanh(y), z.sin(), *case.factors, c, num_tasks=3)
        every = null_space_ratio(z, case.factors[0], ranks=[3, 1, 4])
        mean = null_space_ratio(z, case.factors[0][:3], weight=case.mask)
        return y2.square().sum() + omega.sum() + every.mean() + mean

    return f


def value_and_gradients(f, case):
    loss = f(case.z, case.coefficients)
    return loss.detach(), *torch.autograd.grad(loss, (case.z, case.coefficients))


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
        ),
    ],
)
def test_one_graph_with_the_gradients_of_eager_mode(case, backend):
    case.mask = torch.ones(2, 3)
    expected = value_and_gradients(everything(case), case)
    torch.compiler.reset()
    compiled = torch.compile(everything(case), fullgraph=True, backend=backend)
    # Inductor adds up in another order.
    for got, e in zip(value_and_gradients(compiled, case), expected, strict=True):
        torch.testing.assert_close(got, e, rtol=1e-5, atol=1e-5)


def test_a_new_number_of_tokens_runs_in_the_same_graph(case):
    calls = []

    def backend(graph, _):
        calls.append(graph)
        return graph

    torch.compiler.reset()
    f = torch.compile(
        lambda z: null_space_ratio(z, case.factors[0], ranks=[3, 1, 4]),
        fullgraph=True,
        dynamic=True,
        backend=backend,
    )
    for n in (5, 9, 700):
        z = torch.randn(n, 11)
        torch.testing.assert_close(f(z), null_space_ratio(z, case.factors[0], ranks=[3, 1, 4]))
    assert len(calls) == 1


def test_a_compiled_loss_without_a_real_token_is_not_a_number(case):
    """The weights cannot be looked at inside a graph: without a real token the loss is NaN."""
    torch.compiler.reset()
    f = torch.compile(
        lambda z, w: null_space_ratio(z, case.factors[0], weight=w), fullgraph=True, backend="aot_eager"
    )
    assert f(case.z, torch.zeros(2, 3)).isnan()


def test_the_choice_of_the_implementation_is_not_traced(monkeypatch):
    """Off the CPU it looks for packages and runs a self-test, which no graph can hold."""
    from nsc_fast.ops import selftest

    monkeypatch.setattr(selftest, "passed", torch.compiler.disable(lambda device: False))
    torch.compiler.reset()
    f = torch.compile(low_rank_update, fullgraph=True, backend="eager")
    y, z, q, columns, c = (torch.empty(s, device="meta") for s in ((5, 4), (5, 8), (2, 8), (4, 2), 1))
    segment = torch.zeros(2, dtype=torch.int32, device="meta")
    assert f(y, z, q, columns, segment, c, num_tasks=1)[0].shape == (5, 4)
