"""Smaller forms of what autograd keeps: the same bits, fewer bytes, nothing left behind."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nsc_fast.memory import LiveBytes
from nsc_fast.saved import compact_saved

ROWS, WIDTH = 3, 64


def gated(x, *, activation=F.silu):
    gate, up = x * 1.25, x * 0.75
    return activation(gate) * up


def tanh_gated(x):
    return gated(x, activation=lambda gate: F.gelu(gate, approximate="tanh"))


def gelu_gated(x):
    return gated(x, activation=F.gelu)


def norm(x):
    """As in the models' own norms: in float32 whatever comes in."""
    wide = (x * 1.0).to(torch.float32)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def grouped(x):
    """Two heads of keys, each for two heads of queries, as transformers' ``repeat_kv`` lays them out."""
    keys = (x * 0.5).view(ROWS, 2, WIDTH // 2)
    repeated = keys[:, :, None, :].expand(ROWS, 2, 2, WIDTH // 2).reshape(ROWS, 4, WIDTH // 2)
    return repeated.sin() * repeated


def run(function, dtype, compact):
    """Result, gradient, and the bytes alive for the backward pass."""
    x = torch.linspace(-4, 4, ROWS * WIDTH, dtype=torch.float64).to(dtype).view(ROWS, WIDTH)
    x.requires_grad_()
    with LiveBytes() as live:
        if compact:
            with compact_saved():
                y = function(x)
        else:
            y = function(x)
        kept = live.now
        y.backward(torch.ones_like(y))
        left = live.now - y.untyped_storage().nbytes() - x.grad.untyped_storage().nbytes()
    return y.detach(), x.grad, kept, left


VALUES = ROWS * WIDTH


@pytest.mark.parametrize(
    "function, dtype, saved",
    [
        (gated, torch.float32, 4 * VALUES),
        (gated, torch.bfloat16, 2 * VALUES),
        (tanh_gated, torch.float32, 4 * VALUES),
        (gelu_gated, torch.float64, 8 * VALUES),
        # The narrow copy is made once, although two operations save the wide one.
        (norm, torch.bfloat16, 2 * VALUES),
        (norm, torch.float16, 2 * VALUES),
        (norm, torch.float32, 0),
        # One of two copies.
        (grouped, torch.float32, 4 * VALUES),
    ],
)
def test_same_bits_from_fewer_bytes(function, dtype, saved):
    want, grad, kept, _ = run(function, dtype, compact=False)
    y, own, smaller, left = run(function, dtype, compact=True)
    assert torch.equal(y, want) and torch.equal(own, grad)
    assert kept - smaller == saved
    assert left <= 8, "scalars at most"


def narrowed(x):
    return ((x * 1.0).to(torch.bfloat16) ** 2).float()


def spread(x):
    """Expanded without a copy, and a copy that was not expanded."""
    return (x * 1.0).expand(2, ROWS, WIDTH).sin() * (x * 2.0).view(WIDTH, ROWS).t().reshape(ROWS, WIDTH).sin()


def overwritten(x):
    """What is saved is no longer what the activation made."""
    return F.silu(x * 1.0).mul_(2.0).sin()


@pytest.mark.parametrize("function", [narrowed, spread, overwritten])
def test_what_has_no_smaller_form_is_kept_as_it_is(function):
    want, grad, kept, _ = run(function, torch.float32, compact=False)
    y, own, same, _ = run(function, torch.float32, compact=True)
    assert torch.equal(y, want) and torch.equal(own, grad)
    assert same == kept


def test_a_graph_that_is_dropped_leaves_nothing():
    x = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    for function in (gated, norm, grouped, torch.exp):
        with LiveBytes() as live, compact_saved():
            y = function(x)
            assert live.now > y.untyped_storage().nbytes() or function is torch.exp
            del y
            assert live.now == 0, function


def test_a_graph_that_is_kept_can_be_gone_through_again():
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with compact_saved():
        y = gated(x).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)


def test_a_leaf_may_be_widened_and_repeated():
    leaf = nn.Parameter(torch.randn(2, 1, 8).bfloat16())
    with compact_saved():
        wide = leaf.float()
        (wide * wide).sum().backward()
    assert torch.equal(leaf.grad, (2 * leaf.detach().float()).bfloat16())
    leaf.grad = None
    with compact_saved():
        repeated = leaf.expand(2, 3, 8).reshape(6, 8)
        (repeated * repeated).sum().backward()
    assert torch.equal(leaf.grad, 6 * leaf.detach())
