"""The program, as a user types it."""

import json

import pytest
from typer.testing import CliRunner

from nsc_fast.cli import REFUSED, UNVERIFIED, USAGE, app

runner = CliRunner()


def run(*arguments) -> tuple[int, str]:
    result = runner.invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def test_merge_verifies_what_it_wrote(workshop, tmp_path):
    code, output = run("merge", workshop / "recipe.yaml", tmp_path / "out", "--device", "cpu")
    assert code == 0, output
    for check in ("ok weights", "ok reload", "ok identity", "ok difference", "28 modules, rank 15"):
        assert check in output
    code, output = run("verify", tmp_path / "out", "--base-model", workshop / "base", "--device", "cpu")
    assert code == 0 and "ok reload" in output


def test_verify_notices_a_damaged_folder(workshop, tmp_path):
    from safetensors.torch import load_file, save_file

    out = tmp_path / "out"
    run("merge", workshop / "recipe.yaml", out, "--set", "steps=1", "--device", "cpu", "--no-verify")
    weights = load_file(out / "adapter_model.safetensors")
    damaged = {name: tensor * 1.1 for name, tensor in weights.items()}
    save_file(damaged, out / "adapter_model.safetensors", {"format": "pt"})
    code, output = run("verify", out, "--base-model", workshop / "base", "--device", "cpu")
    assert code == UNVERIFIED and "FAILED weights" in output


def test_merge_from_flags(workshop, tmp_path):
    code, output = run(
        *("merge", "--base-model", workshop / "base", "--device", "cpu", "--set", "steps=2"),
        *("--adapter", f"one={workshop / 'a0'}", "--adapter", workshop / "a1"),
        *("--data", f"one={workshop / 'd0.jsonl'}", "--data", f"a1={workshop / 'd1.jsonl'}"),
        *("--max-rank", 5, "--out-dtype", "bfloat16", "--out", tmp_path / "out"),
    )
    assert code == 0, output
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 5


def test_validate_and_dry_run_write_nothing(workshop, tmp_path):
    assert run("validate", workshop / "recipe.yaml")[0] == 0
    assert run("merge", workshop / "recipe.yaml", tmp_path / "out", "--dry-run")[0] == 0
    assert not list(tmp_path.iterdir())


def test_inspect_tells_rank_scale_and_problems(workshop, tmp_path):
    code, output = run("inspect", workshop / "a0", workshop / "a1", "--json")
    found = json.loads(output)
    assert code == 0 and found[0]["ranks"] == [4] and found[0]["scales"] == [2.0]
    assert found[1]["scales"] == [pytest.approx(8 / 8**0.5)]
    dora = tmp_path / "dora"
    dora.mkdir()
    config = json.loads((workshop / "a0" / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    (dora / "adapter_model.safetensors").write_bytes(
        (workshop / "a0" / "adapter_model.safetensors").read_bytes()
    )
    code, output = run("inspect", dora)
    assert code == REFUSED and "use_dora" in output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["merge", "none.yaml", "OUT"], USAGE, "there is no recipe 'none.yaml'"),
        (["merge", "RECIPE"], USAGE, "no output folder"),
        (["merge", "RECIPE", "EXISTS"], USAGE, "exists; choose another folder"),
        (["merge", "RECIPE", "OUT", "--set", "stepz=1"], USAGE, "stepz: unknown key"),
        (["merge", "RECIPE", "OUT", "--set", "steps"], USAGE, "write KEY=VALUE"),
        (["merge", "RECIPE", "OUT", "--method", "nsk"], USAGE, "did you mean 'nsc'"),
        (["merge", "RECIPE", "OUT", "--adapter", "a=b"], USAGE, "not both"),
        (["merge", "--out", "OUT"], USAGE, "nothing to merge"),
        (["merge", "--out", "OUT", "--adapter", "a=b", "--data", "c=d"], USAGE, "no adapter"),
        (["merge", "--out", "OUT", "--adapter", "one=./nowhere", "--method", "uniform"], REFUSED, "nowhere"),
        (["verify", "EXISTS"], REFUSED, "no nsc_fast/merge.json"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(workshop, tmp_path, arguments, code, message):
    (tmp_path / "exists").mkdir()
    places = {"RECIPE": workshop / "recipe.yaml", "OUT": tmp_path / "out", "EXISTS": tmp_path / "exists"}
    got, output = run(*(places.get(a, a) for a in arguments))
    assert got == code, output
    assert message in output
    assert [p.name for p in tmp_path.iterdir()] == ["exists"] and not list((tmp_path / "exists").iterdir())


def test_doctor_tests_what_would_be_used():
    code, output = run("doctor", "--device", "cpu")
    assert code == 0 and "impl=\"auto\" uses 'torch' on cpu" in output and "FAILED" not in output


def test_methods_lists_all_with_needs_rank_cost_and_paper():
    from nsc_fast import methods

    code, output = run("methods", "--json")
    listed = json.loads(output)
    assert code == 0 and [one["name"] for one in listed] == list(methods.names())
    for one in listed:
        assert all(one[key] for key in ("needs", "output_rank", "cost", "paper"))
        defaults = methods.get(one["name"]).parameters().model_dump(mode="json")
        assert {key: field["default"] for key, field in one["parameters"].items()} == defaults
    code, output = run("methods")
    assert code == 0 and "task_arithmetic" in output and "reversible" in output


def test_methods_tells_the_parameters_of_one():
    code, output = run("methods", "ties")
    assert code == 0
    for part in ("density", "float", "> 0 and <= 1", "0.2", "model | module", "survive the trimming"):
        assert part in output, output
    code, output = run("methods", "tise")
    assert code == USAGE and "did you mean 'ties'" in output


def test_every_method_can_be_shown():
    from nsc_fast import methods

    for name in methods.names():
        code, output = run("methods", name)
        assert code == 0 and f"parameters of {name}" in output


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("knots_ties", ["density=0.3"]),
        ("dare", ["max_rank=6"]),
        ("lego", ["rank=5"]),
        ("task_arithmetic", []),
    ],
)
def test_verify_runs_a_method_without_coefficients_again(workshop, tmp_path, method, settings):
    out = tmp_path / "out"
    flags = [part for setting in settings for part in ("--set", setting)]
    adapters = ("--adapter", f"one={workshop / 'a0'}", "--adapter", f"two={workshop / 'a1'}")
    code, output = run(
        *("merge", "--base-model", workshop / "base", "--device", "cpu", "--seed", 7, "--method", method),
        *(*flags, *adapters, "--out", out, "--no-verify"),
    )
    assert code == 0, output
    arguments = ("verify", out, "--base-model", workshop / "base", "--device", "cpu")
    code, output = run(*arguments)
    assert code == 0 and "ok weights" in output and "ok reload" in output, output
    resolved = out / "nsc_fast" / "config.resolved.yaml"
    if method in ("dare", "lego"):
        resolved.write_text(resolved.read_text().replace("seed: 7", "seed: 8"))
        code, output = run(*arguments)
        assert code == UNVERIFIED and "FAILED weights" in output


def test_verify_says_where_it_cannot_run_the_method_again(workshop, tmp_path):
    out = tmp_path / "out"
    code, output = run(
        *("merge", workshop / "recipe.yaml", out, "--set", "steps=1", "--device", "cpu", "--no-verify"),
    )
    assert code == 0, output
    for name in ("coefficients.safetensors", "coefficients.json"):
        (out / "nsc_fast" / name).unlink()
    code, output = run("verify", out, "--base-model", workshop / "base", "--device", "cpu")
    assert code == 0 and "cannot run again without data" in output, output
    assert "ok weights" not in output and "ok reload" in output
