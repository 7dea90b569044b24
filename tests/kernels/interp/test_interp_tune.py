"""Tuning on request, with a clock that says what the test wants: what is tried, accepted and left alone."""

import json

import pytest
import torch
import triton
from nsc_fast.kernels.launch import Launch, has_tf32

from nsc_fast.kernels import project, tune, tuned

SIZES = {"rank": 12, "dim": 48, "tokens": 20, "device": "cpu"}


@pytest.fixture(autouse=True)
def _nothing_found(monkeypatch):
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    tuned.forget()
    tuned._read_once.cache_clear()
    yield
    tuned.forget()
    tuned._read_once.cache_clear()


class Clock:
    """The time of each call by its number; the first is the plain choice. Nothing is run."""

    def __init__(self, *milliseconds):
        self.milliseconds = milliseconds
        self.calls = 0

    def __call__(self, call):
        self.calls += 1
        return self.milliseconds[min(self.calls, len(self.milliseconds)) - 1]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120", "gfx942", "other"])
def test_neighbours_differ_in_one_size_and_keep_the_structure(target):
    for step in tuned.STEPS:
        for rank in (32, 128, 512):
            for dtype in ("bfloat16", "float32"):
                precision = "tf32" if dtype == "float32" and has_tf32(target) else "ieee"
                plain = tuned.Case(step, rank, dtype, target, True, precision).plain()
                found = tune.neighbours(plain)
                assert len(found) >= 2
                for choice in found:
                    changed = [name for name in vars(plain) if getattr(plain, name) != getattr(choice, name)]
                    assert len(changed) == 1
                    assert changed[0] in ("block_n", "block_d", "num_warps", "num_stages", "maxnreg")
                    assert choice.num_warps in (4, 8) and choice.block_n >= 16 and choice.num_stages >= 1


def test_without_a_request_the_plain_functions_decide():
    for step in tuned.STEPS:
        case = tuned.Case(step, 128, "bfloat16", "sm_90")
        assert tuned.choose(step, 96, torch.bfloat16, "sm_90") == case.plain()


@pytest.mark.parametrize("step", tuned.STEPS)
def test_every_step_can_be_tuned_and_neighbours_agree(step, monkeypatch):
    """Those of smaller blocks; warps and stages are nothing to the interpreter."""
    every = tune.neighbours

    def smaller(plain):
        size = plain.block_n * plain.block_d
        return [choice for choice in every(plain) if choice.block_n * choice.block_d < size]

    monkeypatch.setattr(tune, "neighbours", smaller)
    found = tune.tune(step, timer=Clock(1.0, 2.0), **SIZES)
    assert found.trials[0].choice == found.best == found.case.plain()
    assert len(found.trials) == 3
    assert not any(trial.reason for trial in found.trials), found.trials


def test_the_fastest_neighbour_is_remembered_and_launched(monkeypatch):
    clock = Clock(1.0, 0.9, 0.5, 0.7)
    found = tune.tune("project", timer=clock, **SIZES)
    assert found.best == found.trials[2].choice != found.case.plain()
    assert found.trials[2].milliseconds == 0.5 and "replaced" in str(found)
    launched = []
    grid = project.project_kernel.__class__.__getitem__

    def recording(kernel, blocks):
        launched.append(blocks)
        return grid(kernel, blocks)

    monkeypatch.setattr(project.project_kernel.__class__, "__getitem__", recording)
    assert tuned.choose("project", 9, torch.bfloat16, "sm_90") == found.best
    # Other dtypes, ranks of other bins and other steps keep the plain choice.
    other = [
        ("project", 9, torch.float16),
        ("project", 40, torch.bfloat16),
        ("low_rank_input", 9, torch.bfloat16),
    ]
    for step, rank, dtype in other:
        plain = tuned.Case(step, 32 if rank < 32 else 64, str(dtype)[6:], "sm_90").plain()
        assert tuned.choose(step, rank, dtype, "sm_90") == plain
    halved = Launch(**{**vars(found.case.plain()), "block_n": 64})
    tuned.remember(found.case, halved)
    project.project(torch.randn(130, 48).bfloat16(), torch.randn(12, 48).bfloat16())
    assert launched == [(3,)]


