"""Smaller forms of what autograd keeps: the same bits, fewer bytes, nothing left behind."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nsc_fast.memory import LiveBytes
from nsc_fast.saved import compact_saved, kept_once

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


def scaled_norm(x):
    """What the layer behind a norm receives, and keeps where its ratio is wanted."""
    weight = torch.linspace(0.5, 2, WIDTH, dtype=x.dtype)
    return (weight * norm(x)).view(-1).sin()


def gated_input(x):
    return gated(x).view(-1, 2).sin()


def gelu_input(x):
    return F.gelu(x * 1.5).view(-1, 2).sin()


def overwritten(x):
    """What is saved was made by the activation and doubled in its place."""
    return F.silu(x * 1.5).mul_(2.0).sin()


def run(function, dtype, compact):
    """Result, gradient, and the bytes alive for the backward pass."""
    x = torch.linspace(-4, 4, ROWS * WIDTH, dtype=torch.float64).to(dtype).view(ROWS, WIDTH)
    x.requires_grad_()
    with LiveBytes() as live:
        with compact_saved() if compact else nullcontext():
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
        # What goes into the sine, and in the first cases more of what was there before.
        (scaled_norm, torch.float32, 4 * VALUES),
        (scaled_norm, torch.bfloat16, (2 + 2) * VALUES),
        (gated_input, torch.float32, (4 + 4) * VALUES),
        (gelu_input, torch.bfloat16, 2 * VALUES),
        (overwritten, torch.float32, 4 * VALUES),
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


@pytest.mark.parametrize("function", [narrowed, spread])
def test_what_has_no_smaller_form_is_kept_as_it_is(function):
    want, grad, kept, _ = run(function, torch.float32, compact=False)
    y, own, same, _ = run(function, torch.float32, compact=True)
    assert torch.equal(y, want) and torch.equal(own, grad)
    assert same == kept


def test_a_kept_tensor_that_was_changed_in_place_is_not_used():
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with compact_saved():
        kept = x * 1.0
        y = kept.sin()
        kept.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_a_tensor_that_is_saved_again_after_a_change_is_the_new_one():
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with compact_saved():
        y = F.silu(x * 1.5)
        first = y.sin()
        (first + y.mul_(2.0).sin()).sum().backward()
    own, x.grad = x.grad, None
    y = F.silu(x * 1.5)
    (y.sin() + (2.0 * y).sin()).sum().backward()
    assert torch.allclose(own, x.grad, rtol=1e-6)


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


def test_what_a_checkpoint_keeps_is_not_asked_for_again():
    def part(x):
        return F.gelu(x * 1.5)

    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with compact_saved():
        y = checkpoint(part, x, use_reentrant=False)
        kept_once(y)
        y.view(-1).sin().sum().backward()
    own, x.grad = x.grad, None
    part(x).sin().sum().backward()
    assert torch.equal(own, x.grad)


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
