import math
from itertools import product

import pytest
import torch
from compare import assert_no_worse, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_factors
from torch.nn.functional import linear

from nsc_fast import reference
from nsc_fast.factors import Stack, canonical, stack
from nsc_fast.ops import low_rank_update, merged_linear, torch_steps

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SCALES = (2.0, 0.5, 1.0, 3.0, 1.5, 0.25)


class Case:
    """A module with K adapters, its canonical stack, and the textbook computation of the same."""

    def __init__(self, ranks=(3, 1, 4), d_in=11, d_out=9, leading=(7,), bias=True, task=True, per="task"):
        self.d_in, self.d_out, self.n = d_in, d_out, math.prod(leading)
        self.raw = [random_factors(max(r, 1), d_in, d_out) for r in ranks]
        for k, r in enumerate(ranks):
            if r == 0:
                self.raw[k][0].zero_()
        self.scales = SCALES[: len(ranks)]
        self.stack: Stack = stack(
            [
                (str(k), canonical(a, b, s))
                for k, ((a, b), s) in enumerate(zip(self.raw, self.scales, strict=True))
            ]
        )
        self.factors = (self.stack.basis, self.stack.columns, self.stack.segment)
        self.weight = torch.randn(d_out, d_in, dtype=torch.float64) / d_in**0.5
        self.bias = torch.randn(d_out, dtype=torch.float64) if bias else None
        self.z = torch.randn(*leading, d_in, dtype=torch.float64, requires_grad=True)
        total = sum(self.stack.ranks)
        shape = {"task": (len(ranks),), "direction": (total,), "core": (total, total)}[per]
        self.coefficients = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        self.task = None
        if task:
            self.task = torch.randint(-1, len(ranks), (self.n,), dtype=torch.int32)
        self.grad_y = torch.randn(*leading, d_out, dtype=torch.float64)
        self.grad_omega = torch.randn(self.n, dtype=torch.float64)

    def ours(self, **changed):
        now = {
            "z": self.z,
            "weight": self.weight,
            "bias": self.bias,
            "coefficients": self.coefficients,
            **changed,
        }
        return merged_linear(
            now["z"], now["weight"], now["bias"], *self.factors, now["coefficients"], **self.options
        )[:2]

    @property
    def options(self):
        return {"num_tasks": len(self.raw), "task": self.task}

    def truth(self, z=None):
        """W_merge in full; the Gram-inverse ratio of every task, of which each token takes its own."""
        z = self.z if z is None else z
        if self.coefficients.shape == (len(self.raw),):
            downs, ups = zip(*self.raw, strict=True)
            y = reference.merged_linear(z, self.weight, self.bias, downs, ups, self.scales, self.coefficients)
        else:
            c = self.coefficients
            update = self.stack.columns @ (c if c.ndim == 2 else c.diag()) @ self.stack.basis
            y = linear(z, self.weight + update, self.bias)
        if self.task is None:
            return y, None
        flat = z.reshape(self.n, self.d_in)
        every = torch.stack([reference.null_space_ratio(flat, a) for a, _ in self.raw], -1)
        own = every.gather(1, self.task.long().clamp(min=0)[:, None]).squeeze(1)
        return y, torch.where(self.task >= 0, own, 1.0)

    def gradients(self, outputs, inputs=None):
        inputs = [self.z, self.coefficients] if inputs is None else inputs
        pairs = [
            (o, g) for o, g in zip(outputs, (self.grad_y, self.grad_omega), strict=True) if o is not None
        ]
        return torch.autograd.grad(
            [o for o, _ in pairs], inputs, [g.to(o.dtype) for o, g in pairs], allow_unused=True
        )

    def check(self, roundings=1e4, **changed):
        ours, truth = self.ours(**changed), self.truth(changed.get("z"))
        assert_same("y", ours[0], truth[0], roundings)
        if self.task is None:
            assert ours[1] is None
        else:
            assert_same("omega", ours[1], truth[1], roundings)
        for name, got, expected in zip(
            ("dz", "dcoefficients"), self.gradients(ours), self.gradients(truth), strict=True
        ):
            assert_same(name, got, expected, roundings)


