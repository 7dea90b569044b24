"""Overlaps and cosines of adapters against the dense formulas."""

import pytest
import torch

from nsc_fast.factors import LowRankUpdate, canonical
from nsc_fast.interference import interference

D_OUT, D_IN = 18, 24


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def projector(matrix: torch.Tensor) -> torch.Tensor:
    """Onto the column space."""
    return matrix @ torch.linalg.pinv(matrix)


@pytest.fixture
def raw():
    """Three adapters of ranks 4, 2 and 6 that share a direction of their rows; scales differ."""
    shared = draw(1, D_IN)
    return {
        task: (torch.cat([shared, draw(rank - 1, D_IN)]), draw(D_OUT, rank), scale)
        for task, rank, scale in (("a", 4, 0.5), ("b", 2, 2.0), ("c", 6, 1.0))
    }


def measured(raw, module="m"):
    return interference({task: {module: canonical(*factors)} for task, factors in raw.items()})[module]


def test_it_is_the_dense_formula(raw):
    got = measured(raw)
    assert got.tasks == ("a", "b", "c") and got.ranks == (4, 2, 6)
    for i, (down_i, up_i, s_i) in enumerate(raw.values()):
        for j, (down_j, up_j, s_j) in enumerate(raw.values()):
            smaller = min(len(down_i), len(down_j))
            rows = (projector(down_i.T) @ projector(down_j.T)).trace() / smaller
            columns = (projector(up_i) @ projector(up_j)).trace() / smaller
            d_i, d_j = s_i * up_i @ down_i, s_j * up_j @ down_j
            cosine = (d_i * d_j).sum() / d_i.norm() / d_j.norm()
            for value, expected in (
                (got.rows[i, j], rows),
                (got.columns[i, j], columns),
                (got.cosine[i, j], cosine),
            ):
                assert value == pytest.approx(float(expected), abs=1e-10)
    assert got.rows[0, 1] > 1 / 2  # the shared direction is one of two


def test_scale_and_sign_of_an_update_change_the_cosine_only(raw):
    down, up, _ = raw["a"]
    got = measured({"a": (down, up, 1.0), "b": (down, up, -3.0)})
    assert got.rows[0, 1] == pytest.approx(1, abs=1e-12) and got.columns[0, 1] == pytest.approx(1, abs=1e-12)
    assert got.cosine[0, 1] == pytest.approx(-1, abs=1e-12)


def test_orthogonal_updates_share_nothing():
    eye_in, eye_out = torch.eye(D_IN, dtype=torch.float64), torch.eye(D_OUT, dtype=torch.float64)
    got = measured({"a": (eye_in[:3], eye_out[:, :3], 1.0), "b": (eye_in[3:5], eye_out[:, 3:5], 1.0)})
    assert got.rows[0, 1] == got.columns[0, 1] == got.cosine[0, 1] == 0


def test_directions_that_b_annihilates_count_for_the_rows_only(raw):
    down, up, _ = raw["a"]
    thin = up.clone()
    thin[:, 1:] = 0
    got = measured({"thin": (down, thin, 1.0), "full": (down, up, 1.0)})
    assert got.rows[0, 1] == pytest.approx(1, abs=1e-12)
    # One direction, inside the column space of the other: all of it, not a quarter.
    assert got.columns[0, 1] == pytest.approx(1, abs=1e-10)


def test_what_has_no_meaning_is_no_number(raw):
    down, up, _ = raw["a"]
    zero = torch.zeros_like
    got = measured({"a": (down, up, 1.0), "b": (down, zero(up), 1.0), "c": (zero(down), up, 1.0)})
    assert got.ranks == (4, 4, 0)
    assert got.rows[0, 1] == pytest.approx(1, abs=1e-12) and got.rows[0, 2].isnan()
    assert got.columns[0, 1].isnan() and got.cosine[0, 1].isnan()
    assert got.columns[0, 0] == pytest.approx(1) and got.cosine[0, 0] == pytest.approx(1)


def test_modules_keep_their_order_and_their_own_tasks():
    def update(rank: int) -> LowRankUpdate:
        return canonical(draw(rank, D_IN), draw(D_OUT, rank))

    got = interference({"a": {"z": update(2)}, "b": {"y": update(1), "z": update(3)}})
    assert list(got) == ["z", "y"]
    assert got["z"].tasks == ("a", "b") and got["y"].tasks == ("b",)
    assert got["y"].rows.shape == (1, 1)


def test_random_subspaces_share_what_the_docstring_says():
    d, ranks = 64, (8, 4)
    shares = [
        measured({str(r): (draw(r, d), draw(d, r), 1.0) for r in ranks}).rows[0, 1].item() for _ in range(200)
    ]
    # The standard error of 200 draws is below 0.002.
    assert sum(shares) / len(shares) == pytest.approx(max(ranks) / d, abs=0.01)