def test_a_gain_within_the_noise_changes_nothing():
    found = tune.tune("project", timer=Clock(1.0, 1.0 - tune.MARGIN / 2), **SIZES)
    assert found.best == found.case.plain() and "kept" in str(found)


def test_what_cannot_run_is_passed_over_with_its_reason(monkeypatch):
    sound = project.low_rank_input

    def limited(*args, choice, **more):
        if choice.num_stages == 4:
            raise triton.runtime.errors.PTXASError("Insufficient registers\n" + 10_000 * "mov.u32")
        return sound(*args, choice=choice, **more)

    monkeypatch.setattr(project, "low_rank_input", limited)
    clock = Clock(1.0, 0.5)
    found = tune.tune("low_rank_input", timer=clock, **SIZES)
    (failed,) = [trial for trial in found.trials if trial.milliseconds is None]
    assert failed.choice.num_stages == 4 and failed.reason.startswith("PTXASError: ")
    assert "Insufficient registers" in failed.reason and len(failed.reason) < 400
    assert found.best.num_stages == 2 and clock.calls == len(found.trials) - 1
    assert "1 passed over" in str(found)


@pytest.mark.parametrize("damage", [float("nan"), 1.1])
def test_a_neighbour_with_other_results_is_never_taken(monkeypatch, damage):
    sound = project.low_rank_input

    def damaged(*args, choice, **more):
        out = sound(*args, choice=choice, **more)
        return out * damage if choice.num_stages == 4 else out

    monkeypatch.setattr(project, "low_rank_input", damaged)
    found = tune.tune("low_rank_input", timer=Clock(1.0, 0.5), **SIZES)
    (wrong,) = [trial for trial in found.trials if trial.milliseconds is None]
    assert wrong.choice.num_stages == 4 and "differs from the plain choice's" in wrong.reason
    assert found.best.num_stages == 2


def test_a_plain_choice_that_cannot_run_is_an_error(monkeypatch):
    def broken(*args, **more):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(project, "low_rank_input", broken)
    with pytest.raises(RuntimeError, match="no such instruction"):
        tune.tune("low_rank_input", timer=Clock(1.0), **SIZES)


def test_refusals():
    with pytest.raises(ValueError, match="timed on a GPU"):
        tune.tune("project", **SIZES)
    with pytest.raises(ValueError, match="choose one of project"):
        tune.tune("reduce", timer=Clock(1.0), **SIZES)


def faster():
    case = tuned.Case("project", 32, "bfloat16", "sm_90")
    choice = tune.neighbours(case.plain())[0]
    tuned.remember(case, choice)
    return case, choice


def test_choices_survive_in_a_file_that_the_environment_names(tmp_path, monkeypatch):
    case, choice = faster()
    path = tmp_path / "launches.json"
    tuned.save(path)
    tuned.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["launches.json"]
    tuned.forget()
    assert tuned.choose("project", 20, torch.bfloat16, "sm_90") == case.plain()
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    assert tuned.choose("project", 20, torch.bfloat16, "sm_90") == choice


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    faster()
    path = tmp_path / "launches.json"
    tuned.save(path)
    before = path.read_text()

    def refused(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(tuned.os, "replace", refused)
    with pytest.raises(PermissionError):
        tuned.save(path)
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["launches.json"]


def test_choices_of_another_compiler_or_another_table_are_left_out(tmp_path):
    case, _ = faster()
    path = tmp_path / "launches.json"
    tuned.save(path)
    tuned.forget()
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "triton": "2.0.0"}))
    with pytest.warns(UserWarning, match="found with Triton 2.0.0.*tune again"):
        assert tuned.load(path) == 0
    content["choices"][0]["launch"]["parts"] = 2
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="plain choices have changed"):
        assert tuned.load(path) == 0
    assert tuned.choose("project", 32, torch.bfloat16, "sm_90") == case.plain()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"triton": "x", "choices": [{"step": "project"}]}', '{"triton": 1, "choices": 3}'],
)
def test_a_file_of_something_else_is_refused_by_name(tmp_path, monkeypatch, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    with pytest.raises(ValueError, match=f"other.json does not hold launch choices.*{tuned.VARIABLE}"):
        tuned.choose("project", 32, torch.bfloat16, "sm_90")
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "absent.json"))
    with pytest.raises(FileNotFoundError):
        tuned.choose("project", 32, torch.bfloat16, "sm_90")