@pytest.mark.parametrize("per", ["task", "direction", "core"])
@pytest.mark.parametrize("task", [True, False], ids=["with ratio", "without ratio"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_forward_and_every_gradient(per, task, bias):
    Case(per=per, task=task, bias=bias).check()


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 3, 2), (0,), (2, 0)])
@pytest.mark.parametrize("task", [True, False])
def test_any_leading_shape(leading, task):
    case = Case(leading=leading, task=task)
    assert case.ours()[0].shape == (*leading, 9)
    case.check()


@pytest.mark.parametrize(
    ("n", "d_in", "d_out", "ranks"),
    [
        (1, 1, 1, (1,)),
        (5, 3, 40, (2, 1)),
        (769, 24, 17, (4, 4)),
        (512, 24, 17, (1,)),
        (20, 6, 5, (9, 2)),
        (20, 16, 2, (5, 3)),
        (9, 12, 12, (2, 2, 2, 2, 2, 2)),
    ],
)
def test_odd_sizes_and_ranks_above_the_width(n, d_in, d_out, ranks):
    Case(ranks, d_in, d_out, (n,)).check()


@pytest.mark.parametrize("ranks", [(3, 0), (0, 3, 2), (0,), (2, 0)])
def test_a_zero_adapter(ranks):
    """(2, 0) would have as many singular directions as tasks."""
    for per in ("task", "direction"):
        case = Case(ranks, per=per)
        case.check()
        assert (case.ours()[1][case.task == ranks.index(0)] == 1).all()


@pytest.mark.parametrize("n", [1, 31, 133])
@pytest.mark.usefixtures("large")
def test_products_by_tiles_of_rows(n):
    for _ in range(2):
        Case(leading=(n,), d_in=24, d_out=20).check()


def test_blocks_of_rows_do_not_change_the_result(monkeypatch):
    case = Case(leading=(1303,), d_in=24, d_out=20)
    monkeypatch.setattr(torch_steps, "_BLOCK_BYTES", 600 * 24 * 8)
    case.check()


def strided(shape, layout):
    z = torch.randn(shape, dtype=torch.float64)
    if layout == "last dimension strided":
        z = z.repeat_interleave(2, -1)[..., ::2]
    elif layout == "transposed":
        z = z.movedim(-1, 0).contiguous().movedim(0, -1)
    elif layout == "rows with a gap":
        z = torch.nn.functional.pad(z, (3, 1))[..., 3:-1]
    elif layout == "expanded rows":
        z = z[:1].expand(shape)
    assert z.shape == shape
    return z.requires_grad_()


@pytest.mark.parametrize(
    "layout", ["last dimension strided", "transposed", "rows with a gap", "expanded rows"]
)
@pytest.mark.parametrize("task", [True, False])
def test_any_strides_of_the_input_and_the_incoming_gradient(layout, task):
    case = Case(leading=(6, 2), task=task)
    case.z = strided((6, 2, 11), layout)
    case.grad_y = strided((6, 2, 9), layout).detach()
    case.grad_omega = torch.tensor([0.3], dtype=torch.float64).expand(12)
    case.check()


def test_a_transposed_view_as_the_weight():
    """GPT-2's Conv1D stores (d_in, d_out)."""
    case = Case()
    case.check(weight=case.weight.t().contiguous().t())


