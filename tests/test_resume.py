"""A run that was interrupted goes on to the same bits, whenever and however it was interrupted."""

import errno
import io
import os
import random
import shutil
import signal
import time
from contextlib import nullcontext

import pytest
import torch
from children import start
from tiny import MLP_MODULES, Mlp, canonical_adapters, random_adapters

from nsc_fast import checkpoint
from nsc_fast.batches import BatchStream
from nsc_fast.checkpoint import Checkpoints
from nsc_fast.driver import optimise
from nsc_fast.errors import MergeError
from nsc_fast.parameters import EarlyStopping, NSCParameters

RANKS = {"one": 2, "two": 4}
STEPS = 20
PARAMETERS = NSCParameters(steps=STEPS, learning_rate=0.03, schedule="cosine", weight_decay=0.01)


class Interrupted(Exception):
    pass


class Shuffled:
    """Draws its order from torch's global generator, as a DataLoader does."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        for i in torch.randperm(len(self.batches)).tolist():
            yield self.batches[i]


class Remembering(Shuffled):
    """With a generator of its own, which goes on from round to round."""

    def __init__(self, batches):
        super().__init__(batches)
        self.generator = torch.Generator().manual_seed(5)

    def __iter__(self):
        for i in torch.randperm(len(self.batches), generator=self.generator).tolist():
            yield self.batches[i]


def iterator(batches):
    yield from batches


SOURCES = {"list": list, "shuffled": Shuffled, "remembering": Remembering, "iterator": iterator}


def job(source="list", rows=3, seed=0):
    """Model, adapters and data; the same whenever it is called."""
    torch.manual_seed(seed)
    model = Mlp().double()
    adapters = canonical_adapters(random_adapters(model, MLP_MODULES, RANKS))
    data = {
        task: SOURCES[source]([{"x": torch.randn(rows, 8, dtype=torch.float64)} for _ in range(3 + k)])
        for k, task in enumerate(RANKS)
    }
    return model, adapters, data


def run(checkpoints=None, parameters=PARAMETERS, source="list", stop_at=None, **options):
    def on_step(record):
        if record.step == stop_at:
            raise Interrupted

    if checkpoints is not None:
        on_step, options["checkpoints"] = options.pop("on_step", on_step), checkpoints
    return optimise(*job(source), parameters, on_step=on_step, **options)


def interrupted(folder, at, every=3, **options):
    with pytest.raises(Interrupted):
        run(Checkpoints(folder, every), stop_at=at, **options)


def same(first, second):
    """Coefficients, history and the word on an interruption by the user."""
    assert all(torch.equal(first[0][m], second[0][m]) for m in first[0])
    assert first[1:] == second[1:]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out.partial"


@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_of_data_goes_on_where_it_was(folder, source):
    """Step 14 is in the fifth round of one task and the fourth of the other."""
    whole = run(source=source)
    same(run(Checkpoints(folder, 3), source=source), whole)
    shutil.rmtree(folder)
    interrupted(folder, 14, source=source)
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000009.ckpt", "step-00000012.ckpt"]
    same(run(Checkpoints(folder, 3, resume=True, on_notice=print), source=source), whole)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"early_stopping": EarlyStopping(patience=6, min_delta=0.002)}, {}),
        ({}, {"levels": {"one": 2.0, "two": 0.0}}),
        ({"granularity": "rank", "schedule": "linear", "warmup_steps": 10}, {}),
    ],
)
def test_everything_else_that_changes_from_step_to_step(folder, changes, options):
    parameters = PARAMETERS.model_copy(update=changes)
    whole = run(parameters=parameters, **options)
    interrupted(folder, 5, every=2, parameters=parameters, **options)
    notices = []
    resumed = Checkpoints(folder, 2, resume=True, on_notice=notices.append)
    same(run(resumed, parameters, **options), whole)
    assert notices == ["going on after step 4"]


def until_the_end(folder, result):
    slow = Checkpoints(folder, 1, resume=True, on_notice=lambda _: None)
    torch.save(run(slow, on_step=lambda _: time.sleep(0.01))[0], result)


def test_killed_again_and_again_at_any_moment(folder, tmp_path):
    moments, killed, result = random.Random(), 0, tmp_path / "result"

    def last():
        return max((int(p.stem.removeprefix("step-")) for p in folder.glob("step-*")), default=0)

    while not result.exists():
        wanted, child = last() + moments.randint(1, 6), start(until_the_end, folder, result)
        while child.is_alive() and last() < wanted:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.03))
        child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        killed += child.exitcode != 0
    assert killed
    got, whole = torch.load(result), run()[0]
    assert all(torch.equal(got[m], whole[m]) for m in whole)


class Slow(io.FileIO):
    """Stops in the middle of the content, which comes after a short head."""

    def write(self, content):
        half = len(content) // 2
        super().write(content[:half])
        if len(content) > 100:
            kill_at_the_third()
        return half + super().write(content[half:])


left = [3]


def kill_at_the_third():
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def killed_at(moment, folder):
    replace = os.replace

    def replaced(*names):
        if moment == "before the rename":
            kill_at_the_third()
        replace(*names)
        if moment == "after the rename":
            kill_at_the_third()

    if moment == "half written":
        checkpoint.open = Slow
    else:
        os.replace = replaced
    run(Checkpoints(folder, 3))


@pytest.mark.parametrize("moment", ["half written", "before the rename", "after the rename"])
def test_killed_while_a_checkpoint_is_written(folder, moment):
    child = start(killed_at, moment, folder)
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
    names = sorted(p.name for p in folder.iterdir())
    if moment == "after the rename":
        assert names[-1] == "step-00000009.ckpt"
    else:
        assert names[0].startswith(".step-00000009.ckpt.") and names[-1] == "step-00000006.ckpt"
    notices = []
    same(run(Checkpoints(folder, 3, resume=True, on_notice=notices.append)), run())
    assert notices == [f"going on after step {9 if moment == 'after the rename' else 6}"]
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000018.ckpt", "step-00000020.ckpt"]


def test_a_full_disk_leaves_the_last_checkpoint_and_does_not_end_the_run(folder, monkeypatch):
    real, notices = os.fsync, []

    def full(descriptor):
        if checkpoint_count[0] >= 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    checkpoint_count = [0]

    def on_step(record):
        checkpoint_count[0] = record.step // 3 - 1 if record.step % 3 == 0 else checkpoint_count[0]

    whole = run()
    monkeypatch.setattr(checkpoint.os, "fsync", full)
    same(run(Checkpoints(folder, 3, on_notice=notices.append), on_step=on_step), whole)
    assert len(notices) == 5
    assert notices[0] == (
        f"no checkpoint of step 9 could be written to {folder}: No space left on device; the last one is of "
        "step 6. The run goes on"
    )
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000003.ckpt", "step-00000006.ckpt"]
    monkeypatch.undo()
    same(run(Checkpoints(folder, 3, resume=True, on_notice=print)), whole)


def test_a_share_that_is_lost_does_not_end_the_run(folder):
    notices = []

    def on_step(record):
        if record.step == 8:
            shutil.rmtree(folder)

    same(run(Checkpoints(folder, 3, on_notice=notices.append), on_step=on_step), run())
    assert len(notices) == 5 and "No such file or directory; the last one is of step 6" in notices[0]


def test_a_folder_that_cannot_be_written_to_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MergeError, match="checkpoints cannot be written to .*choose another folder"):
        run(Checkpoints(tmp_path / "file" / "inside"), on_step=lambda _: pytest.fail("a step was made"))


def test_an_error_in_the_first_step_leaves_no_folder(folder):
    interrupted(folder, 1)
    assert not folder.exists()


def test_what_has_ended_is_not_gone_on_with(folder):
    first = run(Checkpoints(folder, 7))
    again = Checkpoints(folder, 7, resume=True, on_notice=lambda _: None)
    same(run(again, on_step=lambda _: pytest.fail("a step was made")), first)


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_checkpoint_is_passed_over(folder, damage):
    interrupted(folder, 8)
    before, last = sorted(folder.iterdir())
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes({"cut": content[: len(content) // 2], "changed": content, "empty": b""}[damage])
    notices = []
    same(run(Checkpoints(folder, 3, resume=True, on_notice=notices.append)), run())
    assert "step-00000006.ckpt cannot be read" in notices[0] and notices[1] == "going on after step 3"


def test_nothing_but_damaged_checkpoints_is_an_error(folder):
    interrupted(folder, 8)
    for file in folder.iterdir():
        file.write_bytes(b"x")
    with pytest.raises(MergeError, match="none of the checkpoints in .* can be read"):
        run(Checkpoints(folder, 3, resume=True, on_notice=lambda _: None))


class TestAnotherRun:
    def refuse(self, folder, message, work):
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        with pytest.raises(MergeError, match=message):
            work(Checkpoints(folder, 3, resume=True, on_notice=lambda _: None))
        assert before == {p.name: p.read_bytes() for p in folder.iterdir()}

    def test_parameters_are_named_with_both_values(self, folder):
        interrupted(folder, 8)
        other = PARAMETERS.model_copy(update={"learning_rate": 0.1, "steps": 30})
        self.refuse(
            folder,
            r"one of another run: parameters.steps is 30 and was 20; parameters.learning_rate is 0.1 and was",
            lambda c: run(c, other),
        )

    def test_other_data(self, folder):
        interrupted(folder, 8)

        def work(checkpoints):
            model, adapters, data = job()
            data["two"][1]["x"][0, 0] += 1e-9
            optimise(model, adapters, data, PARAMETERS, checkpoints=checkpoints)

        self.refuse(folder, "another run: data of two is not the same", work)

    def test_other_initial_coefficients(self, folder):
        interrupted(folder, 8)
        init = {"one": 0.4, "two": 0.5}
        self.refuse(folder, "initial coefficients is not the same", lambda c: run(c, init=init))

    def test_facts_that_the_caller_gives(self, folder):
        with pytest.raises(Interrupted):
            run(Checkpoints(folder, 3).with_facts(adapters={"one": "sha256:1"}), stop_at=8)
        self.refuse(
            folder, "adapters.one is not the same", lambda c: run(c.with_facts(adapters={"one": "sha256:2"}))
        )

    def test_another_number_of_processes(self, folder):
        interrupted(folder, 8)

        class Two:
            size, rank = 2, 0

            guarded = nullcontext

            def gather(self, value):
                return [value, value]

            def check_same(self, facts):
                pass

        self.refuse(folder, "processes is 2 and was 1", lambda c: run(c, processes=Two()))

    def test_data_in_another_order(self, folder):
        interrupted(folder, 8, source="remembering")

        def work(checkpoints):
            model, adapters, data = job("remembering")
            data["one"].generator.manual_seed(6)
            optimise(model, adapters, data, PARAMETERS, checkpoints=checkpoints)

        self.refuse(folder, "task 'one': the data come in another order", work)

    def test_how_the_steps_are_computed_may_change_and_is_told(self, folder):
        interrupted(folder, 8)
        notices = []
        checkpoints = Checkpoints(folder, 3, resume=True, on_notice=notices.append)
        got = run(checkpoints, PARAMETERS.model_copy(update={"micro_batch": 2}))
        assert notices == [
            "going on after step 6; not bit by bit as before: parameters.micro_batch is 2 and was None"
        ]
        for module, value in run()[0].items():
            torch.testing.assert_close(got[0][module], value)

    def test_an_earlier_run_is_not_written_over(self, folder):
        interrupted(folder, 8)
        with pytest.raises(MergeError, match="earlier run, the last after step 6; resume"):
            run(Checkpoints(folder, 3))
        same(run(Checkpoints(folder, 3, restart=True)), run())

    def test_to_go_on_where_nothing_was_written_is_to_begin(self, folder):
        same(run(Checkpoints(folder, 3, resume=True)), run())


def test_clear_takes_away_its_own_files_only(folder):
    interrupted(folder, 8)
    (folder / ".step-00000009.ckpt.0123abcd").touch()
    (folder / "notes.txt").touch()
    Checkpoints(folder).clear()
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    Checkpoints(folder).clear()
    assert not folder.exists()


def test_a_stream_says_where_it_stands():
    source = Remembering([{"x": torch.full((1, 1), float(i))} for i in range(4)])
    stream = BatchStream("t", source, seed=0)
    stream.watch()
    for _ in range(6):
        stream.next()
    state = stream.state_dict()
    expected = [stream.next()["x"].item() for _ in range(9)]
    fresh = BatchStream("t", Remembering(source.batches), seed=0)
    fresh.watch()
    fresh.load_state_dict(state)
    assert [fresh.next()["x"].item() for _ in range(9)] == expected
