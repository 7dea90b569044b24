"""``merge --shard-base`` in two processes: what one process with the whole base gives."""

import json
import os

import pytest
import torch
from children import launch
from safetensors.torch import load_file
from test_cli import run

from nsc_fast.cli import app

FLAGS = ("--device", "cpu", "--set", "micro_batch=6", "--set", "steps=4", "--out-kind", "full")


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


@pytest.mark.slow
def test_two_processes_with_half_the_base_each(workshop, tmp_path):
    (tmp_path / "recipe").write_text(str(workshop / "recipe.yaml"))
    codes, errors = launch(work, tmp_path)
    assert codes == [0, 0], errors
    code, output = run("merge", workshop / "recipe.yaml", tmp_path / "alone", *FLAGS, "--no-verify")
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
    assert {p.name for p in tmp_path.iterdir()} == {"recipe", "held0", "held1", "out", "alone"}
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "alone"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
