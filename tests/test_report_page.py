"""What the page shows is what was measured, for few and for many, for all that may be missing."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from report_inputs import MODULES, TASKS, Page, merged, optimised, signal_of

from nsc_fast.factors import canonical
from nsc_fast.report import page, read_record
from nsc_fast.report.geometry import _rank_for
from nsc_fast.report.record import Spectrum
from nsc_fast.report.text import escape, fixed, percent, public, short


def shown(result, **options) -> Page:
    return Page(page(read_record(result.evidence(**options))))


def number(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-"))


class TestCoefficients:
    def test_the_heat_map_holds_them(self):
        result = optimised(merged())
        (head, *rows) = shown(result).tables("coefficients")[0]
        assert head == ["module", *TASKS]
        cells = {}
        for row in rows:
            if len(row) == 1:
                block = row[0]
            else:
                cells[row[0] if row[0] == "pooler" else f"{block}.{row[0]}"] = row[1:]
        assert set(cells) == set(MODULES)
        for module, row in cells.items():
            own = dict(zip(result.stack_tasks[module], result.coefficients[module].tolist(), strict=True))
            assert row == [fixed(own.get(task)) for task in TASKS]
        assert cells["pooler"][1] == "–"

    def test_equal_modules_share_a_row(self):
        result = optimised(merged())
        same = {m: torch.full((len(t),), 0.4 + 0.1 * (".1." in m)) for m, t in result.stack_tasks.items()}
        _, *rows = shown(replace(result, coefficients=same)).tables("coefficients")[0]
        assert rows == [
            ["enc.layer.0 (2 modules)", "0.400", "0.400", "0.400"],
            ["enc.layer.1 (2 modules)", "0.500", "0.500", "0.500"],
            ["pooler", "0.400", "–", "0.400"],
        ]
        _, *rows = shown(merged(scaling=0.25)).tables("coefficients")[0]
        assert rows == [["all 5 modules", "0.250", "0.250", "0.250"]]

    def test_values_per_direction_are_averaged(self):
        result = optimised(merged())
        each = {m: torch.arange(3.0 * len(t)) for m, t in result.stack_tasks.items()}
        found = shown(replace(result, coefficients=each))
        _, *rows = found.tables("coefficients")[0]
        assert ["enc.layer.0 (2 modules)", "1.000", "4.000", "7.000"] in rows
        assert "Means over the singular directions" in found.text("coefficients")

    def test_a_negative_coefficient_has_a_minus_and_the_other_colour(self):
        result = optimised(merged())
        values = {m: torch.tensor([-0.4, 0.2, 0.1][: len(t)]) for m, t in result.stack_tasks.items()}
        found = shown(replace(result, coefficients=values))
        cells = [c for c in found.section("coefficients").iter("td") if c.text == "\N{MINUS SIGN}0.400"]
        assert cells and all(c.get("class") == "n10" for c in cells)


class TestOptimisation:
    def test_curves_and_numbers(self):
        found = shown(optimised(merged(), steps=7))
        assert len(list(found.section("optimisation").iter("svg"))) == 1 + len(TASKS)
        assert "one, 0.9000 to 0.8400" in found.text("optimisation")
        (table,) = found.tables("optimisation")
        assert table[0] == ["step", "learning rate", "loss", *TASKS]
        assert table[7] == ["7", "0.001", "0.8400", "0.8400", "0.7400", "0.6400"]

    def test_many_steps_are_averaged_and_this_is_said(self):
        found = shown(optimised(merged(), steps=1000))
        assert "Each point is the mean of 5 steps" in found.text("optimisation")
        curve = next(p for p in found.section("optimisation").iter("path") if p.get("class") == "s0")
        assert curve.get("d").count("L") == 199

    def test_what_is_no_number_leaves_a_gap(self):
        result = optimised(merged())
        history = [
            replace(r, ratios={**r.ratios, "two": math.nan} if r.step != 4 else r.ratios)
            for r in result.history
        ]
        found = shown(replace(result, history=history))
        assert "two, – to –" in found.text("optimisation") and "nan" not in found.html.lower()

    def test_an_interruption_is_a_warning(self):
        found = shown(replace(optimised(merged()), interrupted=True))
        assert "interrupted after 7 steps" in found.text("warnings")

    def test_another_objective_has_its_name(self):
        found = shown(replace(optimised(merged()), measure="entropy"))
        assert "Mean entropy of every task" in found.text("optimisation")


class TestSignal:
    def test_all_of_it_is_shown(self):
        signal = signal_of()
        found = shown(optimised(merged(), signal=signal))
        overview, layers, sees = found.tables("ratios")
        kinds = ["random", "base", "alone", "initial", "final"]
        assert overview[0] == ["task", *kinds, "final \N{MINUS SIGN} alone", "strength", "tokens"]
        for row, task in zip(overview[1:], TASKS, strict=True):
            values = [signal[kind][task] for kind in kinds]
            assert row[:6] == [task, *(fixed(v, 4) for v in values)]
            assert row[6:] == [
                fixed(values[4] - values[2], 4),
                fixed(signal["strength"][task], 2),
                str(signal["tokens"][task]),
            ]
        assert layers[0] == ["task", "layer", *kinds]
        assert len(layers) == 1 + len(TASKS) * len(MODULES)
        own = signal["modules"]["enc.layer.1.v"]["two"]
        assert ["two", "1 v", *(fixed(own[kind], 4) for kind in kinds)] in layers
        assert sees[1] == ["one", "0.400", "0.010", "0.010"]
        assert len(list(found.section("ratios").iter("figure"))) == len(TASKS)

    @pytest.mark.parametrize("part", list(signal_of()))
    @pytest.mark.parametrize("empty", [None, {}, "absent"])
    def test_any_part_may_be_missing(self, part, empty):
        signal = signal_of()
        if empty == "absent":
            del signal[part]
        else:
            signal[part] = empty
        found = shown(optimised(merged(), signal=signal))
        assert found.tables("ratios")
        assert ("By layer" in found.text("ratios")) == (part != "modules")
        assert ("Who sees whose" in found.text("ratios")) == (part != "sees")

    def test_nothing_in_it(self):
        found = shown(optimised(merged(), signal=dict.fromkeys(signal_of())))
        assert found.text("ratios") == "Null-space ratios"

    def test_holes_and_no_numbers(self):
        signal = signal_of()
        signal["alone"]["one"] = math.nan
        signal["strength"]["two"] = None
        del signal["final"]["three"]
        signal["modules"]["pooler"]["one"]["final"] = None
        del signal["modules"]["enc.layer.0.q"]["one"]
        signal["sees"]["one"]["two"] = math.inf
        overview, _, sees = shown(optimised(merged(), signal=signal)).tables("ratios")
        assert overview[1][3] == overview[2][7] == overview[3][5] == sees[1][2] == "–"

    def test_a_task_without_signal_is_named(self):
        signal = signal_of()
        signal["strength"]["two"] = 0.97
        assert "Without signal: two." in shown(optimised(merged(), signal=signal)).text("ratios")

    def test_many_modules_are_gathered_by_block(self):
        modules = [f"m.{i}.{name}" for i in range(30) for name in ("q", "v")]
        found = shown(optimised(merged(modules=modules), signal=signal_of(modules=modules)))
        _, layers, _ = found.tables("ratios")
        assert [row[1] for row in layers[1:31]] == [f"m.{i}" for i in range(30)]

    def test_methods_without_it_say_so(self):
        assert "Not measured beyond the curves" in shown(optimised(merged())).text("ratios")


class TestUpdate:
    def test_kept_energy_and_spectrum_are_those_of_the_factors(self):
        result = merged()
        found = shown(result, max_rank=4, dtype=torch.bfloat16)
        assert "Written with rank 4 in bfloat16, truncated to rank 4" in found.text("update")
        _, table = found.tables("update")
        for row in table[1:]:
            update = result.updates[row[0]]
            kept = float(update.singular_values[:4].square().sum() / update.singular_values.square().sum())
            assert row[7] == percent(round(kept, 6))
            assert number(row[2]) == pytest.approx(update.energy**0.5, rel=5e-3)
            assert row[4] == str(9 if row[0] != "pooler" else 6)
        spectrum = read_record(result.evidence()).measurements.spectrum["pooler"]
        assert spectrum.values == pytest.approx(
            result.updates["pooler"].singular_values[:6].tolist(), rel=1e-3
        )

    def test_a_merge_to_zero(self):
        found = shown(replace(merged(), updates=dict.fromkeys(MODULES, canonical(*_nothing()))))
        assert "The merged update is zero" in found.text("update")

    def test_the_rank_of_each_share_of_energy(self):
        flat = Spectrum(shape=(4, 4), energy=4.0, kept=1.0, values=[1.0] * 4)
        assert [_rank_for(flat, share) for share in (0.25, 0.5, 0.9, 1.0)] == [1, 2, 4, 4]


def _nothing():
    return torch.zeros(2, 16), torch.zeros(12, 2)


class TestInterference:
    def test_means_and_modules_are_those_of_the_measurement(self):
        result = merged()
        tables = shown(result).tables("interference")
        for position, key in enumerate(("rows", "columns", "cosine")):
            means, modules = tables[2 * position], tables[2 * position + 1]
            at = [
                getattr(m, key)[m.tasks.index("one"), m.tasks.index("three")].item()
                for m in result.interference.values()
            ]
            assert number(means[1][3]) == pytest.approx(sum(at) / len(at), abs=1e-3)
            assert means[1][3] == means[3][1] and means[1][1] == "–"
            assert modules[0] == ["module", "one × two", "one × three", "two × three"]
            assert modules[-1][1] == "–" and number(modules[-1][2]) == pytest.approx(at[-1], abs=1e-3)

    def test_what_chance_would_give_is_said(self):
        # Rank 3 in 16 and in 12 dimensions.
        text = shown(merged()).text("interference")
        assert "would share 0.188" in text and "would share 0.250" in text

    def test_many_pairs_are_summed_up(self):
        tasks = [f"t{i}" for i in range(8)]
        result = merged(tasks=tasks)
        table = shown(result).tables("interference")[1]
        assert table[0] == ["module", "mean", "lowest", "of", "highest", "of"]
        rows = result.interference["enc.layer.0.q"].rows
        i, j = torch.triu_indices(8, 8, 1)
        values = rows[i, j]
        best = int(values.argmax())
        assert table[1][4:] == [fixed(float(values.max())), f"t{i[best]} × t{j[best]}"]

    def test_one_adapter_has_no_pair(self):
        assert "no pair" in shown(merged(tasks=["only"])).text("interference")


class TestNames:
    def test_markup_stays_text(self):
        names = ("<script>alert(1)</script>", 'q" onload="x', "a & b </td></table>")
        modules = ("l.0.<b>q", "l.1.'v'", "x")
        result = optimised(
            merged(tasks=names, modules=modules, notices=("<i>note</i> \x00\x1b\ud800",)),
            signal=signal_of(names, modules),
        )
        found = shown(result)
        assert found.tables("adapters")[0][1][0] == names[0]
        assert found.tables("coefficients")[0][0][1:] == [short(n, 24) for n in names]
        assert "<i>note</i> \ufffd\ufffd\ufffd" in found.text("warnings")
        assert not list(found.root.iter("script")) and not list(found.root.iter("b"))
        assert not [e for e in found.root.iter() if any(a.startswith("on") for a in e.attrib)]

    def test_escape_round_trip(self):
        from xml.etree import ElementTree

        text = "<&>\"' ü 漢 \U0001f600"
        assert ElementTree.fromstring(f'<a b="{escape(text)}"/>').get("b") == text

    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("org/name", "org/name"),
            ("./near", "./near"),
            ("/home/me/x", "x"),
            ("C:\\Users\\me\\x", "x"),
            ("/", "/"),
            ("", ""),
        ],
    )
    def test_absolute_paths_are_shortened(self, source, expected):
        assert public(source) == expected


class TestScale:
    def test_twenty_tasks_and_224_modules(self):
        inner = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        modules = [f"model.layers.{i}.{name}" for i in range(32) for name in inner]
        tasks = [f"task {i}" for i in range(20)]
        result = optimised(merged(tasks=tasks, modules=modules), steps=500, signal=signal_of(tasks, modules))
        files = result.evidence()
        found = Page(files["nsc_fast/report.html"])
        assert len(found.html) < 2e6 and len(files["nsc_fast/measurements.json"]) < 3e6
        heat = found.tables("coefficients")[0]
        assert sum(len(row) == 21 for row in heat[1:]) == 224 and sum(len(row) == 1 for row in heat) == 32
        assert [row[0] for row in heat[1:9]] == ["model.layers.0", *inner]

    def test_numbers_in_the_file_are_short(self):
        content = json.loads(optimised(merged(), signal=signal_of()).evidence()["nsc_fast/measurements.json"])
        digits = [len(n.replace(".", "")) for n in re.findall(r"\d+\.\d+", json.dumps(content))]
        assert max(digits) <= 7


class TestAccessibility:
    def test_every_plot_has_a_title_and_every_table_a_name(self):
        found = shown(optimised(merged(), signal=signal_of()))
        plots = [s for s in found.root.iter("svg") if s.get("aria-hidden") is None]
        assert len(plots) > 10
        assert all(s.get("role") == "img" and s[0].tag == "title" and s[0].text for s in plots)
        regions = [e for e in found.root.iter("div") if e.get("role") == "region"]
        assert regions and all(e.get("aria-label") and e.get("tabindex") == "0" for e in regions)
        identifiers = [e.get("id") for e in found.root.iter() if e.get("id")]
        links = [a.get("href")[1:] for a in found.root.iter("a")]
        assert sorted(identifiers) == sorted(set(identifiers)) == sorted(links)

    @pytest.mark.parametrize("scheme", ["light", "dark", "print"])
    def test_numbers_can_be_read_on_every_shade(self, scheme):
        style = shown(merged()).style
        blocks = re.findall(r":root \{(.*?)\}", style, re.S)
        assert len(blocks) == 3
        colours = dict(re.findall(r"--(\w+): (#\w+)", blocks[("light", "dark", "print").index(scheme)]))
        for end in ("hi", "neg"):
            steps = [_mixed(colours["lo"], colours[end], k / 10) for k in range(11)]
            lights = [_luminance(s) for s in steps]
            assert lights == sorted(lights, reverse=lights[0] > lights[-1])
            for k, light in enumerate(lights):
                text = _luminance(_linear(colours["on" if k >= 6 else "ink"]))
                contrast = (max(light, text) + 0.05) / (min(light, text) + 0.05)
                assert contrast >= 4.5, (scheme, end, k, contrast)


def _linear(colour: str) -> list[float]:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]


# Linear sRGB to the cone responses of Oklab, and those to Oklab (Ottosson, 2020).
_CONES = torch.tensor(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    dtype=torch.float64,
)
_OKLAB = torch.tensor(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ],
    dtype=torch.float64,
)


def _mixed(low: str, high: str, share: float) -> list[float]:
    """``color-mix(in oklab, high share, low)`` in linear sRGB."""
    ends = [_OKLAB @ (_CONES @ torch.tensor(_linear(c), dtype=torch.float64)) ** (1 / 3) for c in (low, high)]
    mixed = ends[0] + share * (ends[1] - ends[0])
    return torch.linalg.solve(_CONES, torch.linalg.solve(_OKLAB, mixed) ** 3).clamp(0, 1).tolist()


def _luminance(linear: list[float]) -> float:
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