@pytest.mark.parametrize("want_z", [True, False])
@pytest.mark.parametrize("want_coefficients", [True, False])
@pytest.mark.parametrize("used", ["both", "y", "omega"])
def test_only_the_gradients_that_are_wanted(want_z, want_coefficients, used):
    case = Case()
    truth = case.truth()
    z, c = (
        case.z.detach().requires_grad_(want_z),
        case.coefficients.detach().requires_grad_(want_coefficients),
    )
    ours = case.ours(z=z, coefficients=c)
    keep = slice(0, 1) if used == "y" else slice(1, 2) if used == "omega" else slice(0, 2)
    grads = (case.grad_y, case.grad_omega)[keep]
    if not (want_z or want_coefficients):
        assert not any(o.requires_grad for o in ours)
        return
    wanted = [t for t in (z, c) if t.requires_grad]
    got = torch.autograd.grad(ours[keep], wanted, grads, allow_unused=True)
    originals = [o for o, t in ((case.z, z), (case.coefficients, c)) if t.requires_grad]
    expected = torch.autograd.grad(truth[keep], originals, grads, allow_unused=True)
    for g, e, t in zip(got, expected, wanted, strict=True):
        if e is None:  # omega does not depend on the coefficients of its own layer
            assert g is None or torch.equal(g, torch.zeros_like(t))
        else:
            assert_same("gradient", g, e)


def test_z_without_a_gradient_needs_no_product_with_the_weight(monkeypatch):
    case = Case()
    z = case.z.detach()
    y, omega = case.ours(z=z)
    monkeypatch.setattr(torch_steps, "input_gradient", None)
    got = torch.autograd.grad(y, case.coefficients, case.grad_y)[0]
    monkeypatch.undo()
    assert_same("dcoefficients", got, case.gradients(case.truth())[1])


def test_frozen_tensors_get_no_gradient():
    case = Case()
    tensors = [case.weight, case.bias, *case.factors[:2]]
    for t in tensors:
        t.requires_grad_()
    y, omega = case.ours()
    (y.sum() + omega.sum()).backward()
    assert [t.grad for t in tensors] == [None] * 4 and case.z.grad is not None


def test_tokens_of_no_task_have_ratio_one_and_no_ratio_gradient():
    case = Case()
    case.task = torch.full((7,), -1, dtype=torch.int32)
    y, omega = case.ours()
    assert torch.equal(omega, torch.ones_like(omega))
    (dz,) = torch.autograd.grad(omega, case.z, case.grad_omega)
    assert not dz.any()


def test_zero_tokens_and_tokens_inside_the_row_space():
    case = Case()
    with torch.no_grad():
        case.z[0] = 0
        case.z[1] = case.raw[1][0][0] * 3
    case.task = torch.tensor([0, 1, 1, 2, 0, -1, 2], dtype=torch.int32)
    y, omega = case.ours()
    assert omega[0] == 1 and omega[1].item() == pytest.approx(1e-3)
    case.check()
    (dz,) = torch.autograd.grad(case.ours()[1], case.z, case.grad_omega)
    assert not dz[:2].any() and dz[2].any()


def test_the_ratio_is_that_of_the_standalone_operation():
    from nsc_fast.ops import null_space_ratio

    case = Case()
    every = null_space_ratio(case.z, case.stack.basis, ranks=case.stack.ranks)
    own = every.gather(1, case.task.long().clamp(min=0)[:, None]).squeeze(1)
    assert_same("omega", case.ours()[1], torch.where(case.task >= 0, own, 1.0))


