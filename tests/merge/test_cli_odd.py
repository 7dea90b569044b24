"""Odd names, odd places for the output, and folders that were changed by hand."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nsc_fast.cli import REFUSED, UNVERIFIED, USAGE, app

UNIFORM = ("--method", "uniform", "--device", "cpu")


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def flags(workshop, *adapters):
    named = [word for adapter in adapters for word in ("--adapter", adapter)]
    return ("merge", "--base-model", workshop / "base", *named, *UNIFORM)


def test_brackets_and_other_alphabets_in_names_are_told_as_they_are(workshop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workshop / "a0", "[red]ä")
    code, output = run(*flags(workshop, "[red]ä"), "--out", "[bold] 日")
    assert code == 0, output
    assert "wrote [bold] 日: " in output and "report: [bold] 日/nsc_fast/report.html" in output
    assert "identity:" in output and "adapter '[red]ä' with coefficient 1" in output
    code, output = run("verify", "[bold] 日", "--device", "cpu", "--base-model", workshop / "base")
    assert code == 0, output


def test_inspect_shows_targets(workshop):
    code, output = run("inspect", workshop / "a0")
    names = {path.split(".")[-3] for path in load_file(workshop / "a0" / "adapter_model.safetensors")}
    assert code == 0 and "targets" in output and all(name[:4] in output for name in names)


def test_a_rank_of_zero_is_not_no_rank(workshop, tmp_path):
    code, output = run(*flags(workshop, workshop / "a0"), "--out", tmp_path / "out", "--max-rank", 0)
    assert code == USAGE and "output.max_rank" in output


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_settings_are_finite(workshop, tmp_path, value):
    code, output = run("merge", workshop / "recipe.yaml", tmp_path / "out", "--set", f"init={value}")
    assert code == USAGE and "init: Input should be a finite number" in output


@pytest.mark.parametrize("out", ["mine", "mine/..", "."])
def test_an_adapter_is_not_overwritten_by_its_merge(workshop, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workshop / "a0", "mine")
    before = (tmp_path / "mine" / "adapter_model.safetensors").read_bytes()
    code, output = run(*flags(workshop, "mine"), "--out", out, "--overwrite")
    assert code == USAGE and "holds the adapter 'mine', which would be lost" in output
    assert (tmp_path / "mine" / "adapter_model.safetensors").read_bytes() == before


def test_a_hub_id_is_no_path_in_the_output(workshop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workshop / "a0", "someone")
    code, output = run(*flags(workshop, "someone/else"), "--out", "someone")
    assert code == USAGE and "the output someone exists" in output


def test_an_output_that_cannot_be_made_is_told_first(workshop, tmp_path, monkeypatch):
    from nsc_fast import merge

    monkeypatch.setattr(merge, "load_base", lambda *_, **__: 1 / 0)
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    code, output = run(*flags(workshop, workshop / "a0"), "--checkpoint-every", 0, "--out", out)
    assert code == USAGE and "cannot be written into" in output


def test_the_version_is_told_without_torch():
    code = (
        "import sys; sys.argv = ['nsc-fast', '--version']\nfrom nsc_fast.cli import main\ntry: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


@pytest.fixture(scope="module")
def merged(workshop, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "out"
    options = ("--set", "steps=1", "--device", "cpu", "--no-verify")
    code, output = run("merge", workshop / "recipe.yaml", out, *options)
    assert code == 0, output
    return out


class TestChangedByHand:
    @pytest.fixture
    def verify(self, merged, workshop, tmp_path):
        def verify(change, file="adapter_model.safetensors"):
            folder = tmp_path / "changed"
            shutil.copytree(merged, folder)
            tensors = load_file(folder / file)
            change(tensors)
            save_file({key: t.contiguous() for key, t in tensors.items()}, folder / file)
            return run("verify", folder, "--base-model", workshop / "base", "--device", "cpu")

        return verify

    def test_a_module_too_many(self, merged, workshop, tmp_path):
        """Factors where nothing was merged, in a module that the probe may not reach."""
        from nsc_fast.adapters import read_adapter
        from nsc_fast.verify import _weights_check

        written = read_adapter(merged, name="merged")
        expected = written.canonical()
        assert _weights_check(written, expected, None).passed
        more = expected.popitem()[0]
        check = _weights_check(written, expected, None)
        assert not check.passed and more in check.detail

    def test_factors_that_do_not_fit_the_base(self, verify):
        def change(tensors):
            key = next(key for key in tensors if "lora_A" in key)
            tensors[key] = tensors[key][:, :-1]

        code, output = verify(change)
        assert code == REFUSED and "does not fit the base's" in output

    @pytest.mark.parametrize("how", ["gone", "shape"])
    def test_coefficients(self, verify, how):
        def change(tensors):
            key = next(iter(tensors))
            tensors.pop(key) if how == "gone" else tensors.update({key: torch.ones(17)})

        code, output = verify(change, "nsc_fast/coefficients.safetensors")
        assert code == REFUSED and "is damaged: " in output
        assert ("no module '" if how == "gone" else "(17,)") in output

    def test_a_torn_file(self, merged, workshop, tmp_path):
        folder = tmp_path / "torn"
        shutil.copytree(merged, folder)
        (folder / "nsc_fast" / "coefficients.safetensors").write_bytes(b"torn")
        code, output = run("verify", folder, "--base-model", workshop / "base", "--device", "cpu")
        assert code == REFUSED and "is damaged: " in output

    def test_scale(self, merged, workshop, tmp_path):
        folder = tmp_path / "scaled"
        shutil.copytree(merged, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["lora_alpha"] *= 2
        (folder / "adapter_config.json").write_text(json.dumps(config))
        code, output = run("verify", folder, "--base-model", workshop / "base", "--device", "cpu")
        assert code == UNVERIFIED and "FAILED weights: 1.0e+00" in output
