"""The whole demo on few rows and few steps: mechanics, not scores."""

import io

import pytest
from rich.console import Console

from nsc_fast.adapters import read_adapter
from nsc_fast.demo import run as demo
from nsc_fast.demo.encoder import BASE_MODEL, MissingBaseModel, encoder_folder
from nsc_fast.demo.table import FINE_TUNED
from nsc_fast.demo.tasks import TASKS
from nsc_fast.errors import MergeError


@pytest.fixture(autouse=True)
def base_model():
    try:
        encoder_folder()
    except MissingBaseModel as missing:
        pytest.skip(str(missing))


def test_the_demo_runs_reports_and_writes(tmp_path):
    console = Console(width=80, record=True, file=io.StringIO())
    out = tmp_path / "merged"
    result = demo.run(out, console=console, test_rows=24, steps=2)

    assert list(result.scores)[:2] == [FINE_TUNED, demo.BASE]
    assert list(result.scores)[-2:] == [demo.NSC, demo.AUTO]
    assert len(result.scores) == 4 + len({*demo.COEFFICIENTS, 1 / len(TASKS)})
    names = [task.name for task in TASKS]
    assert all(list(scores) == names for scores in result.scores.values())
    assert len(result.nsc.history) == 2

    text = console.export_text()
    assert all(method in text for method in result.scores)
    assert "auto chose" in text and "…" not in text and str(out) in text.replace("\n", "")

    merged = read_adapter(out)
    assert merged.base_model == BASE_MODEL
    assert len(merged.modules) == 36
    assert {p.stem for p in (out / "heads").iterdir()} == set(names)


def test_an_output_that_exists_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load_encoder", lambda: pytest.fail("work was begun"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MergeError, match="choose another folder"):
        demo.run(tmp_path)
