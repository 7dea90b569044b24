import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_factors

from nsc_fast.factors import LowRankUpdate, canonical, row_basis, stack

# float64 inside, and a chain of two QR and two SVD: a few hundred roundings of 1e-16.
EXACT = 1e-12


def make(kind: str, r: int, d_in: int, d_out: int, seed: int, scale: float) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    a, b = random_factors(r, d_in, d_out)
    if kind == "dependent rows of A":
        a[-1] = 2 * a[0]
    elif kind == "zero A":
        a.zero_()
    elif kind == "zero B":
        b.zero_()
    elif kind == "B annihilates a direction":
        b[:, -1] = 0
    elif kind == "rows of very different size":
        a *= torch.logspace(0, -6, r, dtype=a.dtype)[:, None]
    return a * scale, b / scale**0.5


KINDS = [
    "full",
    "dependent rows of A",
    "zero A",
    "zero B",
    "B annihilates a direction",
    "rows of very different size",
]


def assert_canonical(u: LowRankUpdate) -> None:
    eye = torch.eye(u.rank, dtype=torch.float64)
    torch.testing.assert_close(u.basis @ u.basis.T, eye, rtol=0, atol=EXACT)
    top = float(u.singular_values.max()) if u.rank else 1.0
    gram = u.columns.T @ u.columns
    torch.testing.assert_close(
        gram, u.singular_values.square().diag(), rtol=0, atol=EXACT * max(top**2, 1e-300)
    )
    assert (u.singular_values >= 0).all()
    assert (u.singular_values.diff() <= EXACT * top).all()
    assert {u.columns.dtype, u.basis.dtype, u.singular_values.dtype} == {torch.float64}


@settings(max_examples=250)
@given(
    kind=st.sampled_from(KINDS),
    r=st.integers(1, 9),
    d_in=st.integers(1, 12),
    d_out=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-6, 1.0, 1e5]),
    scaling=st.sampled_from([0.0, 0.25, 2.0, -3.0]),
)
def test_the_canonical_product_is_the_update(kind, r, d_in, d_out, seed, scale, scaling):
    a, b = make(kind, r, d_in, d_out, seed, scale)
    u = canonical(a, b, scaling)
    if scaling >= 0:
        assert_canonical(u)
    error = (u.dense() - scaling * b @ a).norm()
    assert error <= EXACT * abs(scaling) * b.norm() * a.norm()
    assert u.shape == (d_out, d_in)
    assert u.rank == torch.linalg.matrix_rank(a)
    # The row space of A, whatever B does to it: the null-space ratio is a property of A alone.
    inside = a @ u.basis.T @ u.basis
    assert (inside - a).norm() <= EXACT * a.norm()


