"""The registry, what methods say about themselves and refuse, and rules with cases of their own."""

from __future__ import annotations

import pytest
import torch
from method_inputs import GOLDEN, dense, error, inputs_of, merge, random_raw
from pydantic import ValidationError
from safetensors.torch import load_file

from nsc_fast import methods
from nsc_fast.errors import MergeError, RecipeError
from nsc_fast.methods.robust_merge import Parameters, merge_factors

SHAPES = {"m": (9, 12), "n": (10, 7)}
DATA_FREE = [name for name in methods.names() if not methods.get(name).needs_data]


@pytest.fixture
def raw():
    return random_raw({"x": 3, "y": 3}, SHAPES, seed=21)


@pytest.mark.parametrize("name", methods.names())
def test_every_method_describes_itself(name):
    method = methods.get(name)
    assert method.name == name
    assert method.paper and method.output_rank and method.cost
    defaults = method.parameters()
    assert type(defaults)(**defaults.model_dump()) == defaults
    with pytest.raises(ValidationError):
        method.parameters(no_such_key=1)
    with pytest.raises(ValidationError):
        defaults.scaling = 2.0


@pytest.mark.parametrize("name", DATA_FREE)
def test_every_data_free_method_runs_with_its_defaults(name, raw):
    result = merge(name, raw)
    assert result.method == name and result.tasks == ("x", "y")
    assert result.parameters == methods.get(name).parameters().model_dump(mode="json")
    if methods.get(name).one_model:
        assert {m: u.shape for m, u in result.updates.items()} == SHAPES


def test_unknown_method_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'knots_ties'"):
        methods.get("knot_ties")


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("ties", {"density": 0.0}),
        ("ties", {"density": 1.2}),
        ("ties", {"max_rank": 0}),
        ("ties", {"combine": "median"}),
        ("knots_ties", {"density": -0.1}),
        ("dare", {"drop": 1.0}),
        ("dare", {"drop": -0.1}),
        ("dare_ties", {"drop": 1.0}),
        ("knots_dare_ties", {"drop": 1.0}),
        ("core_space", {"drop": 1.0}),
        ("core_space", {"rule": "fisher"}),
        ("core_space", {"granularity": "model"}),
        ("core_space", {"isotropic": True, "max_rank": 3}),
        ("iso_cts", {"common_fraction": 1.5}),
        ("robust_merge", {"density": 0.0}),
        ("lego", {"rank": 0}),
        ("lore", {"tau": -1.0}),
        ("reversible", {"components": -1}),
    ],
)
def test_parameters_are_checked(name, wrong):
    with pytest.raises(ValidationError):
        methods.get(name).parameters(**wrong)


@pytest.mark.parametrize("name", ["linear", "robust_merge", "reversible"])
def test_rules_that_need_equal_ranks_name_the_adapters(name):
    raw = random_raw({"x": 2, "other": 3}, SHAPES)
    with pytest.raises(MergeError, match="'m' 'x' has 2, 'other' has 3"):
        merge(name, raw)


@pytest.mark.parametrize("name", DATA_FREE)
def test_updates_of_different_shapes_are_refused(name, raw):
    raw["y"]["m"] = random_raw({"y": 3}, {"m": (8, 12)})["y"]["m"]
    with pytest.raises((MergeError, ValueError), match="differ in shape"):
        merge(name, raw)


@pytest.mark.parametrize("name", [name for name in DATA_FREE if name != "reversible"])
def test_weights_of_nobody_are_refused(name, raw):
    with pytest.raises(MergeError, match="'z', which is no adapter"):
        merge(name, raw, weights={"z": 1.0})


@pytest.mark.parametrize("name", ["linear", "robust_merge", "lego", "reversible"])
def test_rules_on_factors_say_when_they_lack_them(name, raw):
    inputs = inputs_of(raw)
    inputs.factors.clear()
    method = methods.get(name)
    with pytest.raises(MergeError, match="factors A and B of task 'x'"):
        method.run(inputs, method.parameters())


def test_no_adapter_at_all():
    for name in ("ties", "tsv", "lego"):
        with pytest.raises(MergeError, match="no adapter"):
            merge(name, {})


