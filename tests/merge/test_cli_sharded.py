"""``merge --shard-base`` in two processes: what one process with the whole base gives."""

import json
import os

import pytest
import torch
from children import launch
from safetensors.torch import load_file
from test_cli import run

from nsc_fast.cli import app

COMMON = ("--device", "cpu", "--set", "micro_batch=6", "--set", "checkpointing=always")
FLAGS = (*COMMON, "--set", "steps=4", "--out-kind", "full")
AUTO = (*COMMON, "--method", "auto", "--set", "rows=8", "--set", "anchored_steps=2", "--set", "margin=9")
AUTO += ("--set", "scales=[0.3]", "--set", "data_free=[]", "--no-verify")


def work(folder):
    """The program, and how much of the base's blocks this process held while it merged."""
    from nsc_fast import merge

    divide = merge.shard

    def watched(model, modules, device):
        whole = sum(p.numel() for p in model.model.layers.parameters())
        divided = divide(model, modules, device)
        held = sum(p.to_local().numel() for p in model.model.layers.parameters())
        (folder / f"held{os.environ['RANK']}").write_text(str(held / whole))
        return divided

    merge.shard = watched
    recipe = (folder / "recipe").read_text()
    app(["merge", recipe, str(folder / "out"), *FLAGS, "--shard-base"], standalone_mode=False)
    app(["merge", recipe, str(folder / "chosen"), *AUTO, "--shard-base"], standalone_mode=False)


def updates_in(folder):
    """Module -> B A: the factors of one product may differ."""
    weights = load_file(folder / "adapter_model.safetensors")
    return {
        name: weights[name.replace("lora_A", "lora_B")] @ down
        for name, down in weights.items()
        if "lora_A" in name
    }


@pytest.mark.slow
def test_two_processes_with_half_the_base_each(workshop, tmp_path):
    (tmp_path / "recipe").write_text(str(workshop / "recipe.yaml"))
    codes, errors = launch(work, tmp_path)
    assert codes == [0, 0], errors
    code, output = run("merge", workshop / "recipe.yaml", tmp_path / "alone", *FLAGS, "--no-verify")
    assert code == 0, output
    code, output = run("merge", workshop / "recipe.yaml", tmp_path / "chosen alone", *AUTO)
    assert code == 0, output
    for rank in range(2):
        assert 0.4 < float((tmp_path / f"held{rank}").read_text()) < 0.6
    got, alone = (
        load_file(tmp_path / name / "nsc_fast" / "coefficients.safetensors") for name in ("out", "alone")
    )
    assert any((value != value.flatten()[0]).any() for value in alone.values())
    for module, value in alone.items():
        torch.testing.assert_close(got[module], value, rtol=0, atol=1e-6)
    signals = [
        json.loads((tmp_path / name / "nsc_fast" / "measurements.json").read_text())["signal"]
        for name in ("out", "alone")
    ]
    for kind in ("base", "alone", "initial", "final"):
        assert signals[0][kind] == pytest.approx(signals[1][kind], abs=2e-4)
    # The first process alone has written: the whole model.
    made = {"out", "alone", "chosen", "chosen alone"}
    assert {p.name for p in tmp_path.iterdir()} == {"recipe", "held0", "held1", *made}
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "alone"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
    ours, theirs = (updates_in(tmp_path / name) for name in ("chosen", "chosen alone"))
    for name, update in theirs.items():
        torch.testing.assert_close(ours[name], update, rtol=0, atol=1e-5)