class TestLowRankUpdate:
    def apply(self, case, y, **changed):
        z, c = changed.get("z", case.z), changed.get("coefficients", case.coefficients)
        return low_rank_update(y, z, *case.factors, c, **case.options)[:2]

    @pytest.mark.parametrize("per", ["task", "direction", "core"])
    @pytest.mark.parametrize("task", [True, False])
    @pytest.mark.parametrize("leading", [(7,), (2, 3), (), (0,), (600,)])
    def test_forward_and_every_gradient(self, per, task, leading):
        case = Case(per=per, task=task, leading=leading)
        base = torch.randn(*leading, 9, dtype=torch.float64, requires_grad=True)
        case.weight, case.bias = torch.zeros_like(case.weight), None
        y, omega = self.apply(case, base)
        y_truth, omega_truth = case.truth()
        assert_same("y", y, base + y_truth)
        inputs = [case.z, case.coefficients, base]
        got = case.gradients((y, omega), inputs)
        expected = case.gradients((base + y_truth, omega_truth), inputs)
        for name, g, e in zip(("dz", "dcoefficients", "dy"), got, expected, strict=True):
            assert_same(name, g, e)

    def test_the_gradient_of_the_base_output_is_exactly_the_incoming_one(self):
        case = Case()
        base = torch.randn(7, 9, dtype=torch.float64, requires_grad=True)
        y, omega = self.apply(case, base)
        assert torch.equal(case.gradients((y, omega), [base])[0], case.grad_y)

    def test_a_frozen_base_output(self):
        case = Case()
        y, omega = self.apply(case, torch.zeros(7, 9, dtype=torch.float64))
        case.weight, case.bias = torch.zeros_like(case.weight), None
        for g, e in zip(case.gradients((y, omega)), case.gradients(case.truth()), strict=True):
            assert_same("gradient", g, e)

    def test_the_base_output_is_not_written_to(self):
        case = Case()
        base = torch.randn(7, 9, dtype=torch.float64)
        kept = base.clone()
        self.apply(case, base)
        assert torch.equal(base, kept)

    def test_a_base_layer_may_compute_in_another_dtype(self):
        """Quantised layers return their compute dtype whatever they are given."""
        case = Case()
        base = torch.randn(7, 9).bfloat16()
        y, omega = self.apply(case, base, z=case.z.detach().float().requires_grad_())
        assert y.dtype == torch.bfloat16 and omega.dtype == torch.float32
        zeros, _ = self.apply(case, torch.zeros(7, 9, dtype=torch.float64))
        torch.testing.assert_close(y.double(), base.double() + zeros, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "d_in", "d_out", "ranks"), [(40, 64, 48, (8, 8)), (600, 48, 33, (5, 3, 4)), (17, 129, 65, (16,))]
)
@pytest.mark.parametrize("per", ["task", "core"])
def test_no_dtype_loses_more_than_plain_torch_does(dtype, n, d_in, d_out, ranks, per):
    case = Case(ranks, d_in, d_out, (n,), per=per)
    weight, bias, q, columns = (t.to(dtype) for t in (case.weight, case.bias, *case.factors[:2]))
    z = case.z.detach().to(dtype)
    c = case.coefficients.detach().float()
    segment, task = case.stack.segment.long(), case.task
    grad_y, grad_omega = case.grad_y.to(dtype), case.grad_omega

    def plain(z, w, b, q, columns, c):
        p = z @ q.t()
        inner = p * c.to(z.dtype)[segment] if per == "task" else p @ c.to(z.dtype).t()
        y = linear(z, w, b) + inner @ columns.t()
        u = (p.square() * (segment == task[:, None])).sum(-1) / z.square().sum(-1)
        return y, (1 - u).clamp(min=1e-6).sqrt()

    def run(f, *tensors):
        z, c = tensors[0].clone().requires_grad_(), tensors[-1].clone().requires_grad_()
        out = f(z, *tensors[1:-1], c)
        ups = [grad_y.to(out[0].dtype), grad_omega.to(out[1].dtype)]
        return [*(o.detach() for o in out), *torch.autograd.grad(out, (z, c), ups)]

    def ours(z, w, b, q, columns, c):
        return merged_linear(z, w, b, q, columns, case.stack.segment, c, **case.options)[:2]

    inputs = (z, weight, bias, q, columns, c)
    truth = run(plain, *(t.double() for t in inputs))
    names = ("y", "omega", "dz", "dcoefficients")
    for name, o, p, t in zip(names, run(ours, *inputs), run(plain, *inputs), truth, strict=True):
        assert_no_worse(name, o, p, t)


