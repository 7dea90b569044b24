"""What the command line says where something is wrong or interrupted, before time is spent."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner
from workshop import interrupted_after

from nsc_fast import merge, merge_adapters
from nsc_fast.adapters import AdapterError, read_adapter
from nsc_fast.cli import REFUSED, USAGE, app
from nsc_fast.errors import MergeError, RecipeError
from nsc_fast.loading import base_skeleton
from nsc_fast.parameters import Scope
from nsc_fast.recipe import BaseSpec, make_recipe
from nsc_fast.verify import verify_folder

ROOT = Path(__file__).resolve().parent.parent.parent
DATA_FREE = ("--method", "task_arithmetic", "--device", "cpu", "--no-verify")


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def no_loading(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the base model was loaded")

    monkeypatch.setattr(merge, "load_base", refuse)


@pytest.fixture
def headed(workshop, tmp_path):
    """A copy of a0 that holds the language model's head, too."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "headed"
    shutil.copytree(workshop / "a0", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = torch.zeros(63, 32)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def test_modules_trained_whole_can_be_left_out_as_the_message_says(workshop, headed, tmp_path):
    flags = ("merge", "--base-model", workshop / "base", "--adapter", f"one={headed}", *DATA_FREE)
    code, output = run(*flags, "--out", tmp_path / "out")
    assert code == REFUSED and "--modules-to-save" in output and "drop leaves them out" in output
    code, output = run(*flags, "--out", tmp_path / "out", "--modules-to-save", "drop")
    assert code == 0, output
    with pytest.raises(AdapterError, match="choose modules_to_save .*in Python"):
        merge_adapters(None, {"one": headed}, method="task_arithmetic")
    kept = merge_adapters(None, {"one": headed}, method="task_arithmetic", modules_to_save="keep-separate")
    assert list(kept.heads["one"]) == ["lm_head.weight"]


def test_inspect_writes_sentences(headed):
    code, output = run("inspect", headed)
    assert code == REFUSED and "Problem(" not in output
    assert "modules_to_save = lm_head: whole modules were trained" in output and "Way out: choose" in output


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_foreign_folder_is_not_replaced_and_that_is_told_first(workshop, tmp_path, no_loading, kind):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    options = ("--overwrite", "--out-kind", kind, "--device", "cpu")
    code, output = run("merge", workshop / "recipe.yaml", tmp_path / "mine", *options)
    assert code == REFUSED and "not what is written here" in output
    sweep = ("--method", "task_arithmetic", "--out", tmp_path / "mine", "--overwrite", "--device", "cpu")
    code, output = run("sweep", workshop / "recipe.yaml", *sweep)
    assert code == REFUSED and "not what is written here" in output
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--impl", "triton"), "the tensors are on the CPU"),
        (("--impl", "cuda"), "choose one of"),
        (("--set", "scope=3", "--set", "scope.layers=last_1"), "parameters.scope is 3, which has no keys"),
        (("--set", "steps=[1"), "the value is not readable"),
    ],
)
def test_options_are_refused_before_the_model_is_loaded(
    workshop, tmp_path, no_loading, monkeypatch, options, message
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, output = run("merge", workshop / "recipe.yaml", tmp_path / "out", "--device", "cpu", *options)
    assert code == USAGE and message in output


def test_empty_keys_are_absent(workshop, tmp_path):
    file = tmp_path / "empty.yaml"
    adapters = [{"name": "one", "path": str(workshop / "a0")}]
    content = {"adapters": adapters, "merge_method": "task_arithmetic", "base_model": str(workshop / "base")}
    file.write_text(yaml.safe_dump(content) + "parameters:\noutput:\n")
    assert run("validate", file)[0] == 0
    code, output = run("merge", file, "--dry-run", "--set", "scaling=0.3")
    assert code == 0, output


def test_another_method_on_the_command_line_takes_the_parameters_it_has(workshop, tmp_path):
    code, output = run("merge", workshop / "recipe.yaml", tmp_path / "out", *DATA_FREE)
    assert code == 0, output
    assert "the recipe's parameters steps, learning_rate, scope are those of 'nsc' and left out" in output
    assert "note: method 'task_arithmetic' uses no data: those of the recipe are not read" in output
    code, output = run("merge", workshop / "recipe.yaml", "--dry-run", "--method", "ties", "--set", "stepz=1")
    assert code == USAGE and "stepz: unknown key" in output


def test_the_sweep_of_the_readme(workshop, tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in readme.splitlines() if line.startswith("nsc-fast sweep recipe.yaml")]
    scorer = tmp_path / "eval.py"
    scorer.write_text("print(0.5)\n")
    arguments = [str(workshop / a) if a == "recipe.yaml" else a for a in shlex.split(line)[1:]]
    arguments[arguments.index("python eval.py")] = f"{shlex.quote(sys.executable)} {scorer}"
    arguments[arguments.index("best")] = str(tmp_path / "best")
    code, output = run(*arguments, "--device", "cpu")
    assert code == 0, output
    assert (tmp_path / "best" / "adapter_config.json").is_file()


def test_ctrl_c_says_how_to_go_on_and_that_works(workshop, tmp_path):
    out, kept = tmp_path / "out", tmp_path / "out.partial"
    options = ("--device", "cpu", "--no-verify", "--set", "steps=4000", "--set", "signal_rows=0")
    arguments = ["merge", workshop / "recipe.yaml", out, *options, "--checkpoint-every", "3"]
    with subprocess.Popen(
        [sys.executable, "-m", "nsc_fast", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and so does what that starts.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as child:
        while child.poll() is None and not list(kept.glob("step-*")):
            time.sleep(0.001)
        os.kill(child.pid, signal.SIGINT)
        told = child.communicate(timeout=120)[1]
    assert child.returncode == 130, told
    assert json.loads((out / "nsc_fast" / "merge.json").read_text())["interrupted"] is True
    (line,) = [line for line in told.splitlines() if line.startswith("to go on: ")]
    command = shlex.split(line.removeprefix("to go on: "))
    assert command == ["python", "-m", "nsc_fast", *map(str, arguments), "--resume"]
    code, output = run(*command[3:], "--set", "learning_rate=1")
    assert code == REFUSED and "parameters.learning_rate is 1.0 and was 0.01" in output
    code, output = run(*command[3:-1])
    assert code != 0 and "--resume" in output
    # The rest is long: an output of another run stays.
    (out / "nsc_fast" / "merge.json").write_text("{}")
    code, output = run(*command[3:])
    assert code == USAGE and "exists; choose another folder" in output


def test_an_interrupted_output_is_replaced(workshop, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = ("merge", workshop / "recipe.yaml", out, "--device", "cpu", "--no-verify")
    arguments += ("--set", "signal_rows=0", "--checkpoint-every", "2")
    with interrupted_after(3, monkeypatch):
        code, output = run(*arguments)
    assert code == 130 and "to go on: " in output
    assert len((out / "nsc_fast" / "metrics.jsonl").read_text().splitlines()) == 3
    code, output = run(*arguments, "--resume")
    assert code == 0 and "going on after step 2" in output, output
    assert len((out / "nsc_fast" / "metrics.jsonl").read_text().splitlines()) == 6


@pytest.fixture(scope="module")
def moved(workshop, tmp_path_factory):
    """A merge of an adapter that names its base by a relative path; a dtype and a subfolder in the recipe."""
    folder = tmp_path_factory.mktemp("moved")
    shutil.copytree(workshop / "base", folder / "models" / "small")
    shutil.copytree(workshop / "a0", folder / "a0")
    config = json.loads((folder / "a0" / "adapter_config.json").read_text())
    (folder / "a0" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "base"})
    )
    recipe = {
        "base_model": {"path": "models", "subfolder": "small", "dtype": "bfloat16"},
        "merge_method": "task_arithmetic",
        "adapters": [{"name": "one", "path": "a0"}],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, output = run("merge", folder / "recipe.yaml", folder / "out", "--device", "cpu", "--no-verify")
    assert code == 0, output
    return folder


def test_verify_loads_the_base_that_the_recipe_records(moved, tmp_path, monkeypatch):
    from nsc_fast import verify

    loaded = []
    monkeypatch.setattr(verify, "load_base", lambda spec, *_, **__: loaded.append(spec) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        verify_folder(moved / "out")
    with pytest.raises(ZeroDivisionError):
        verify_folder(moved / "out", base_model="elsewhere")
    first, second = loaded
    assert first == BaseSpec(path=str(moved / "models"), subfolder="small", dtype="bfloat16")
    assert second == BaseSpec(path="elsewhere", dtype="bfloat16")


def test_verify_works_from_anywhere_and_names_the_option_where_not(moved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert all(check.passed for check in verify_folder(moved / "out"))
    shutil.copytree(moved / "out", tmp_path / "copy")
    file = tmp_path / "copy" / "nsc_fast" / "config.resolved.yaml"
    content = yaml.safe_load(file.read_text())
    content["base_model"]["path"] = str(tmp_path / "gone")
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(MergeError, match="no such folder.*--base-model"):
        verify_folder(tmp_path / "copy")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.resolved.yaml", "- nothing\n"),
        ("config.resolved.yaml", "adapters: [one]\n"),
        ("config.resolved.yaml", "adapters: ["),
        ("merge.json", "{"),
        ("merge.json", "[]"),
        ("merge.json", '{"method": "uniform", "tasks": ["one"], "modules": 1}'),
    ],
)
def test_a_damaged_record_is_named(moved, tmp_path, file, text):
    shutil.copytree(moved / "out", tmp_path / "copy")
    (tmp_path / "copy" / "nsc_fast" / file).write_text(text)
    with pytest.raises(MergeError, match=f"{file} is damaged"):
        verify_folder(tmp_path / "copy")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"one": "file.jsonl"}, "data of task 'one' is the path 'file.jsonl'.*text_batches"),
        ({"one": {"input_ids": torch.ones(1, 4)}}, r"single batch \(input_ids\); put it in a list"),
        ({"one": 3}, "data of task 'one' is a int"),
        ([{"input_ids": torch.ones(1, 4)}], "data is a list; give a dict"),
    ],
)
def test_what_is_no_batches_is_named(workshop, data, message):
    with pytest.raises(MergeError, match=message):
        merge_adapters(torch.nn.Linear(2, 2), {"one": workshop / "a0"}, data=data)


