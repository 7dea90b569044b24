"""The program on a machine with an accelerator, which ``--device auto`` takes."""

import json

import pytest
import stand_in
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner
from workshop import interrupted_after, workshop  # noqa: F401

from nsc_fast.cli import app

METHODS = {
    "nsc": {"steps": 3},
    "anchored": {"steps": 3, "rows": 16},
    "closed_form": {"rows": 16},
    "auto": {"anchored_steps": 2, "rows": 16, "scales": [0.3], "data_free": ["iso_c"]},
}


# The kernels, which are interpreted, have tests of their own.
TORCH = ("--impl", "torch")


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    output = " ".join(result.output.split())
    assert result.exit_code == 0, output
    return output


def settings(method):
    return [
        part for key, value in METHODS[method].items() for part in ("--set", f"{key}={json.dumps(value)}")
    ]


@pytest.mark.parametrize("method", METHODS)
def test_merge_verify_and_report(method, workshop, tmp_path):  # noqa: F811
    found = {}
    for device in ("cpu", "auto"):
        stand_in.RAN.clear()
        out = tmp_path / device
        arguments = ("merge", workshop / "recipe.yaml", out, *TORCH, "--method", method, *settings(method))
        output = run(*arguments, "--device", device)
        assert all(f"ok {check}" in output for check in ("weights", "reload", "identity", "difference"))
        assert bool(stand_in.RAN) == (device == "auto")
        found[device] = load_file(out / "adapter_model.safetensors")
    for key, expected in found["cpu"].items():
        # A gradient's own bases, and the scales in them, turn its rounding into more than that.
        allowed = 1e-2 if method in ("anchored", "auto") else 1e-3
        assert (found["auto"][key] - expected).abs().max() <= allowed * expected.abs().max(), key
    assert "ok reload" in run("verify", tmp_path / "auto", "--base-model", workshop / "base")
    run("report", tmp_path / "auto")
    assert (tmp_path / "auto" / "nsc_fast" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("method", ["nsc", "anchored"])
def test_resumed_with_the_same_bits(method, workshop, tmp_path, monkeypatch):  # noqa: F811
    def arguments(out):
        own = (*TORCH, "--set", "steps=5", "--checkpoint-every", 2, "--no-verify", "--method", method)
        return ("merge", workshop / "recipe.yaml", tmp_path / out, *own)

    run(*arguments("whole"))
    with interrupted_after(3, monkeypatch):
        assert CliRunner().invoke(app, [str(a) for a in arguments("parts")]).exit_code == 130
    run(*arguments("parts"), "--resume")
    whole, parts = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


def test_full_model_and_sweep(workshop, tmp_path):  # noqa: F811
    full = (*TORCH, "--out-kind", "full", "--set", "steps=1")
    assert "ok" in run("merge", workshop / "recipe.yaml", tmp_path / "full", *full)
    grid = (*TORCH, "--method", "task_arithmetic", "--grid", "scaling=0.1,0.3", "--out", tmp_path / "best")
    assert "0.1" in run("sweep", workshop / "recipe.yaml", *grid)
    assert stand_in.RAN


def test_doctor_tests_the_kernels_there():
    output = run("doctor")
    assert stand_in.NAME in output and "FAILED" not in output