@pytest.mark.parametrize("used", ["y omega p", "p", "y p", "omega p"])
def test_the_projection_may_enter_a_loss(used):
    case = Case(leading=(3, 5))
    z = case.z.detach().clone().requires_grad_()
    basis, columns, segment = case.factors
    widths = {"y": (15, columns.shape[0]), "omega": (15,), "p": (15, len(basis))}
    weights = {name: torch.randn(shape) for name, shape in widths.items()}

    def loss(y, omega, p):
        outputs = {"y": y.reshape(15, -1), "omega": omega, "p": p}
        return sum((outputs[name] * weights[name].double()).sum() for name in used.split())

    got = merged_linear(z, case.weight, case.bias, *case.factors, case.coefficients, **case.options)
    assert_same("p", got.p, (z @ basis.t()).reshape(15, -1))
    inputs = (z, case.coefficients)
    grads = torch.autograd.grad(loss(*got), inputs, allow_unused=True)
    expected = torch.autograd.grad(
        loss(*case.truth(z), (z @ basis.t()).reshape(15, -1)), inputs, allow_unused=True
    )
    for name, ours, theirs in zip(("dz", "dcoefficients"), grads, expected, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert_same(name, ours, theirs)


def test_dtypes_of_the_results():
    case = Case()
    half = [t.to(torch.bfloat16) for t in (case.z.detach(), case.weight, case.bias)]
    half[0].requires_grad_()
    c = case.coefficients.detach().float().requires_grad_()
    y, omega, _ = merged_linear(*half, *case.factors, c, **case.options)
    assert (y.dtype, omega.dtype) == (torch.bfloat16, torch.float32)
    dz, dc = torch.autograd.grad((y, omega), (half[0], c), (case.grad_y.to(y.dtype), case.grad_omega.float()))
    assert (dz.dtype, dc.dtype) == (torch.bfloat16, torch.float32)


def test_autocast_runs_the_layer_in_its_dtype():
    case = Case()
    z, w, b = (t.detach().float() for t in (case.z, case.weight, case.bias))
    c = case.coefficients.detach().float().requires_grad_()
    z.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, omega, _ = merged_linear(z, w, b, *case.factors, c, **case.options)
        assert y.dtype == linear(z, w, b).dtype == torch.bfloat16
    half = z.detach().bfloat16().requires_grad_()
    y2, omega2, _ = merged_linear(half, w.bfloat16(), b.bfloat16(), *case.factors, c, **case.options)
    assert torch.equal(y, y2) and torch.equal(omega, omega2)
    ups = case.grad_y.bfloat16(), case.grad_omega.float()
    dz, dc = torch.autograd.grad((y, omega), (z, c), ups)
    dz2, dc2 = torch.autograd.grad((y2, omega2), (half, c), ups)
    assert dz.dtype == torch.float32 and torch.equal(dz, dz2.float()) and torch.equal(dc, dc2)


def test_autocast_of_a_low_rank_update_follows_the_base_output():
    case = Case()
    z, c = case.z.detach().float(), case.coefficients.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base = linear(z, case.weight.float())
        y, _, _ = low_rank_update(base, z, *case.factors, c, **case.options)
        y.sum().backward()
    assert y.dtype == torch.bfloat16 and c.grad.dtype == torch.float32


@settings(max_examples=100)
@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    d_in=st.integers(1, 14),
    d_out=st.integers(1, 14),
    ranks=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    layout=st.sampled_from(["contiguous", "last dimension strided", "transposed", "rows with a gap"]),
    options=st.sampled_from(list(product([True, False], [True, False], ["task", "direction", "core"]))),
    seed=st.integers(0, 10**6),
)
def test_fuzz_against_the_reference(leading, d_in, d_out, ranks, layout, options, seed):
    torch.manual_seed(seed)
    bias, task, per = options
    case = Case(ranks, d_in, d_out, tuple(leading), bias, task, per)
    case.z = strided((*leading, d_in), layout)
    # Close to the clamp 1 - u has lost up to six digits, and its root's derivative multiplies by 500.
    case.check(roundings=1e9)


@pytest.mark.parametrize("per", ["task", "direction", "core"])
def test_gradcheck(per):
    case = Case(leading=(3,), per=per)
    case.task = torch.tensor([0, 2, -1], dtype=torch.int32)
    check = torch.autograd.gradcheck
    assert check(lambda z, c: case.ours(z=z, coefficients=c), (case.z, case.coefficients))
    base = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    assert check(
        lambda y, z, c: low_rank_update(y, z, *case.factors, c, **case.options),
        (base, case.z, case.coefficients),
    )


