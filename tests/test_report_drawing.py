"""Plots, shades, numbers and names on their own."""

import math
import re

import pytest

from nsc_fast.report import svg
from nsc_fast.report.tables import Group, Shading, matrix
from nsc_fast.report.text import by_block, fixed, percent, sized


class TestDrawing:
    @pytest.mark.parametrize(
        "points",
        [[], [(1, 0.5)], [(1, 0.5), (2, 0.5)], [(1, None)], [(1, math.nan), (2, 3.0), (3, None), (4, -1e9)]],
    )
    @pytest.mark.parametrize("log_y", [False, True])
    def test_curves_of_anything(self, points, log_y):
        text = svg.curves([svg.Series("s", points)], title="t", x_label="x", log_y=log_y)
        assert "nan" not in text and "inf" not in text and text.count("<svg") == text.count("</svg>") == 1

    def test_a_curve_goes_through_its_points(self):
        text = svg.curves(
            [svg.Series("s", [(0, 0), (1, 1), (2, 0.5)])], title="t", x_label="x", y_range=(0, 1)
        )
        path = re.search(r'class="s0" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', text)
        x = [float(path[i]) for i in (1, 3, 5)]
        y = [float(path[i]) for i in (2, 4, 6)]
        assert x[1] - x[0] == pytest.approx(x[2] - x[1]) and x[0] < x[1]
        assert y[0] > y[2] > y[1] and y[2] == pytest.approx((y[0] + y[1]) / 2)

    @pytest.mark.parametrize(
        ("low", "high", "expected"),
        [(0, 1, [0, 0.5, 1]), (0.87, 0.93, [0.88, 0.9, 0.92]), (1, 500, [200, 400]), (2, 2, [2])],
    )
    def test_ticks_are_round(self, low, high, expected):
        assert svg.ticks(low, high) == pytest.approx(expected)

    def test_dots_stand_where_they_belong(self):
        text = svg.dots([("a", {"alone": 0.0, "final": 1.0, "base": None})], title="t", x_range=(0.0, 1.0))
        places = [float(x) for x in re.findall(r"translate\(([\d.]+)", text)]
        assert len(places) == 2 and places[1] == svg.WIDTH - 14 and places[0] < 60

    def test_a_sparkline_falls_and_is_cut_off(self):
        text = svg.sparkline([1.0, 0.1, 1e-9], title="t", low=1e-2)
        y = [float(v) for v in re.search(r'd="M(.*?)"', text)[1].replace("L", " ").split()[1::2]]
        assert y == [2.0, 11.0, 20.0]
        assert svg.sparkline([], title="t", low=1e-2) == "" == svg.sparkline([0.0], title="t", low=1e-2)

    def test_shades(self):
        shading = Shading.of([0.2, 0.3, None, math.nan])
        assert [shading.name(v) for v in (0.2, 0.25, 0.3)] == ["h0", "h5", "h10"]
        assert Shading.of([-1.0, 0.5]).name(0.5) == "h5" and Shading(0.4, 0.4).name(0.4) == "h0"
        assert matrix([], [Group(None, [])], Shading.of([]), caption="c").count("<td") == 0


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.12345, "0.123"), (-0.5, "−0.500"), (-0.0001, "0.000"), (None, "–"), (math.nan, "–"), (math.inf, "–")],
)
def test_fixed(value, expected):
    assert fixed(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (1234.5, "1234"), (0.00321, "0.00321"), (1e-5, "1.00e−05"), (-2e7, "−2.00e+07"), (None, "–")],
)
def test_sized(value, expected):
    assert sized(value) == expected


def test_percent_never_rounds_up_to_all():
    assert percent(0.999999) == "99.99\N{NO-BREAK SPACE}%" and percent(1.0) == "100.00\N{NO-BREAK SPACE}%"


def test_blocks_are_ordered_by_number():
    modules = ["e.10.q", "e.2.q", "pooler", "d.0.q", "e.2.v"]
    found = {block: [name for _, name in members] for block, members in by_block(modules).items()}
    assert found == {"e.2": ["q", "v"], "e.10": ["q"], "d.0": ["q"], "pooler": ["pooler"]}
    assert list(found) == ["e.2", "e.10", "d.0", "pooler"]