def test_unknown_parameters_are_named_in_python():
    with pytest.raises(RecipeError, match="parameters of 'nsc': lr: unknown key"):
        merge_adapters(None, {"one": "nowhere"}, parameters={"lr": 3})


def test_the_number_of_a_block_is_a_range_of_one():
    assert Scope(layers=5).layers == "5"
    content = {"parameters": {"scope": {"layers": 3}}, "adapters": [{"name": "one", "path": "a"}]}
    assert make_recipe(content, where="here").method_parameters().scope.layers == "3"


def test_a_slip_in_a_path_does_not_wait_for_the_hub(workshop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ad").mkdir()
    tried = []

    def offline_only(*_, local_files_only=False, **__):
        tried.append(local_files_only)
        from huggingface_hub.errors import LocalEntryNotFoundError

        raise LocalEntryNotFoundError("not there")

    monkeypatch.setattr("nsc_fast.adapters.source.hf_hub_download", offline_only)
    with pytest.raises(AdapterError, match="does not exist"):
        read_adapter("ad/nope")
    assert tried == [True]
    for path in ("./nope", "../nope", str(tmp_path / "nope")):
        with pytest.raises(AdapterError, match="does not exist"):
            read_adapter(path)
        with pytest.raises(MergeError, match="no such folder; check the path"):
            base_skeleton(BaseSpec(path=path), ["x"], task_type=None)
    assert tried == [True]
    begun = time.perf_counter()
    with pytest.raises(MergeError, match="no such folder, and it is not in the"):
        base_skeleton(BaseSpec(path="ad/nope"), ["x"], task_type=None)
    assert time.perf_counter() - begun < 5


def test_doctor_says_what_the_interpreter_gets_wrong(monkeypatch):
    from nsc_fast.ops import dispatch, selftest

    code, output = run("doctor", "--device", "cpu")
    assert "interpreter computes" not in output
    monkeypatch.setattr(dispatch, "obstacle", lambda *_: None)
    failed = selftest.Finding("merged_linear", torch.bfloat16, 1.0, 5e-2)
    monkeypatch.setattr(selftest, "run", lambda *_: (failed,))
    code, output = run("doctor", "--device", "cpu")
    assert "FAILED" in output and "What fails in bfloat16 here is the interpreter" in output
