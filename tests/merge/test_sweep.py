"""Sweeps on a tiny model: every point is the merge that it says, and the best is kept."""

import json
import shlex
import sys
from functools import partial

import pytest
import torch
import yaml
from test_cli import run

from nsc_fast import methods, read_adapter, reference
from nsc_fast.cli import REFUSED, USAGE
from nsc_fast.errors import MergeError, RecipeError
from nsc_fast.merge import run_recipe
from nsc_fast.recipe import load_recipe, make_recipe
from nsc_fast.sweep import GRIDS, parse_grid, sweep


def recipe(workshop, method="task_arithmetic", data=True, **changes):
    content = {
        "base_model": "base",
        "merge_method": method,
        "adapters": [
            {"name": name, "path": f"a{k}", **({"data": {"path": f"d{k}.jsonl"}} if data else {})}
            for k, name in enumerate(("one", "two"))
        ],
    }
    return make_recipe({**content, **changes}, where="here", folder=workshop)


@pytest.fixture
def scorer(tmp_path):
    """Writes a score command: ``body`` sees the candidate's folder as ``folder``."""

    def make(body):
        script = tmp_path / "score it.py"
        script.write_text(f"import os, sys\nfolder = sys.argv[1]\n{body}\n")
        return f"{shlex.quote(sys.executable)} {shlex.quote(str(script))}"

    return make


SIZE = (
    "assert os.environ['NSC_FAST_ADAPTER'] == folder\n"
    "from safetensors.numpy import load_file\n"
    "t = load_file(folder + '/adapter_model.safetensors')\n"
    "pairs = [(t[k.replace('lora_A', 'lora_B')], a) for k, a in t.items() if 'lora_A' in k]\n"
    "energy = sum(float(((b @ a) ** 2).sum()) for b, a in pairs)\n"
    "print('some report'); print(-abs(energy ** 0.5 - {target}))\n"
)


def test_the_command_scores_the_candidate_itself(workshop, scorer, tmp_path):
    loaded = recipe(workshop, data=False)
    parts = []
    for scaling in (0.2, 0.5, 0.9):
        point = loaded.model_copy(update={"parameters": {"scaling": scaling}})
        updates = run_recipe(point)[0].updates
        parts.append(sum(u.energy for u in updates.values()) ** 0.5)
    found = sweep(loaded, {"scaling": [0.2, 0.5, 0.9]}, command=scorer(SIZE.format(target=parts[1])))
    assert found.best == 1 and found.higher_is_better
    assert found.points[1].score == pytest.approx(0, abs=1e-6)
    assert found.points[2].score == pytest.approx(parts[1] - parts[2], rel=1e-5)


def test_the_label_free_score_is_the_mean_ratio_of_the_merged_model(workshop):
    from transformers import AutoModelForCausalLM

    loaded = recipe(workshop)
    found = sweep(loaded, {"scaling": [0.3, 1.0]})
    result, _ = run_recipe(recipe(workshop, data=False, parameters={"scaling": 1.0}))
    model = AutoModelForCausalLM.from_pretrained(workshop / "base").eval()
    for module, update in result.updates.items():
        model.get_submodule(module).weight.data += update.dense().float()
    from nsc_fast.data import read_data

    batches = read_data(loaded, loaded.base_model)[0]["one"]
    adapter = read_adapter(workshop / "a0").modules
    last = [m for m in adapter if m.startswith("model.layers.3.")]
    total = tokens = 0.0
    for batch in batches:
        seen = {}

        def keep(_, args, module=None, seen=seen):
            seen[module] = args[0]

        handles = [model.get_submodule(m).register_forward_pre_hook(partial(keep, module=m)) for m in last]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
        mask = batch["attention_mask"]
        mean = sum(reference.ratio_loss(seen[m], adapter[m].down, mask) for m in last) / len(last)
        total, tokens = total + float(mean) * float(mask.sum()), tokens + float(mask.sum())
    assert found.points[1].parts["one"] == pytest.approx(total / tokens, rel=1e-4)
    best = min(range(2), key=lambda n: found.points[n].score)
    assert found.best == best and not found.higher_is_better
    assert found.points[0].score == pytest.approx(sum(found.points[0].parts.values()) / 2)


def test_the_best_is_written_and_merges_again_to_the_same(workshop, scorer, tmp_path):
    loaded = recipe(workshop, "knots_ties")
    grid = {"scaling": [0.2, 0.4], "density": [0.5, 1.0], "weight.two": [0.5]}
    found = sweep(loaded, grid, command=scorer(SIZE.format(target=0)))
    assert [p.values["density"] for p in found.points] == [0.5, 1.0, 0.5, 1.0]
    found.save(tmp_path / "out", loaded)
    table = json.loads((tmp_path / "out" / "nsc_fast" / "sweep.json").read_text())
    best = table["points"][table["best"]]
    assert best["score"] == max(p["score"] for p in table["points"]) and len(table["points"]) == 4
    resolved = load_recipe(tmp_path / "out" / "nsc_fast" / "config.resolved.yaml")
    assert resolved.parameters["scaling"] == best["values"]["scaling"]
    assert resolved.adapters[1].parameters.weight == 0.5
    again, _ = run_recipe(resolved)
    for module, update in read_adapter(tmp_path / "out").canonical().items():
        torch.testing.assert_close(update.dense(), again.updates[module].dense(), rtol=1e-5, atol=1e-7)
    code, output = run("verify", tmp_path / "out", "--base-model", workshop / "base", "--device", "cpu")
    assert code == 0, output


