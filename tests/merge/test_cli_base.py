"""Where the base model is and in what form, as the command line says it."""

import importlib.util

import pytest
from test_cli import run

from nsc_fast.checks import check_processes
from nsc_fast.cli import REFUSED, USAGE
from nsc_fast.cli_recipe import recipe_of
from nsc_fast.errors import MergeError, RecipeError
from nsc_fast.recipe import BaseSpec, make_recipe


def test_flags_go_over_single_fields_of_the_recipe(workshop, tmp_path):
    text = (workshop / "recipe.yaml").read_text()
    file = workshop / "flags.yaml"
    long = "base_model: {path: base, revision: abc, dtype: bfloat16}"
    file.write_text(text.replace("base_model: base", long) + "output: {max_rank: 4}\n")
    recipe = recipe_of(file, base={"load_in_4bit": True, "path": None}, output={"kind": "full"})
    base = recipe.base_model
    assert (base.path, base.revision, base.dtype) == (str(workshop / "base"), "abc", "bfloat16")
    assert base.load_in_4bit and not base.load_in_8bit
    assert (recipe.output.kind, recipe.output.max_rank, recipe.output.dtype) == ("full", 4, "auto")
    base = recipe_of(file, base={"path": "org/other", "trust_remote_code": True}).base_model
    assert (base.path, base.revision, base.dtype, base.trust_remote_code) == (
        "org/other",
        None,
        "bfloat16",
        True,
    )
    base = recipe_of(workshop / "recipe.yaml", base={"device_map": "{model.norm: cpu, lm_head: 0}"})
    assert base.base_model.device_map == {"model.norm": "cpu", "lm_head": 0}
    assert recipe_of(workshop / "recipe.yaml", base={"device_map": "auto"}).base_model.device_map == "auto"


def test_a_flag_without_a_base_model_says_what_is_missing():
    with pytest.raises(RecipeError, match="--load-in-4bit, --shard-base: name the base model, too"):
        recipe_of(None, ["a=a"], base={"load_in_4bit": True, "shard": True})


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--shard-base"], REFUSED, "this one is alone: start it with torchrun"),
        (["--shard-base", "--load-in-4bit"], USAGE, "quantised weights cannot be sharded"),
        (["--shard-base", "--device-map", "auto"], USAGE, "choose one"),
        (["--shard-base", "--max-memory", "2GB", "--dry-run"], USAGE, "--max-memory plans for a base"),
        (["--device-map", "atuo"], USAGE, "'atuo' is no place; write auto, balanced"),
        (["--device-map", "{lm_head: nowhere}"], USAGE, "'nowhere' is no place; write a device"),
        (["--device-map", "{lm_head: [}"], USAGE, "is not readable"),
        (["--device-map", "auto", "--device", "cpu"], USAGE, "leave one out"),
        (["--load-in-8bit", "--device-map", "{a: disk}"], USAGE, "has no part on 'disk'"),
        (["--load-in-8bit", "--device-map", "{a: cpu, b: 0}"], USAGE, "on 'cpu' all parts or none"),
        (["--device", "quark"], USAGE, "--device 'quark' is none"),
        (["--device", "cuda:77"], USAGE, "torch cannot use it here"),
        (["--out-dtype", "auto"], USAGE, "for kind full"),
        (["--out-shard-size", "1GB"], USAGE, "a LoRA is one file"),
        (["--out-kind", "full", "--out-shard-size", "many"], USAGE, "'many' is no amount of memory"),
    ],
)
def test_what_does_not_go_together_is_told_before_anything_is_loaded(
    workshop, tmp_path, monkeypatch, flags, code, message
):
    from nsc_fast import merge

    monkeypatch.setattr(merge, "load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    got, output = run("merge", workshop / "recipe.yaml", tmp_path / "out", *flags)
    assert got == code and message in output, output
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_named_in_full(workshop, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a)
    )
    code, output = run("merge", workshop / "recipe.yaml", tmp_path / "out", "--load-in-4bit")
    assert code == REFUSED and "pip install 'nsc-fast[quantised]'" in output and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("ties", {}, "'ties' cannot run on a sharded base"),
        ("adamerging", {"entropy": "all_tokens"}, "takes as many passes as an answer has tokens"),
    ],
)
def test_what_cannot_run_on_a_sharded_base_says_so(workshop, method, parameters, message):
    from nsc_fast.merge import check_inputs

    base = {"path": str(workshop / "base"), "shard": True}
    adapters = [{"name": "one", "path": str(workshop / "a0")}]
    recipe = {"base_model": base, "merge_method": method, "adapters": adapters, "parameters": parameters}
    with pytest.raises(MergeError, match=message):
        check_inputs(make_recipe(recipe, where="here"))


def test_modules_that_were_trained_whole_keep_a_base_from_being_sharded(workshop):
    from dataclasses import replace

    import torch

    from nsc_fast import methods, read_adapter
    from nsc_fast.checks import check_shardable

    dense = replace(read_adapter(workshop / "a0"), dense={"model.norm.weight": torch.ones(32)})
    nsc = methods.get("nsc")
    with pytest.raises(MergeError, match="adapter 'one' holds modules that were trained whole"):
        check_shardable(nsc, nsc.parameters(), {"one": dense})


def test_a_device_map_is_for_one_process():
    class Two:
        size = 2

    with pytest.raises(MergeError, match="device_map is for one process, and there are 2"):
        check_processes(BaseSpec(path="base", device_map="auto"), Two())
    check_processes(BaseSpec(path="base", device_map="auto"), None)
    check_processes(BaseSpec(path="base", shard=True), Two())
