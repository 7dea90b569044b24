import contextlib
import math

import pytest
import torch
from compare import ROUNDOFF, assert_no_worse, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Ops, random_factors

from nsc_fast import reference
from nsc_fast.factors import row_basis
from nsc_fast.ops import null_space_ratio, torch_steps
from nsc_fast.reference import CLAMP

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def down(rank: int, d: int) -> torch.Tensor:
    return random_factors(rank, d, 1)[0]


def basis_of(*downs: torch.Tensor) -> torch.Tensor:
    return torch.cat([row_basis(a)[0] for a in downs])


def tokens(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def gradient(value: torch.Tensor, z: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, z, upstream.to(value.dtype))[0]


def compare_with_reference(z, downs, *, several=None, roundings=1e4):
    """Forward, and the gradient for random upstream gradients, of every adapter."""
    several = len(downs) > 1 if several is None else several
    bases = [row_basis(a)[0] for a in downs]
    ranks = [len(b) for b in bases] if several else None
    omega = null_space_ratio(z, torch.cat(bases), ranks=ranks)
    truth = torch.stack([reference.null_space_ratio(z, a) for a in downs], -1)
    if not several:
        truth = truth.squeeze(-1)
    assert_same("omega", omega, truth, roundings)
    upstream = torch.randn_like(truth)
    assert_same("dz", gradient(omega, z, upstream), gradient(truth, z, upstream), roundings)


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (2, 1, 3, 2)])
def test_any_leading_shape(leading):
    compare_with_reference(tokens(*leading, 11), [down(4, 11)])
    compare_with_reference(tokens(*leading, 11), [down(4, 11), down(2, 11)])


@pytest.mark.parametrize(("n", "d", "rank"), [(1, 1, 1), (5, 2, 1), (255, 24, 5), (256, 24, 5), (769, 33, 7)])
def test_odd_sizes(n, d, rank):
    # d = 1 with rank 1 is the clamp.
    compare_with_reference(tokens(n, d), [down(rank, d)])


@pytest.mark.parametrize(("n", "ranks"), [(1, (2,)), (31, (5,)), (32, (5,)), (133, (3, 1)), (300, (60, 57))])
@pytest.mark.usefixtures("large")
def test_products_by_tiles_of_rows(n, ranks):
    compare_with_reference(tokens(n, 24), [down(rank, 24) for rank in ranks])
    compare_with_reference(tokens(24, n).t(), [down(rank, 24) for rank in ranks])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_of_rows_do_not_change_the_result(monkeypatch, dtype):
    """Rows are handled in blocks; here there are many, and a rest."""
    z, q = tokens(1303, 24, dtype=dtype), basis_of(down(5, 24))
    whole = null_space_ratio(z, q)
    dz = gradient(whole, z, torch.ones_like(whole))
    monkeypatch.setattr(torch_steps, "_BLOCK_BYTES", 600 * 24 * 4)
    blocks = null_space_ratio(z, q)
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(gradient(blocks, z, torch.ones_like(whole)), dz)


def test_several_adapters_of_different_rank():
    compare_with_reference(tokens(9, 13), [down(1, 13), down(6, 13), down(3, 13)])


def test_one_adapter_given_as_ranks_keeps_its_dimension():
    compare_with_reference(tokens(2, 9, 13), [down(4, 13)], several=True)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda: tokens(6, 22)[:, ::2], id="last dimension strided"),
        pytest.param(lambda: tokens(11, 6).t(), id="transposed"),
        pytest.param(lambda: tokens(6, 30)[:, 3:14], id="rows with a gap"),
        pytest.param(lambda: tokens(12, 11)[::2], id="every other row"),
        pytest.param(lambda: tokens(1, 11).expand(6, 11), id="expanded rows"),
        pytest.param(lambda: tokens(6, 1).expand(6, 11), id="expanded features"),
        pytest.param(lambda: tokens(3, 11, 4).transpose(1, 2), id="features in the middle"),
        pytest.param(lambda: tokens(4, 3, 11).transpose(0, 1), id="sequence first"),
    ],
)
def test_any_strides(view):
    compare_with_reference(view(), [down(4, 11)])
    compare_with_reference(view(), [down(4, 11), down(2, 11)])


