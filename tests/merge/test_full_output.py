"""``output: {kind: full}``: what ``merge`` and ``apply`` write one after the other, in one go."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_cli import run
from transformers import AutoModelForCausalLM

from nsc_fast import apply
from nsc_fast.apply import save_full
from nsc_fast.cli import REFUSED, UNVERIFIED, USAGE
from nsc_fast.errors import MergeError
from nsc_fast.merge import run_recipe
from nsc_fast.recipe import BaseSpec, load_recipe, make_recipe

COMMON = ("--device", "cpu", "--set", "steps=1")


def weights(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def full(workshop, tmp_path_factory):
    """A full model in bfloat16 of a base in float32, and what the program said."""
    out = tmp_path_factory.mktemp("full") / "out"
    flags = ("--out-kind", "full", "--out-dtype", "bfloat16", "--out-shard-size", "30KB", "--max-rank", 6)
    code, output = run("merge", workshop / "recipe.yaml", out, *COMMON, *flags)
    assert code == 0, output
    return out, output


def test_it_is_what_apply_writes_with_the_evidence_of_the_merge(workshop, full, tmp_path):
    out, output = full
    for told in ("28 modules updated", "rounding of the stored weights: the update in them is off by 0."):
        assert told in output
    for check in ("weights", "reload", "difference", "identity", "stored", "full model"):
        assert f"ok {check}: " in output
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    lora, applied = tmp_path / "lora", tmp_path / "applied"
    run("merge", workshop / "recipe.yaml", lora, *COMMON, "--max-rank", 6, "--no-verify")
    flags = ("--base-model", workshop / "base", "--dtype", "bfloat16", "--shard-size", "30KB")
    assert run("apply", lora, "--out", applied, *flags)[0] == 0
    got, expected = weights(out), weights(applied)
    assert got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in got)
    files = {p.name for p in out.iterdir()}
    assert files == {p.name for p in applied.iterdir()} | {"README.md"}
    assert sum(name.startswith("model-") for name in files) >= 3
    evidence = {p.name for p in (lora / "nsc_fast").iterdir()}
    assert {p.name for p in (out / "nsc_fast").iterdir()} == evidence | {"apply.json", "lora"}
    for name in ("coefficients.safetensors", "metrics.jsonl"):
        assert (out / "nsc_fast" / name).read_bytes() == (lora / "nsc_fast" / name).read_bytes()
    inner = load_file(out / "nsc_fast" / "lora" / "adapter_model.safetensors")
    assert all(torch.equal(inner[k], v) for k, v in load_file(lora / "adapter_model.safetensors").items())
    told = json.loads((out / "nsc_fast" / "apply.json").read_text())
    assert 0 < told["total_rounding"] < 0.05 and told["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16


def test_the_resolved_recipe_makes_the_same_model(full, tmp_path):
    out, _ = full
    recipe = load_recipe(out / "nsc_fast" / "config.resolved.yaml")
    assert recipe.output.model_dump() == {
        "kind": "full",
        "max_rank": 6,
        "dtype": "bfloat16",
        "shard_size": "30KB",
    }
    again = tmp_path / "again"
    code, output = run("merge", out / "nsc_fast" / "config.resolved.yaml", again, "--no-verify")
    assert code == 0 and "ok " not in output, output
    first, second = weights(out), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_card_and_the_report_tell_of_a_model(full):
    out, _ = full
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers" and "lora" not in head["tags"]
    assert "The base model with one LoRA in its weights" in card and "`nsc_fast/lora`" in card
    page = (out / "nsc_fast" / "report.html").read_text()
    assert "full model; its rounding takes 0." in page
    assert run("report", out)[0] == 0
    assert (out / "README.md").read_text() == card


@pytest.mark.parametrize("damage", ["an updated weight", "another weight", "a missing update"])
def test_verify_reads_the_files_and_sees_what_is_wrong_in_them(workshop, full, tmp_path, damage):
    out = tmp_path / "out"
    shutil.copytree(full[0], out)
    code, output = run("verify", out, "--base-model", workshop / "base", "--device", "cpu")
    assert code == 0 and "ok weights" in output and "ok full model" in output, output
    assert "ok stored: 0.0e+00" in output and "39 tensors" in output
    name = "model.norm.weight" if damage == "another weight" else "model.layers.0.mlp.up_proj.weight"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    file = out / index["weight_map"][name]
    tensors = load_file(file)
    if damage == "a missing update":
        tensors[name] = weights(workshop / "base")[name].to(torch.bfloat16)
    else:
        tensors[name].view(-1)[0] += 0.25
    save_file(tensors, file, {"format": "pt"})
    code, output = run("verify", out, "--base-model", workshop / "base", "--device", "cpu")
    assert code == UNVERIFIED and "FAILED stored" in output and f"worst at {name}" in output
    if damage == "a missing update":
        assert "FAILED stored: 1.0e+00" in output


class TestRefused:
    """Before the merge begins, and nothing is written."""

    def refuse(self, monkeypatch, recipe, out, match, *flags, code=REFUSED):
        from nsc_fast import merge

        monkeypatch.setattr(merge, "run_recipe", lambda *_, **__: pytest.fail("the merge began"))
        before = sorted(out.parent.iterdir())
        got, output = run("merge", recipe, out, *COMMON, "--out-kind", "full", *flags)
        assert got == code and match in output, output
        assert sorted(out.parent.iterdir()) == before

    def other_base(self, workshop, tmp_path):
        shutil.copytree(workshop / "base", tmp_path / "base")
        content = (workshop / "recipe.yaml").read_text().replace("path: ", f"path: {workshop}/")
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(content.replace("base_model: base", f"base_model: {tmp_path / 'base'}"))
        return tmp_path / "base", recipe

    def test_a_base_of_pickles(self, workshop, tmp_path, monkeypatch):
        base, recipe = self.other_base(workshop, tmp_path)
        (base / "model.safetensors").rename(base / "pytorch_model.bin")
        self.refuse(monkeypatch, recipe, tmp_path / "out", "save_pretrained")
        self.refuse(monkeypatch, recipe, tmp_path / "out", "save_pretrained", "--dry-run")

    def test_a_base_that_is_stored_quantised(self, workshop, tmp_path, monkeypatch):
        base, recipe = self.other_base(workshop, tmp_path)
        config = json.loads((base / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8"}
        (base / "config.json").write_text(json.dumps(config))
        self.refuse(monkeypatch, recipe, tmp_path / "out", "is quantised (fp8)")

    def test_too_little_space(self, workshop, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        self.refuse(monkeypatch, workshop / "recipe.yaml", tmp_path / "out", "10 KB free")

    def test_a_folder_with_something_else_in_it(self, workshop, tmp_path, monkeypatch):
        out = tmp_path / "out"
        out.mkdir()
        (out / "thesis.txt").write_text("")
        self.refuse(monkeypatch, workshop / "recipe.yaml", out, "no config.json", "--overwrite")
        assert [p.name for p in out.iterdir()] == ["thesis.txt"]

    def test_a_sweep_writes_no_full_model(self, workshop, tmp_path):
        content = yaml.safe_load((workshop / "recipe.yaml").read_text())
        content |= {"output": {"kind": "full"}, "merge_method": "task_arithmetic", "parameters": {}}
        recipe = workshop / "sweep-full.yaml"
        recipe.write_text(yaml.safe_dump(content))
        code, output = run("sweep", recipe, "--out", tmp_path / "out")
        assert code == USAGE and "nsc-fast apply" in output and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def result(workshop):
    content = load_recipe(workshop / "recipe.yaml").model_dump(mode="json", exclude_none=True)
    content |= {"merge_method": "uniform", "parameters": {}}
    for spec in content["adapters"]:
        del spec["data"]
    return run_recipe(make_recipe(content, where="here"))[0]


def test_a_write_that_fails_leaves_what_was_there(workshop, result, tmp_path, monkeypatch):
    base, out = BaseSpec(path=str(workshop / "base")), tmp_path / "out"
    save_full(result, out, base=base)
    before = weights(out)
    real, files = apply.write_weights, []

    def second_fails(path, *arguments):
        files.append(path)
        if len(files) == 2:
            raise MergeError("the disk is full")
        real(path, *arguments)

    monkeypatch.setattr(apply, "write_weights", second_fails)
    for folder, overwrite in ((out, True), (tmp_path / "new" / "out", False)):
        files.clear()
        with pytest.raises(MergeError, match="the disk is full"):
            save_full(result, folder, base=base, shard_size="50KB", overwrite=overwrite)
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert weights(out).keys() == before.keys()


def test_the_heads_stay_beside_the_model_and_are_told_of(workshop, result, tmp_path):
    from dataclasses import replace

    headed = replace(result, heads={"one": {"score.weight": torch.ones(2, 32)}})
    report = save_full(headed, tmp_path / "out", base=BaseSpec(path=str(workshop / "base")))
    assert (tmp_path / "out" / "heads" / "one.safetensors").is_file()
    assert any("heads of one are not in the full model" in notice for notice in report.notices)
