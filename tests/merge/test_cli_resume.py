"""``merge`` that was killed goes on, and ``merge`` in two processes writes what one writes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from nsc_fast.cli import REFUSED, USAGE, app

ROOT = Path(__file__).resolve().parent.parent.parent
COMMON = ("--device", "cpu", "--no-verify", "--set", "signal_rows=0", "--set", "steps=40")


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def coefficients(out):
    return (out / "nsc_fast" / "coefficients.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(workshop, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    code, output = run("merge", workshop / "recipe.yaml", out, *COMMON)
    assert code == 0, output
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    return out


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_killed_and_resumed(workshop, tmp_path, undisturbed):
    out, kept = tmp_path / "out", tmp_path / "out.partial"
    arguments = ["merge", workshop / "recipe.yaml", out, *COMMON, "--checkpoint-every", "3"]
    with subprocess.Popen(
        [sys.executable, "-m", "nsc_fast", *map(str, arguments)], env=environment(), cwd=tmp_path
    ) as child:
        while child.poll() is None and not list(kept.glob("step-*")):
            time.sleep(0.001)
        os.kill(child.pid, signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL and not out.exists()
    code, output = run(*arguments)
    assert code == REFUSED and "out.partial holds checkpoints of an earlier run" in output
    code, output = run(*arguments, "--set", "learning_rate=1", "--resume")
    assert code == REFUSED and "parameters.learning_rate is 1.0 and was 0.01" in output
    recipe = (workshop / "recipe.yaml").read_text()
    for old, new, told in (("path: a0", "path: a2", "adapter one"), ("d0.jsonl", "d1.jsonl", "data of one")):
        other = workshop / "other.yaml"
        other.write_text(recipe.replace(old, new))
        code, output = run("merge", other, out, *arguments[3:], "--resume")
        assert code == REFUSED and f"{told} is not the same" in output
    code, output = run(*arguments, "--resume")
    assert code == 0 and "note: going on after step" in output
    assert coefficients(out) == coefficients(undisturbed)
    lines = (out / "nsc_fast" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 40 and lines == (undisturbed / "nsc_fast" / "metrics.jsonl").read_text().splitlines()
    assert not kept.exists()


def test_options_that_contradict_each_other(workshop, tmp_path):
    command = ("merge", workshop / "recipe.yaml", tmp_path / "out", "--checkpoint-every")
    code, output = run(*command, 0, "--resume")
    assert code == USAGE and "--checkpoint-every 0 writes none" in output
    code, output = run(*command, -1)
    assert code == USAGE and "--checkpoint-every -1" in output


def launched(*arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*launcher, "-m", "nsc_fast", *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_in_two_processes(workshop, tmp_path, undisturbed):
    out = tmp_path / "out"
    done = launched("merge", workshop / "recipe.yaml", out, *COMMON)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wrote ") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    got, alone = (
        load_file(folder / "nsc_fast" / "coefficients.safetensors") for folder in (out, undisturbed)
    )
    for module, value in alone.items():
        # In float32 a step's rounding is 1e-7; 40 steps of AdamW.
        torch.testing.assert_close(got[module], value, rtol=0, atol=1e-5)