def test_the_basis_may_be_a_transposed_view():
    z, a = tokens(5, 9), down(3, 9)
    q = row_basis(a)[0].t().contiguous().t()
    assert not q.is_contiguous()
    assert_same("omega", null_space_ratio(z, q), reference.null_space_ratio(z, a))


def test_no_tokens():
    z = tokens(3, 0, 8)
    q = basis_of(down(2, 8), down(1, 8))
    omega = null_space_ratio(z, q, ranks=[2, 1])
    assert omega.shape == (3, 0, 2)
    assert gradient(omega, z, torch.ones(3, 0, 2)).shape == z.shape
    assert null_space_ratio(z, q).shape == (3, 0)


def test_a_zero_token_has_ratio_one_and_no_gradient():
    z = tokens(4, 8).detach()
    z[1] = 0
    z.requires_grad_()
    omega = null_space_ratio(z, basis_of(down(3, 8)))
    dz = gradient(omega, z, torch.full((4,), 1e3))
    assert omega[1] == 1.0 and torch.equal(dz[1], torch.zeros(8, dtype=dz.dtype))
    assert dz.isfinite().all()
    compare_with_reference(z, [down(3, 8), down(2, 8)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_token_inside_the_row_space_is_clamped(dtype):
    q = basis_of(down(4, 16)).to(torch.float64)
    inside, outside = torch.randn(3, 4, dtype=q.dtype) @ q, torch.randn(2, 16, dtype=q.dtype)
    # Rounding z to half precision takes it out of the row space again: use tokens that are exact.
    unit = torch.eye(16, dtype=dtype)
    z = torch.cat([unit[:4] * 2, unit[8:10]]) if dtype.itemsize == 2 else torch.cat([inside, outside])
    q = unit[:4] if dtype.itemsize == 2 else q
    z = z.to(dtype).requires_grad_()
    omega = null_space_ratio(z, q)
    dz = gradient(omega, z, torch.ones_like(omega))
    clamped = slice(0, 4 if dtype.itemsize == 2 else 3)
    torch.testing.assert_close(omega[clamped], torch.full_like(omega[clamped], math.sqrt(CLAMP)))
    assert torch.equal(dz[clamped], torch.zeros_like(dz[clamped]))
    assert (omega[-2:] > 0.1).all()


@pytest.mark.parametrize(
    ("radicand", "live"), [(2e-6, True), (1.001e-6, True), (0.999e-6, False), (1e-9, False)]
)
def test_the_gradient_stops_exactly_at_the_clamp(radicand, live):
    z = torch.tensor(
        [[math.sqrt(1 - radicand), math.sqrt(radicand)]], dtype=torch.float64, requires_grad=True
    )
    a = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    omega = null_space_ratio(z, basis_of(a))
    dz = gradient(omega, z, torch.ones(1))
    assert bool(dz.any()) is live
    if live:
        # 1 - u cancels: about six of sixteen digits are left.
        assert_same("dz", dz, gradient(reference.null_space_ratio(z, a), z, torch.ones(1)), roundings=1e7)
    else:
        assert omega.item() == pytest.approx(math.sqrt(CLAMP), rel=1e-15)


def test_another_clamp_is_used_in_both_directions():
    a = down(8, 8)
    z = tokens(3, 8)
    omega = null_space_ratio(z, basis_of(a), clamp=0.25)
    assert torch.equal(omega, torch.full_like(omega, 0.5))
    assert not gradient(omega, z, torch.ones(3)).any()
    b = down(3, 8)
    ours, truth = null_space_ratio(z, basis_of(b), clamp=0.5), reference.null_space_ratio(z, b, clamp=0.5)
    assert_same("omega", ours, truth)
    assert_same("dz", gradient(ours, z, torch.ones(3)), gradient(truth, z, torch.ones(3)))


@pytest.mark.parametrize("rank", [8, 11])
def test_an_adapter_that_spans_everything(rank):
    z = tokens(5, 8)
    q = basis_of(down(rank, 8))
    assert q.shape == (8, 8)
    omega = null_space_ratio(z, q)
    torch.testing.assert_close(omega, torch.full_like(omega, math.sqrt(CLAMP)))
    assert not gradient(omega, z, torch.ones(5)).any()


@pytest.mark.parametrize("n", [3, 700])
def test_a_zero_adapter_has_ratio_one(n):
    z = tokens(n, 8)
    q = basis_of(torch.zeros(2, 8))
    assert q.shape == (0, 8)
    omega = null_space_ratio(z, q)
    assert torch.equal(omega, torch.ones_like(omega))
    assert not gradient(omega, z, torch.ones(n)).any()


@pytest.mark.parametrize("n", [3, 700])
def test_a_zero_adapter_among_others(n):
    compare_with_reference(tokens(n, 8), [torch.zeros(2, 8, dtype=torch.float64), down(3, 8)])


def test_a_rank_deficient_adapter():
    a = down(3, 8)
    a = torch.cat([a, a[:1] * 2, a.sum(0, keepdim=True)])
    compare_with_reference(tokens(5, 8), [a])


def test_the_scale_of_the_adapter_does_not_matter():
    a, z = down(3, 8), tokens(5, 8)
    one, two = null_space_ratio(z, basis_of(a)), null_space_ratio(z, basis_of(1e3 * a))
    assert_same("omega", one, two)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_the_ratio_does_not_depend_on_the_size_of_the_token(scale):
    z, q = tokens(5, 8).detach(), basis_of(down(3, 8))
    small = (z * scale).float().requires_grad_()
    omega = null_space_ratio(small, q)
    torch.testing.assert_close(omega, null_space_ratio(z, q).float(), rtol=1e-5, atol=0)
    dz = gradient(omega, small, torch.ones(5)) * scale
    unit = z.requires_grad_()
    expected = gradient(null_space_ratio(unit, q), unit, torch.ones(5)).float()
    torch.testing.assert_close(dz, expected, rtol=1e-4, atol=1e-5)


class TestWeights:
    def test_weighted_mean(self):
        z, a, b = tokens(3, 5, 9), down(2, 9), down(4, 9)
        weight = torch.rand(3, 5, dtype=torch.float64)
        mean = null_space_ratio(z, basis_of(a, b), ranks=[2, 4], weight=weight)
        truth = torch.stack(
            [(reference.null_space_ratio(z, x) * weight).sum() / weight.sum() for x in (a, b)]
        )
        assert_same("mean", mean, truth)
        upstream = torch.tensor([1.0, -2.0], dtype=torch.float64)
        assert_same("dz", gradient(mean, z, upstream), gradient(truth, z, upstream))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
    def test_an_attention_mask_of_any_dtype(self, dtype):
        z, a = tokens(2, 4, 9), down(2, 9)
        mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).to(dtype)
        mean = null_space_ratio(z, basis_of(a), weight=mask)
        assert mean.shape == ()
        assert_same("mean", mean, reference.ratio_loss(z, a, mask))

    def test_a_single_token(self):
        z, a = tokens(9), down(2, 9)
        mean = null_space_ratio(z, basis_of(a), weight=torch.tensor(2.0))
        assert_same("mean", mean, reference.null_space_ratio(z, a))

    @pytest.mark.parametrize("padding", [math.nan, math.inf])
    def test_padding_may_hold_anything(self, padding):
        clean, a = tokens(2, 4, 9), down(2, 9)
        mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
        z = clean.detach().masked_fill(mask[..., None] == 0, padding).requires_grad_()
        mean = null_space_ratio(z, basis_of(a), weight=mask)
        truth = reference.ratio_loss(clean, a, mask)
        assert_same("mean", mean, truth)
        one = torch.ones(())
        real = mask.bool()
        assert_same("dz", gradient(mean, z, one)[real], gradient(truth, clean, one)[real])

    def test_a_nan_in_a_real_token_shows(self):
        z = tokens(3, 9).detach()
        z[1, 2] = math.nan
        assert null_space_ratio(z, basis_of(down(2, 9)), weight=torch.tensor([1, 1, 0])).isnan()

    @pytest.mark.parametrize("shape", [(2, 3), (0, 3)])
    def test_a_batch_without_a_real_token_is_refused(self, shape):
        z = tokens(*shape, 9)
        with pytest.raises(ValueError, match="empty or fully masked"):
            null_space_ratio(z, basis_of(down(2, 9)), weight=torch.zeros(shape))

    def test_a_mask_that_is_added_to_scores_is_named(self):
        mask = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, -1e9, -1e9]])
        with pytest.raises(ValueError, match="negative, as in a mask that is added .* pass 1 for real"):
            null_space_ratio(tokens(2, 3, 9), basis_of(down(2, 9)), weight=mask)

    def test_the_weights_must_have_one_value_a_token(self):
        with pytest.raises(
            ValueError, match=r"weight has shape \(3, 2\); expected one weight a token, \(2, 3\)"
        ):
            null_space_ratio(tokens(2, 3, 9), basis_of(down(2, 9)), weight=torch.ones(3, 2))