@pytest.mark.parametrize(
    ("r", "d_in", "d_out"), [(4, 32, 24), (16, 16, 40), (20, 12, 40), (20, 40, 12), (1, 1, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_relative_error_of_the_update_is_below_1e_12(r, d_in, d_out, dtype):
    a, b = random_factors(r, d_in, d_out, dtype)
    u = canonical(a, b, 2.0)
    assert_canonical(u)
    truth = 2.0 * b.double() @ a.double()
    assert (u.dense() - truth).norm() <= EXACT * truth.norm()
    torch.testing.assert_close(u.energy, float(truth.square().sum()), rtol=EXACT, atol=0)
    expected = torch.linalg.svdvals(truth)[: u.rank]
    torch.testing.assert_close(
        u.singular_values[: len(expected)], expected, rtol=0, atol=EXACT * float(expected.max())
    )


def test_a_zero_down_projection_has_rank_zero():
    u = canonical(torch.zeros(3, 5), torch.randn(4, 3))
    assert (u.rank, u.shape, u.energy) == (0, (4, 5), 0.0)
    assert torch.equal(u.dense(), torch.zeros(4, 5, dtype=torch.float64))


def test_a_zero_up_projection_keeps_the_row_space():
    a, _ = random_factors(3, 7, 5)
    u = canonical(a, torch.zeros(5, 3))
    assert u.rank == 3 and u.energy == 0.0
    torch.testing.assert_close(a @ u.basis.T @ u.basis, a, rtol=EXACT, atol=EXACT)


def test_the_gauge_does_not_matter():
    a, b = random_factors(5, 14, 9)
    g = torch.randn(5, 5, dtype=torch.float64) + 4 * torch.eye(5, dtype=torch.float64)
    one, two = canonical(a, b, 1.5), canonical(g @ a, b @ torch.linalg.inv(g), 1.5)
    # The condition number of G, about 10, multiplies the rounding.
    torch.testing.assert_close(one.singular_values, two.singular_values, rtol=1e-11, atol=0)
    torch.testing.assert_close(one.basis.T @ one.basis, two.basis.T @ two.basis, rtol=0, atol=1e-11)
    torch.testing.assert_close(one.basis.T @ one.basis, torch.linalg.pinv(a) @ a, rtol=0, atol=1e-11)


def test_the_tolerance_decides_what_counts_as_zero():
    a = torch.diag(torch.tensor([1.0, 1e-3, 1e-9], dtype=torch.float64))
    assert row_basis(a)[0].shape == (3, 3)
    assert row_basis(a, rtol=1e-6)[0].shape == (2, 3)
    assert canonical(a, torch.eye(3), rtol=1e-2).rank == 1


def test_row_basis_gives_back_the_matrix():
    a, _ = random_factors(6, 4, 1)
    q, coordinates = row_basis(a.float())
    torch.testing.assert_close(coordinates @ q, a.float().double(), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(q @ q.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=EXACT)


@pytest.mark.parametrize("rank", [1, 3, 6, 99])
def test_truncation_is_the_best_approximation_and_tells_what_it_keeps(rank):
    a, b = random_factors(6, 11, 9)
    u = canonical(a, b, 2.0)
    kept, share = u.truncate(rank)
    assert kept.rank == min(rank, 6)
    assert_canonical(kept)
    left, s, right = torch.linalg.svd(2.0 * b @ a, full_matrices=False)
    best = (left[:, :rank] * s[:rank]) @ right[:rank]
    torch.testing.assert_close(kept.dense(), best, rtol=0, atol=EXACT * float(s[0]))
    assert share == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), rel=EXACT)


def test_truncating_nothing_keeps_all_of_it():
    kept, share = canonical(torch.randn(2, 4), torch.zeros(3, 2)).truncate(1)
    assert (kept.rank, share) == (1, 1.0)
    with pytest.raises(ValueError, match="cannot truncate to rank 0"):
        kept.truncate(0)


def test_balanced_factors_share_the_singular_values_evenly():
    a, b = random_factors(4, 9, 7)
    b[:, 0] = 0
    u = canonical(a * 1e4, b * 1e-4, 2.0)
    down, up = u.balanced()
    assert (down.shape, up.shape) == ((4, 9), (7, 4))
    torch.testing.assert_close(up @ down, u.dense(), rtol=0, atol=EXACT)
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0), rtol=EXACT, atol=1e-8)


@pytest.mark.parametrize("coefficient", [0.4, -2.0, 0.0, torch.tensor(0.4)])
def test_scaling_stays_canonical(coefficient):
    a, b = random_factors(4, 9, 7)
    u = canonical(a, b)
    scaled = u.scaled(coefficient)
    assert_canonical(scaled)
    torch.testing.assert_close(scaled.dense(), float(coefficient) * u.dense(), rtol=EXACT, atol=EXACT)


def tasks(*ranks, d_in=10, d_out=7):
    return [
        (
            f"t{k}",
            canonical(*random_factors(r, d_in, d_out))
            if r
            else canonical(torch.zeros(1, d_in), torch.ones(d_out, 1)),
        )
        for k, r in enumerate(ranks)
    ]


