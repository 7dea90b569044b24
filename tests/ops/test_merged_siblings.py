"""Layers that receive one z, computed together: the same as each of them alone."""

import pytest
import torch
from compare import assert_same
from tiny import random_factors

from nsc_fast.factors import canonical, stack
from nsc_fast.ops import Sibling, low_rank_update, merged_linear, merged_siblings

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TASKS = 3
# Mixed ranks within a layer and different ones from layer to layer, widths as of queries, keys and values.
RANKS = ((3, 1, 4), (2, 2, 2), (1, 5, 3))
WIDTHS = (9, 4, 6)


class Family:
    def __init__(self, leading=(7,), d_in=13, per="task", given=False, biased=True, dtype=torch.float64):
        torch.manual_seed(0)
        self.stacks = [
            stack([(str(k), canonical(*random_factors(r, d_in, width))) for k, r in enumerate(ranks)])
            for ranks, width in zip(RANKS, WIDTHS, strict=True)
        ]
        self.n = torch.Size(leading).numel()
        self.z = torch.randn(*leading, d_in, dtype=dtype, requires_grad=True)
        self.task = torch.randint(-1, TASKS, (self.n,), dtype=torch.int32)
        self.layers, self.leaves = [], [self.z]
        for stacked, width in zip(self.stacks, WIDTHS, strict=True):
            total = sum(stacked.ranks)
            shape = {"task": (TASKS,), "direction": (total,), "core": (total, total)}[per]
            c = torch.randn(shape, dtype=dtype, requires_grad=True)
            own = stacked.columns.to(dtype), stacked.segment, c
            self.leaves.append(c)
            if given:
                y = torch.randn(*leading, width, dtype=dtype, requires_grad=True)
                self.layers.append(Sibling(*own, y=y))
                self.leaves.append(y)
            else:
                bias = torch.randn(width, dtype=dtype) if biased else None
                self.layers.append(Sibling(*own, torch.randn(width, d_in, dtype=dtype), bias))
        self.bases = [stacked.basis.to(dtype) for stacked in self.stacks]
        self.segment = torch.cat([s.segment + i * TASKS for i, s in enumerate(self.stacks)])
        self.grads = [torch.randn(*leading, width, dtype=dtype) for width in WIDTHS]

    def together(self, task, **how):
        how = {"num_tasks": TASKS, "task": task, **how}
        return merged_siblings(self.z, torch.cat(self.bases), self.segment, self.layers, **how)

    def apart(self, task):
        out = []
        for basis, one in zip(self.bases, self.layers, strict=True):
            factors, how = (basis, *one[:3]), {"num_tasks": TASKS, "task": task}
            if one.y is None:
                out.append(merged_linear(self.z, one.weight, one.bias, *factors, **how))
            else:
                out.append(low_rank_update(one.y, self.z, *factors, **how))
        return out

    def loss(self, outputs, use=(0, 1, 2), ratios=(0, 1, 2), projections=()):
        loss = self.z.new_zeros(())
        for i, done in enumerate(outputs):
            if i in use:
                loss = loss + (done.y * self.grads[i]).sum()
            if done.omega is not None and i in ratios:
                loss = loss + (i + 1) * (done.omega * torch.linspace(0, 1, self.n)).sum()
            if i in projections:
                loss = loss + done.p.square().sum() / (i + 1)
        return loss

    def gradients(self, outputs, **kinds):
        return torch.autograd.grad(self.loss(outputs, **kinds), self.leaves, allow_unused=True)


def assert_alike(family, task, roundings=1e3, **kinds):
    got, expected = family.together(task), family.apart(task)
    for a, b in zip(got, expected, strict=True):
        assert_same("y", a.y, b.y, roundings)
        assert_same("p", a.p, b.p, roundings)
        assert (a.omega is None) == (b.omega is None) == (task is None)
        if task is not None:
            assert_same("omega", a.omega, b.omega, roundings)
    pairs = zip(family.gradients(got, **kinds), family.gradients(expected, **kinds), strict=True)
    for a, b in pairs:
        if b is None:
            assert a is None or not a.any()
        else:
            assert_same("gradient", a, b, roundings)


@pytest.mark.parametrize("per", ["task", "direction", "core"])
@pytest.mark.parametrize("given", [False, True], ids=["weights", "outputs"])
@pytest.mark.parametrize("ratio", [True, False])
def test_the_same_as_each_alone(per, given, ratio):
    family = Family(per=per, given=given)
    assert_alike(family, family.task if ratio else None)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (300,)])
def test_any_leading_shape(leading):
    family = Family(leading, biased=False)
    assert_alike(family, family.task)


@pytest.mark.parametrize(
    "kinds",
    [
        {"use": (1,)},
        {"use": (), "ratios": (2,)},
        {"use": (0, 2), "ratios": ()},
        {"use": (0,), "ratios": (1,), "projections": (2,)},
        {"use": (), "ratios": (), "projections": (0, 1)},
    ],
)
def test_any_part_may_enter_the_loss(kinds):
    family = Family()
    assert_alike(family, family.task, **kinds)


def test_frozen_activations_still_give_the_coefficients_gradients():
    family = Family()
    family.z = family.z.detach()
    family.leaves = family.leaves[1:]
    assert_alike(family, family.task)


def test_gradcheck():
    family = Family((4,))

    def f(*leaves):
        family.z, family.layers = (
            leaves[0],
            [one._replace(coefficients=c) for one, c in zip(family.layers, leaves[1:], strict=True)],
        )
        return [t for done in family.together(family.task) for t in (done.y, done.omega)]

    assert torch.autograd.gradcheck(f, family.leaves)


def test_autocast_rounds_as_for_each_alone():
    family = Family(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = family.together(family.task), family.apart(family.task)
    for a, b in zip(got, expected, strict=True):
        assert a.y.dtype == torch.bfloat16
        torch.testing.assert_close(a.y, b.y, rtol=2**-7, atol=1e-3)
        torch.testing.assert_close(a.omega, b.omega, rtol=0, atol=1e-6)


def test_compiled_in_one_graph():
    family = Family((2, 3))
    torch.compiler.reset()
    compiled = torch.compile(family.together, fullgraph=True, backend="aot_eager")
    got, expected = compiled(family.task), family.apart(family.task)
    for a, b in zip(family.gradients(got), family.gradients(expected), strict=True):
        assert_same("gradient", a, b, 1e3)