def plain_torch(z, q, ranks):
    """The formula with an orthonormal basis, op by op, everything in the dtype of z."""
    p2 = (z @ q.t()).square()
    inside = torch.stack([part.sum(-1) for part in p2.split(ranks, -1)], -1)
    radicand = 1 - inside / z.square().sum(-1, keepdim=True)
    return torch.where(radicand > CLAMP, radicand, CLAMP).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d", "ranks"), [(50, 64, [8]), (33, 129, [5, 16]), (600, 48, [4, 4, 4])])
def test_no_dtype_loses_more_than_plain_torch_does(dtype, n, d, ranks):
    q = basis_of(*(down(r, d) for r in ranks)).to(dtype)
    z = tokens(n, d, dtype=dtype)
    exact = z.detach().double().requires_grad_()
    upstream = torch.randn(n, len(ranks), dtype=torch.float64)
    ours, plain = null_space_ratio(z, q, ranks=ranks), plain_torch(z, q, ranks)
    truth = plain_torch(exact, q.double(), ranks)
    assert ours.dtype == torch.float32
    assert_no_worse("omega", ours, plain, truth.detach())
    dz = gradient(ours, z, upstream)
    assert dz.dtype == dtype
    assert_no_worse("dz", dz, gradient(plain, z, upstream), gradient(truth, exact, upstream))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    """Not merely as good as half precision: the sums and omega are those of float32."""
    q = basis_of(down(8, 96)).float()
    z = tokens(40, 96, dtype=dtype)
    exact = z.detach().float().requires_grad_()
    half, full = null_space_ratio(z, q), null_space_ratio(exact, q)
    torch.testing.assert_close(half, full, rtol=1e-6, atol=0)
    one = torch.ones(40)
    expected = gradient(full, exact, one)
    # A sum that falls beside the middle between two numbers of the dtype may go to either side.
    torch.testing.assert_close(
        gradient(half, z, one).float(), expected, rtol=2.1 * ROUNDOFF[dtype], atol=1e-7
    )


