"""The report of an output folder: written with the merge, made again from the folder alone."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from report_inputs import TASKS, Page, Resources, merged, optimised, signal_of
from typer.testing import CliRunner

from nsc_fast import methods
from nsc_fast.cli import REFUSED, app
from nsc_fast.errors import MergeError
from nsc_fast.report import write_report
from nsc_fast.report.card import BEGIN, END

DATA_FREE = [n for n in methods.names() if not methods.get(n).needs_data and methods.get(n).one_model]


def command(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    optimised(merged(), signal=signal_of()).save_pretrained(folder, max_rank=4)
    return folder


@pytest.mark.parametrize("method", DATA_FREE)
def test_every_data_free_method_has_a_report(method, tmp_path):
    result = merged(method)
    result.save_pretrained(tmp_path / "out")
    page = Page.of(tmp_path / "out")
    assert "ran without data" in page.text("ratios") and method in page.text("ratios")
    assert "recorded no optimisation steps" in page.text("optimisation")
    heat = page.tables("coefficients")
    assert bool(heat) == bool(result.coefficients)
    assert len(page.tables("interference")) == 6
    assert len(page.tables("update")[1]) == 1 + len(result.updates)


def test_the_page_needs_nothing_else(out):
    page = Page.of(out)
    assert Resources(page.html).found == []
    for word in ("@import", "url(", "http:", "https:", "javascript"):
        assert word not in page.html


def test_the_folder_alone_gives_the_same_report_on_another_machine(out, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.move(out, moved)
    before = contents(moved)
    (moved / "adapter_model.safetensors").unlink()
    (moved / "nsc_fast" / "report.html").write_text("stale")
    written = write_report(moved)
    assert written == [moved / "nsc_fast" / "report.html", moved / "README.md"]
    after = contents(moved)
    del before["adapter_model.safetensors"]
    assert after == before


def test_two_merges_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        torch.manual_seed(5)
        optimised(merged(), signal=signal_of()).save_pretrained(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_command_makes_it_again(out):
    page = out / "nsc_fast" / "report.html"
    before = page.read_bytes()
    page.unlink()
    code, output = command(out)
    assert code == 0 and "report.html" in output and "README.md" in output
    assert page.read_bytes() == before


class TestCard:
    def test_it_tells_what_was_measured(self, out):
        text = (out / "README.md").read_text(encoding="utf-8")
        summary = json.loads((out / "nsc_fast" / "merge.json").read_text())
        assert text.startswith("---\nlibrary_name: peft\nbase_model: org/base\n")
        for part in (
            "One LoRA made from 3 adapters",
            "`nsc`",
            "## Recipe",
            "seed: 3",
            "## Versions",
            "torch:",
        ):
            assert part in text
        for number, task in enumerate(TASKS):
            first, last = 0.9 - 0.1 * number, 0.84 - 0.1 * number
            assert f"| {task} | {first:.4f} | {last:.4f} |" in text
            assert f"| {0.77 + 0.0101 * number:.4f} | {5.25 - number:.2f} |" in text
            assert summary["sources"][task]["digest"][:16] in text

    def test_the_kept_energy_is_that_of_the_written_adapter(self, tmp_path):
        result = merged()
        report = result.save_pretrained(tmp_path / "out", max_rank=4)
        text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        assert f"truncation to rank 4 kept {report.total_kept_energy:.2%}".rstrip("%") in text
        worst = min(report.kept_energy, key=report.kept_energy.get)
        assert f"least at `{worst}`" in text and 0.5 < report.total_kept_energy < 0.999

    def test_words_of_the_user_stay(self, out):
        readme = out / "README.md"
        text = readme.read_text(encoding="utf-8")
        mine = text.replace("# Merge of", "Mine.\n\n# Merge of").replace("0.7700", "9.9900") + "\nMine too.\n"
        readme.write_text(mine, encoding="utf-8")
        write_report(out)
        assert readme.read_text(encoding="utf-8") == mine.replace("9.9900", "0.7700")

    @pytest.mark.parametrize("text", ["# My own card\n", f"{END}\nupside down\n{BEGIN}\n"])
    def test_a_card_without_marks_is_left_alone(self, out, text):
        (out / "README.md").write_text(text)
        assert write_report(out) == [out / "nsc_fast" / "report.html"]
        assert (out / "README.md").read_text() == text

    def test_no_private_path_gets_out(self, out):
        assert "somebody" in (out / "nsc_fast" / "config.resolved.yaml").read_text()
        for file in ("README.md", "nsc_fast/report.html"):
            assert "somebody" not in (out / file).read_text(encoding="utf-8")

    def test_markup_in_names_stays_text(self, tmp_path):
        name = "a|b <img src=x> [x](y)\n# c ``` -->"
        fence = {"note": "```\n# outside", "end": END}
        result = merged(tasks=(name, "two"), notices=("first\n\n# no heading",))
        replace(result, recipe={**result.recipe, **fence}).save_pretrained(tmp_path / "out")
        text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        assert r"a\|b \<img src=x\> \[x\](y) \# c \`\`\` --\>" in text
        assert "\n# no heading" not in text and "````yaml\n" in text
        again = text
        write_report(tmp_path / "out")
        assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == again


class TestBadInput:
    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("measurements.json", b'{"output": {"rank": 4', "measurements.json is damaged: Expecting"),
            ("measurements.json", b"[]", "measurements.json is damaged: content"),
            ("measurements.json", b'{"spectrum": {"m": {"shape": [1]}}}', "spectrum.m.shape"),
            ("measurements.json", b"\xff\xfe", "measurements.json is damaged: 'utf-8'"),
            ("merge.json", b"", "merge.json is damaged"),
            ("merge.json", b'{"tasks": ["a"], "modules": 1}', "merge.json is damaged: method"),
            ("metrics.jsonl", b'{"step": 1}\n', "metrics.jsonl is damaged: 0.loss"),
            (
                "coefficients.json",
                b'{"m": {"tasks": "one", "values": []}}',
                "coefficients.json is damaged: m.tasks",
            ),
            ("environment.json", b"7", "environment.json is damaged"),
            ("config.resolved.yaml", b"a: [", "config.resolved.yaml is damaged"),
        ],
    )
    def test_a_damaged_file_is_named_and_nothing_changes(self, out, file, content, message):
        (out / "nsc_fast" / file).write_bytes(content)
        before = contents(out)
        code, output = command(out)
        assert code == REFUSED and message in output and "merge again" in output
        assert contents(out) == before

    def test_pairs_that_do_not_fit_the_tasks(self, out):
        file = out / "nsc_fast" / "measurements.json"
        content = json.loads(file.read_text())
        next(iter(content["interference"].values()))["cosine"].pop()
        file.write_text(json.dumps(content))
        code, output = command(out)
        assert code == REFUSED and "3 tasks do not fit" in output

    def test_a_folder_that_no_merge_wrote(self, tmp_path):
        (tmp_path / "other").mkdir()
        code, output = command(tmp_path / "other")
        assert code == REFUSED and "no nsc_fast/merge.json" in output
        assert not list((tmp_path / "other").iterdir())

    def test_no_folder(self, tmp_path):
        (tmp_path / "file").write_text("")
        for path in (tmp_path / "none", tmp_path / "file"):
            code, output = command(path)
            assert code == REFUSED and "there is no folder" in output

    def test_a_failed_write_leaves_the_old_report(self, out, monkeypatch):
        before = contents(out)

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(MergeError, match="cannot be written.*No space left"):
            write_report(out)
        monkeypatch.undo()
        assert contents(out) == before

    def test_what_an_older_version_wrote_has_a_report(self, out):
        (out / "nsc_fast" / "measurements.json").unlink()
        summary = out / "nsc_fast" / "merge.json"
        old = json.loads(summary.read_text())
        del old["measure"]
        summary.write_text(json.dumps(old))
        write_report(out)
        page = Page.of(out)
        assert "Not recorded" in page.text("update") and "Not recorded" in page.text("interference")
        assert len(page.tables("coefficients")) == 1