def test_the_model_is_loaded_once_and_left_alone(workshop, monkeypatch):
    from nsc_fast import merge

    loads = []
    real = merge.load_base
    monkeypatch.setattr(merge, "load_base", lambda *a, **k: loads.append(real(*a, **k)) or loads[-1])
    canonical = []
    adapter = type(read_adapter(workshop / "a0"))
    counted = adapter.canonical
    monkeypatch.setattr(adapter, "canonical", lambda self: canonical.append(self.name) or counted(self))
    found = sweep(recipe(workshop), {"scaling": [0.1, 0.2, 0.3]})
    assert len(loads) == 1 and canonical == ["one", "two"] and len(found.points) == 3
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(workshop / "base").state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in loads[0].state_dict().items())


@pytest.mark.parametrize("name", list(GRIDS))
def test_every_default_grid_fits_its_method(name):
    method = methods.get(name)
    for key, values in GRIDS[name].items():
        for value in values:
            assert getattr(method.parameters(**{key: value}), key) == value


@pytest.mark.parametrize(
    ("method", "grid", "message"),
    [
        ("task_arithmetic", {"scalling": [1]}, "no parameter 'scalling' to sweep; did you mean 'scaling'"),
        ("task_arithmetic", {"weight.too": [1]}, "did you mean 'weight.two'"),
        ("task_arithmetic", {"weight.two": ["much"]}, "'much' is not a number"),
        ("ties", {"density": [0.5, 1.5]}, "density: Input should be less than or equal to 1"),
        ("uniform", None, "has no grid of its own"),
        ("nsc", {"steps": [1]}, "sweep searches the parameters of data-free methods"),
        ("reversible", {"components": [1]}, "keeps the adapters apart"),
    ],
)
def test_a_grid_that_cannot_be_swept_is_named_before_anything_is_loaded(workshop, method, grid, message):
    with pytest.raises(MergeError, match=message):
        sweep(recipe(workshop, method, base_model="nowhere"), grid)


def test_the_label_free_score_needs_data_of_every_task(workshop):
    with pytest.raises(MergeError, match="adapter 'one' has no data, which the label-free score needs"):
        sweep(recipe(workshop, data=False, base_model="nowhere"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit('no GPU')", "failed at scaling=0.5 with exit code 1: no GPU"),
        ("print('done')", "printed no number at scaling=0.5: its last line is 'done'"),
        ("", "printed no number at scaling=0.5: it printed nothing"),
        ("print('nan')", "printed nan at scaling=0.5"),
    ],
)
def test_a_command_that_gives_no_score_is_named_with_its_point(workshop, scorer, body, message):
    with pytest.raises(MergeError, match=message):
        sweep(recipe(workshop, data=False), {"scaling": [0.5]}, command=scorer(body))


@pytest.mark.parametrize("setting", ["scaling", "scaling=", "scaling=1,,2"])
def test_a_grid_is_written_key_equals_values(setting):
    with pytest.raises(RecipeError, match="write KEY=VALUE,VALUE"):
        parse_grid([setting])
    assert parse_grid(["scaling=0.1, 2", "trim=exact"]) == {"scaling": [0.1, 2], "trim": ["exact"]}
    with pytest.raises(RecipeError, match="given twice"):
        parse_grid(["a=1", "a=2"])


class TestTheCommandLine:
    @pytest.fixture
    def file(self, workshop, tmp_path):
        content = recipe(workshop).model_dump(mode="json", exclude_none=True)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "recipe.yaml"

    def test_prints_a_table_and_writes_the_best(self, file, tmp_path):
        out = tmp_path / "best"
        arguments = ("sweep", file, "--device", "cpu", "--grid", "scaling=0.1,0.4")
        code, output = run(*arguments, "--label-free", "--out", out)
        assert code == 0, output
        assert "lower is better" in output and output.count("best") >= 2
        assert (out / "adapter_model.safetensors").is_file() and (out / "nsc_fast" / "sweep.json").is_file()
        code, output = run(*arguments, "--out", out)
        assert code == USAGE and "exists; choose another folder" in output

    def test_scores_by_a_command(self, file, scorer):
        command = scorer(SIZE.format(target=0))
        code, output = run("sweep", file, "--device", "cpu", "--grid", "scaling=0.4,0.1", "--score", command)
        assert code == 0 and "higher is better" in output

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["--score", "true", "--label-free"], USAGE, "not both"),
            (["--grid", "densty=1", "--method", "ties"], USAGE, "did you mean 'density'"),
            (["--grid", "scaling=1", "--score", "exit 3 #"], REFUSED, "exit code 3"),
            (["--method", "nsc"], REFUSED, "data-free methods"),
        ],
    )
    def test_mistakes_are_named(self, file, arguments, code, message):
        got, output = run("sweep", file, "--device", "cpu", *arguments)
        assert (got, message in output) == (code, True), output
