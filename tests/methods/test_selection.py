"""The k-th largest of a stream, and elementwise rules on blocks, against sorting everything at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_inputs import dense, error, random_raw

from nsc_fast.methods import elementwise, selection
from nsc_fast.methods.selection import kth_largest

VALUES = st.lists(
    st.floats(0, allow_infinity=False, allow_nan=False) | st.sampled_from([0.0, 1.0, 2.0]),
    min_size=1,
    max_size=60,
)


@pytest.fixture
def short_memory(monkeypatch):
    monkeypatch.setattr(selection, "_HELD", 3)


def _stream(values, step=7):
    tensor = torch.tensor(values, dtype=torch.float64)
    return lambda: (tensor[i : i + step] for i in range(0, len(values), step))


@given(values=VALUES, data=st.data())
def test_against_sorting(values, data, short_memory):
    k = data.draw(st.integers(1, len(values)))
    assert kth_largest(_stream(values), k) == sorted(values, reverse=True)[k - 1]


@given(values=VALUES)
def test_more_than_there_are(values, short_memory):
    assert kth_largest(_stream(values), len(values) + 1) == 0.0


def test_many_passes_over_a_long_stream():
    values = torch.rand(200_000, dtype=torch.float64) * 1e-3 + 1.0  # one bucket holds all of them
    stream = lambda: values.split(9_999)  # noqa: E731
    for k in (1, 17, 100_000, 200_000):
        assert kth_largest(stream, k) == values.sort(descending=True).values[k - 1]


def test_nothing_at_all():
    assert kth_largest(lambda: (), 1) == 0.0


@pytest.mark.parametrize("method", ["ties", "knots_ties"])
@pytest.mark.parametrize("granularity", ["model", "module"])
def test_blocks_do_not_change_the_result(method, granularity, monkeypatch, short_memory):
    raw = random_raw({"x": 3, "y": 2, "z": 4}, {"a": (23, 9), "b": (14, 31)})
    chosen = {"density": 0.35, "granularity": granularity}
    blocked = dense(method, raw, chosen)
    monkeypatch.setattr(elementwise, "_BLOCK", 40)
    for module, update in dense(method, raw, chosen).items():
        assert error(update, blocked[module]) <= 1e-12


def test_ties_written_out():
    raw = random_raw({"x": 3, "y": 2, "z": 4}, {"a": (23, 9), "b": (14, 31)}, scaling=1.5)
    del raw["y"]["a"]
    updates = {t: {m: s * b @ a for m, (a, b, s) in own.items()} for t, own in raw.items()}
    trimmed = {}
    for task, own in updates.items():
        vector = torch.cat([u.flatten() for u in own.values()]).abs()
        cut = vector.sort(descending=True).values[int(vector.numel() * 0.3)]
        trimmed[task] = {m: torch.where(u.abs() >= cut, u, 0.0) for m, u in own.items()}
    for module, got in dense("ties", raw, {"density": 0.3, "scaling": 0.5}).items():
        x = torch.stack([own[module] for own in trimmed.values() if module in own])
        kept = torch.where(x.sign() == x.sum(0).sign(), x, 0.0)
        expected = 0.5 * kept.sum(0) / (kept != 0).sum(0).clamp(min=1)
        assert error(got, expected) <= 1e-10


def test_drops_have_the_right_share_and_mean():
    raw = random_raw({"x": 3}, {"a": (120, 150)})
    a, b, _ = raw["x"]["a"]
    whole = b @ a
    seeds = [dense("dare", raw, {"drop": 0.7, "scaling": 1.0}, seed=seed)["a"] for seed in range(60)]
    share = sum(float((got.abs() > 1e-9).double().mean()) for got in seeds) / 60
    assert abs(share - 0.3) < 0.005
    spread = float((whole.square() * 0.7 / 0.3).mean().sqrt()) / 60**0.5
    assert float((torch.stack(seeds).mean(0) - whole).square().mean().sqrt()) < 1.1 * spread