def test_inputs_and_saved_values_are_not_written_to():
    case = Case(leading=(600,))
    inputs = [case.z, case.weight, case.bias, *case.factors, case.coefficients, case.task]
    inputs += [case.grad_y, case.grad_omega]
    copies = [t.detach().clone() for t in inputs]
    out = case.ours()
    ups = (case.grad_y, case.grad_omega)
    first = torch.autograd.grad(out, (case.z, case.coefficients), ups, retain_graph=True)
    second = torch.autograd.grad(out, (case.z, case.coefficients), ups)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_the_same_bits_every_time():
    def run():
        torch.manual_seed(3)
        case = Case(leading=(700,), d_in=40, d_out=30)
        z, c = (t.detach().float().requires_grad_() for t in (case.z, case.coefficients))
        out = case.ours(z=z, weight=case.weight.float(), bias=case.bias.float(), coefficients=c)
        grads = torch.autograd.grad(out, (z, c), (case.grad_y.float(), case.grad_omega.float()))
        return *out, *grads

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


class TestMemory:
    """What is kept for backward, beyond the frozen tensors that exist anyway."""

    def kept(self, case, run) -> dict[int, int]:
        """Bytes of every storage that autograd keeps, without weights, factors, task ids and coefficients."""
        frozen = [case.weight, case.bias, *case.factors, case.coefficients, case.task]
        known = {t.untyped_storage().data_ptr() for t in frozen if t is not None}
        found: dict[int, int] = {}
        alive = []

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known and storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = run()
        assert out[0].requires_grad
        return found

    N, R = 200, 8

    def test_a_layer_outside_the_targets_keeps_its_low_rank_coordinates_alone(self):
        case = Case(leading=(self.N,), task=False)
        kept = self.kept(case, case.ours)
        assert case.z.untyped_storage().data_ptr() not in kept
        assert sum(kept.values()) == 8 * self.N * self.R

    def test_a_target_layer_keeps_its_input_and_two_scalars_a_token_as_well(self):
        case = Case(leading=(self.N,))
        kept = self.kept(case, case.ours)
        z = kept.pop(case.z.untyped_storage().data_ptr())
        assert z == 8 * self.N * case.d_in
        assert sum(kept.values()) == 8 * self.N * (self.R + 2)

    def test_a_target_that_is_the_first_layer_does_not_keep_its_input(self):
        case = Case(leading=(self.N,))
        z = case.z.detach()
        kept = self.kept(case, lambda: case.ours(z=z))
        assert z.untyped_storage().data_ptr() not in kept

    def test_a_low_rank_update_does_not_keep_the_base_output(self):
        case = Case(leading=(self.N,), task=False)
        base = torch.randn(self.N, 9, dtype=torch.float64, requires_grad=True)
        kept = self.kept(
            case, lambda: low_rank_update(base, case.z, *case.factors, case.coefficients, **case.options)
        )
        assert sum(kept.values()) == 8 * self.N * self.R

    def test_the_ratio_keeps_its_input_the_coordinates_and_two_scalars_a_token(self):
        from nsc_fast.ops import null_space_ratio

        case = Case(leading=(self.N,))
        kept = self.kept(case, lambda: (null_space_ratio(case.z, case.stack.basis),))
        segment = 4 * self.R
        assert sum(kept.values()) == 8 * self.N * (case.d_in + self.R + 2) + segment


@pytest.mark.parametrize(
    ("impl", "error", "message"),
    [
        ("cuda", ValueError, "impl='cuda': choose one of 'auto', 'triton', 'torch'"),
        ("triton", RuntimeError, "not float64"),
    ],
)
def test_an_implementation_that_cannot_run_is_refused(impl, error, message):
    case = Case()
    with pytest.raises(error, match=message):
        merged_linear(case.z, case.weight, None, *case.factors, case.coefficients, **case.options, impl=impl)
    with pytest.raises(error, match=message):
        low_rank_update(case.grad_y, case.z, *case.factors, case.coefficients, **case.options, impl=impl)