def test_robust_merge_survives_a_row_that_is_pruned_away():
    raw = random_raw({"x": 4, "y": 4}, {"m": (9, 12)}, seed=5)
    for a, _, _ in (raw["x"]["m"], raw["y"]["m"]):
        a[1] *= 1e-6
    downs, ups = zip(*((a, b) for a, b, _ in (own["m"] for own in raw.values())), strict=True)
    down, up = merge_factors(downs, ups, Parameters())
    assert torch.isfinite(down).all() and torch.isfinite(up).all()
    assert down[1].abs().max() == 0


def test_robust_merge_of_scaled_adapters():
    """With one scale for all, it comes out as a factor, as if applied to the merged factors."""
    raw = random_raw({"x": 4, "y": 4}, SHAPES, seed=6)
    doubled = {t: {m: (a, b, 2.0) for m, (a, b, _) in own.items()} for t, own in raw.items()}
    for module, update in dense("robust_merge", doubled).items():
        assert error(update, 2.0 * dense("robust_merge", raw)[module]) <= 1e-12


def test_robust_merge_by_the_paper(raw):
    """No lifted scales, and lambda once."""
    code = methods.get("robust_merge").parameters(clamp=1.0)
    paper = methods.get("robust_merge").parameters(rule="paper")
    downs, ups = zip(*((a, b) for a, b, _ in (own["m"] for own in raw.values())), strict=True)
    first, second = merge_factors(downs, ups, code), merge_factors(downs, ups, paper)
    assert error(2.0 * second[1] @ second[0], first[1] @ first[0]) <= 1e-12


def test_lego_joins_equal_units():
    """Clusters of equal units are these units; the result is their number's share of the sum."""
    raw = random_raw({"x": 3}, SHAPES, seed=7)
    raw["y"] = raw["z"] = raw["x"]
    for module, (a, b, _) in raw["x"].items():
        best = min(error(dense("lego", raw, seed=seed)[module], b @ a) for seed in range(10))
        assert best <= 1e-12


def test_lego_takes_mixed_ranks_and_negative_weights():
    raw = random_raw({"x": 2, "y": 5}, SHAPES, seed=8)
    updates = merge("lego", raw, {"rank": 4}, weights={"x": -1.0}).updates
    assert all(update.rank <= 4 for update in updates.values())


@pytest.mark.parametrize("components", [None, 0, 1, 2, 9])
def test_reversible_store(components, tmp_path):
    raw = random_raw({"x": 4, "y": 4, "z": 4}, SHAPES, seed=9, scaling=1.5)
    del raw["z"]["n"]
    result = merge("reversible", raw, {"components": components})
    assert result.updates == {} and "%" in result.notices[0]
    assert set(result.rebuild("z")) == {"m"}
    kept = 1 if components is None else components
    for task, own in raw.items():
        for module, update in result.rebuild(task).items():
            a, b, s = own[module]
            assert (error(update.dense(), s * b @ a) <= 1e-10) == (
                kept >= len(result.stack_tasks[module]) - 1
            )
    with pytest.raises(MergeError, match="no task 'w'"):
        result.rebuild("w")
    with pytest.raises(MergeError, match="keeps the adapters apart"):
        result.save_pretrained(tmp_path / "out")
    result.save_store(tmp_path / "store.safetensors")
    stored = load_file(tmp_path / "store.safetensors")
    assert stored["m.down.mean"].shape == (12, 4)


def test_reversible_is_the_best_of_its_rank():
    """Principal components: no other directions keep more of the vectors at a position."""
    raw = random_raw({f"t{i}": 6 for i in range(5)}, {"m": (7, 8)}, seed=10)
    down, _ = merge("reversible", raw, {"components": 2}).store["m"]
    vectors = torch.stack([own["m"][0].T for own in raw.values()])
    rebuilt = torch.stack([down.rebuild(i) for i in range(5)])
    lost = (vectors - rebuilt).square().sum((0, 2))
    centred = (vectors - vectors.mean(0)).permute(1, 2, 0)
    assert torch.allclose(lost, torch.linalg.svdvals(centred)[:, 2:].square().sum(1))
    assert down.values == 8 * (6 + 2 * 6 + 2 * 5)


def test_reversible_takes_no_weights(raw):
    with pytest.raises(MergeError, match="leave the weights out"):
        merge("reversible", raw, weights={"x": 1.0})


def test_recorded_numbers_are_looked_for_beside_the_checkout():
    assert GOLDEN.parts[-2:] == ("shared", "golden")