@settings(max_examples=150)
@given(
    leading=st.lists(st.integers(0, 5), max_size=3),
    d=st.integers(1, 17),
    ranks=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    layout=st.sampled_from(["contiguous", "strided", "transposed", "gap"]),
    zeros=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_fuzz_against_the_reference(leading, d, ranks, layout, zeros, seed):
    torch.manual_seed(seed)
    shape = (*leading, d)
    z = torch.randn(shape, dtype=torch.float64)
    if zeros and z.numel():
        z.view(-1, d)[0] = 0
    if layout == "strided":
        z = z.repeat_interleave(2, -1)[..., ::2]
    elif layout == "transposed":
        z = z.movedim(-1, 0).contiguous().movedim(0, -1)
    elif layout == "gap":
        z = torch.nn.functional.pad(z, (3, 1))[..., 3:-1]
    assert z.shape == shape
    downs = [random_factors(r, d, 1)[0] if r else torch.zeros(1, d, dtype=torch.float64) for r in ranks]
    # Close to the clamp 1 - u has lost up to six digits, and its root's derivative multiplies by 500.
    compare_with_reference(z.requires_grad_(), downs, several=True, roundings=1e9)


@pytest.mark.parametrize("ranks", [None, [2, 3]])
def test_gradcheck(ranks):
    q = basis_of(down(2, 8), down(3, 8)) if ranks else basis_of(down(5, 8))
    weight = torch.rand(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: null_space_ratio(z, q, ranks=ranks), tokens(4, 8))
    assert torch.autograd.gradcheck(
        lambda z: null_space_ratio(z, q, ranks=ranks, weight=weight), tokens(4, 8)
    )


@pytest.mark.parametrize("make", [
    pytest.param(lambda w: w.t().contiguous().t(), id="transposed"),
    pytest.param(lambda w: w[:1, :1].expand(6, 2), id="expanded"),
    pytest.param(lambda w: w.repeat_interleave(2, 1)[:, ::2], id="strided"),
])  # fmt: skip
def test_the_incoming_gradient_may_have_any_strides(make):
    z, a, b = tokens(6, 9), down(2, 9), down(3, 9)
    upstream = make(torch.randn(6, 2, dtype=torch.float64))
    truth = torch.stack([reference.null_space_ratio(z, x) for x in (a, b)], -1)
    ours = null_space_ratio(z, basis_of(a, b), ranks=[2, 3])
    assert_same("dz", gradient(ours, z, upstream), gradient(truth, z, upstream))


def test_one_adapter_s_gradient_alone():
    z, a, b = tokens(6, 9), down(2, 9), down(3, 9)
    ours = null_space_ratio(z, basis_of(a, b), ranks=[2, 3])[:, 1]
    truth = reference.null_space_ratio(z, b)
    assert_same("dz", gradient(ours, z, torch.ones(6)), gradient(truth, z, torch.ones(6)))


def test_without_a_gradient_nothing_is_kept():
    z, q = tokens(6, 9).detach(), basis_of(down(2, 9))
    omega = null_space_ratio(z, q)
    assert not omega.requires_grad
    with torch.no_grad():
        assert not null_space_ratio(z.requires_grad_(), q).requires_grad


def test_the_basis_gets_no_gradient():
    z, q = tokens(6, 9), basis_of(down(2, 9)).requires_grad_()
    null_space_ratio(z, q).sum().backward()
    assert q.grad is None and z.grad is not None


def test_inputs_and_saved_values_are_not_written_to():
    z, q = tokens(700, 9), basis_of(down(2, 9))
    copies = z.detach().clone(), q.clone()
    omega = null_space_ratio(z, q)
    upstream = torch.randn(700, dtype=torch.float64)
    kept = upstream.clone()
    first = torch.autograd.grad(omega, z, upstream, retain_graph=True)[0]
    second = torch.autograd.grad(omega, z, upstream)[0]
    assert torch.equal(first, second)
    assert torch.equal(upstream, kept) and torch.equal(z, copies[0]) and torch.equal(q, copies[1])


def test_the_same_bits_every_time():
    def run():
        torch.manual_seed(3)
        z, q = tokens(700, 40, dtype=torch.float32), basis_of(down(6, 40), down(3, 40)).float()
        omega = null_space_ratio(z, q, ranks=[6, 3])
        return omega, gradient(omega, z, torch.randn(700, 2))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_autocast_does_not_round_the_activations():
    z, q = tokens(5, 32, dtype=torch.float32), basis_of(down(4, 32)).float()
    expected = null_space_ratio(z, q)
    dz = gradient(expected, z, torch.ones(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        omega = null_space_ratio(z, q)
    assert omega.dtype == torch.float32 and torch.equal(omega, expected)
    assert torch.equal(gradient(omega, z, torch.ones(5)), dz)


class TestErrors:
    @pytest.mark.parametrize(
        ("z", "basis", "options", "message"),
        [
            (torch.ones(2, 5), torch.ones(1, 4), {}, r"z has shape \(2, 5\) and the basis \(1, 4\)"),
            (torch.ones(()), torch.ones(1, 4), {}, r"expected \(\.\.\., d\) and \(R, d\)"),
            (torch.ones(2, 4), torch.ones(4), {}, r"expected \(\.\.\., d\) and \(R, d\)"),
            (torch.ones(2, 4).int(), torch.ones(1, 4), {}, "must be floating point, got torch.int32"),
            (
                torch.ones(2, 4),
                torch.ones(3, 4),
                {"ranks": [1, 1]},
                r"ranks \[1, 1\] do not sum to the 3 rows",
            ),
            (torch.ones(2, 4), torch.ones(3, 4), {"ranks": [4, -1]}, "do not sum"),
            (
                torch.ones(2, 4),
                torch.ones(3, 4),
                {"impl": "cuda"},
                "impl='cuda': choose one of 'auto', 'triton'",
            ),
        ],
    )
    def test_bad_input_is_named(self, z, basis, options, message):
        with pytest.raises(ValueError, match=message):
            null_space_ratio(z, basis, **options)

    def test_triton_on_a_cpu_is_refused_with_a_way_out(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(
            RuntimeError, match='impl="triton" cannot run: .*; use impl="auto" or impl="torch"'
        ):
            null_space_ratio(torch.ones(2, 4), torch.ones(1, 4), impl="triton")

    def test_triton_on_float64_is_refused(self):
        with pytest.raises(RuntimeError, match="not float64"):
            null_space_ratio(torch.ones(2, 4).double(), torch.ones(1, 4), impl="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-15, 1e-20, 1e-23, 1e-30])
def test_tokens_too_small_for_their_squares_count_as_zero(dtype, size):
    torch.manual_seed(0)
    down = torch.randn(3, 16, dtype=torch.float64)
    z = (torch.randn(5, 16, dtype=torch.float64) * size).to(dtype).requires_grad_()
    omega = null_space_ratio(z, row_basis(down)[0])
    (dz,) = torch.autograd.grad(omega.sum(), z)
    assert torch.isfinite(omega).all() and torch.isfinite(dz).all()
    if size == 1e-15:
        truth = reference.null_space_ratio(z.detach().double(), down)
        torch.testing.assert_close(omega.double(), truth, rtol=0, atol=1e-6)
    else:
        assert (omega == 1).all() and (dz == 0).all()


class TestHostAndDevice:
    """What makes a GPU wait for the host, or the host for a GPU."""

    def test_the_ranks_are_copied_to_a_device_once(self):
        z, q = tokens(5, 13), basis_of(down(2, 13), down(4, 13))
        with torch.inference_mode():
            null_space_ratio(z, q, ranks=[2, 4])
        with Ops() as ops:
            omega = null_space_ratio(z, q, ranks=[2, 4])
        assert "lift_fresh" not in ops.seen
        assert gradient(omega, z, torch.ones_like(omega)).isfinite().all()

    def test_weights_are_looked_at_unless_told_otherwise(self):
        z, q = tokens(5, 13), basis_of(down(2, 13))
        with Ops() as ops:
            unchecked = null_space_ratio(z, q, weight=torch.ones(5), check=False)
        assert "_local_scalar_dense" not in ops.seen
        assert torch.equal(unchecked, null_space_ratio(z, q, weight=torch.ones(5)))
        assert null_space_ratio(z, q, weight=torch.zeros(5), check=False).isnan()
        with pytest.raises(ValueError, match="sum to zero"):
            null_space_ratio(z, q, weight=torch.zeros(5))
        with pytest.raises(ValueError, match="empty"):
            null_space_ratio(z[:0], q, weight=torch.ones(0), check=False)

    def test_fake_tensors_are_not_kept(self):
        from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

        z, q = tokens(5, 17), basis_of(down(3, 17), down(5, 17))
        mode = FakeTensorMode()
        fake = mode.from_tensor(z.detach()), mode.from_tensor(q)
        with mode, contextlib.suppress(DataDependentOutputException):
            null_space_ratio(*fake, ranks=[3, 5])
        compare_with_reference(z, [down(3, 17), down(5, 17)])