def test_a_stack_holds_the_tasks_in_order():
    updates = tasks(3, 1, 4)
    s = stack(updates)
    assert s.tasks == ("t0", "t1", "t2") and s.ranks == (3, 1, 4)
    assert s.segment.tolist() == [0, 0, 0, 1, 2, 2, 2, 2] and s.segment.dtype == torch.int32
    assert s.basis.shape == (8, 10) and s.columns.shape == (7, 8)
    assert torch.equal(s.basis[3:4], updates[1][1].basis)
    assert torch.equal(s.columns[:, 4:], updates[2][1].columns)


@pytest.mark.parametrize("ranks", [(3, 1, 4), (3, 0, 4), (10, 10), (0, 0), (2,)])
def test_a_merge_of_a_stack_is_the_weighted_sum(ranks):
    updates = tasks(*ranks)
    s = stack(updates)
    per_task = torch.randn(len(ranks))
    truth = sum(float(c) * u.dense() for c, (_, u) in zip(per_task, updates, strict=True))
    merged = s.merged(per_task)
    assert_canonical(merged)
    torch.testing.assert_close(merged.dense(), truth, rtol=0, atol=EXACT)
    per_direction = torch.randn(sum(s.ranks), dtype=torch.float64)
    torch.testing.assert_close(
        s.merged(per_direction).dense(), (s.columns * per_direction) @ s.basis, rtol=0, atol=EXACT
    )
    core = torch.randn(2 * (sum(s.ranks),), dtype=torch.float64)
    merged = s.merged(core)
    assert_canonical(merged)
    torch.testing.assert_close(merged.dense(), s.columns @ core @ s.basis, rtol=0, atol=10 * EXACT)


def test_tasks_that_share_a_row_space_cancel_cleanly():
    a, b = random_factors(3, 8, 6)
    s = stack([("one", canonical(a, b)), ("two", canonical(a, -b))])
    merged = s.merged(torch.tensor([0.5, 0.5]))
    assert merged.rank == 3 and merged.energy <= EXACT**2


def test_coefficients_expand_to_one_value_a_column():
    s = stack(tasks(2, 1))
    assert s.expand(torch.tensor([1.0, 2.0], requires_grad=True)).tolist() == [1.0, 1.0, 2.0]
    assert s.expand(torch.tensor([1.0, 2.0, 3.0])).tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match=r"expected 2 coefficients \(one per task\) or 3 \(one per singular"):
        s.expand(torch.ones(4))


@pytest.mark.parametrize("ranks", [(2, 0), (2, 0, 1), (0, 3, 0)])
def test_a_task_of_rank_zero_does_not_turn_task_coefficients_into_direction_coefficients(ranks):
    """With ranks (2, 0) there would be as many singular directions as tasks."""
    updates = tasks(*ranks)
    s = stack(updates)
    c = torch.arange(1.0, len(ranks) + 1)
    truth = sum(float(x) * u.dense() for x, (_, u) in zip(c, updates, strict=True))
    torch.testing.assert_close(s.merged(c).dense(), truth, rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: canonical(torch.ones(2, 3), torch.ones(4, 3)), r"do not fit: down \(2, 3\), up \(4, 3\)"),
        (lambda: canonical(torch.ones(3), torch.ones(4, 3)), "factors do not fit"),
        (lambda: canonical(torch.full((2, 3), torch.nan), torch.ones(4, 2)), "down projection holds NaN"),
        (lambda: canonical(torch.ones(2, 3), torch.full((4, 2), torch.inf)), "up projection or its scaling"),
        (lambda: row_basis(torch.ones(3)), "two dimensions"),
        (lambda: stack([]), "no update to stack"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_updates_of_different_shape_are_both_named():
    one, two = tasks(1)[0][1], tasks(1, d_in=5)[0][1]
    with pytest.raises(ValueError, match=r"'a': \(7, 10\), 'b': \(7, 5\)"):
        stack([("a", one), ("b", two)])
