"""Many processes give what one gives; they start, fail and end together."""

import os
import pickle
import signal
import time

import pytest
import torch
from children import launch, results_of_two
from tiny import MLP_MODULES, Mlp, canonical_adapters, random_adapters, token_batch
from torch import nn

from nsc_fast.checkpoint import Checkpoints
from nsc_fast.driver import optimise
from nsc_fast.errors import MergeError
from nsc_fast.parameters import NSCParameters
from nsc_fast.processes import Processes, launched, share

RANKS = {"one": 2, "two": 4, "three": 3}
PARAMETERS = NSCParameters(steps=6, learning_rate=0.02)


class Text(nn.Module):
    """Token ids and a mask in; each token sees the mean of its sequence."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(60, 8)
        self.body = Mlp()

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mean = (x * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        return self.body(x + mean)


def job(tasks=3, text=True):
    """The same in every process."""
    torch.manual_seed(0)
    model = (Text() if text else Mlp()).double()
    modules = [f"body.{m}" for m in MLP_MODULES] if text else MLP_MODULES
    ranks = dict(list(RANKS.items())[:tasks])
    adapters = canonical_adapters(random_adapters(model, modules, ranks))
    if text:
        # Batches of unlike numbers of rows and lengths, with padding.
        data = {
            t: [token_batch(3 + k + i, 5 + 2 * k, seed=10 * k + i, padding=2) for i in range(2)]
            for k, t in enumerate(ranks)
        }
    else:
        data = {t: [{"x": torch.randn(2 + k, 8, dtype=torch.float64)}] for k, t in enumerate(ranks)}
    return model, adapters, data


class Half:
    """An objective whose batches cannot be divided: each process has whole tasks."""

    finished = False

    def __init__(self, model, installation):
        self.model, self.installation = model, installation

    def losses(self, batches):
        total, parts = 0.0, {}
        for task, batch in batches.items():
            loss = self.model(**batch).square().mean()
            loss.backward()
            parts[task] = float(loss)
            total += parts[task]
        return total, parts


def levels_of(case):
    return {"one": 2.0, "two": 0.0, "three": 0.0} if case == "levels" else None


CASES = {
    "three tasks": {},
    "one task": {"tasks": 1},
    "not text": {"text": False},
    "micro-batches": {"micro_batch": 1},
    "rank": {"granularity": "rank"},
    "one after another": {"batching": "never"},
    "levels": {},
    "another objective": {},
}


def result_of(case, processes=None, **options):
    changes = dict(CASES[case])
    made = job(**{key: changes.pop(key) for key in ("tasks", "text") if key in changes})
    parameters = NSCParameters(**{**PARAMETERS.model_dump(), **changes})
    options["objective"] = Half if case == "another objective" else None
    return optimise(*made, parameters, levels=levels_of(case), processes=processes, **options)


# What one of several processes does, by name.


def work_cases(folder):
    processes = launched(timeout=60)
    results = {case: result_of(case, processes) for case in CASES}
    (folder / f"result{processes.rank}").write_bytes(pickle.dumps(results))


def stopping_at(step, action):
    def on_step(record):
        if record.step == step:
            action()

    return on_step


def work_checkpoints(folder):
    """The second process fails in step 5."""
    processes = launched(timeout=60)

    def fail():
        raise ValueError("the disk of the user's own log is full")

    kept = Checkpoints(folder / "kept", 2)
    failing = stopping_at(5, fail if processes.rank == 1 else lambda: None)
    result_of("three tasks", processes, checkpoints=kept, on_step=failing)


def work_resumed(folder):
    """Both go on after step 4."""
    processes = launched(timeout=60)
    kept = Checkpoints(folder / "kept", 2, resume=True)
    resumed = result_of("three tasks", processes, checkpoints=kept)
    (folder / f"resumed{processes.rank}").write_bytes(pickle.dumps(resumed))


def work_differing(folder):
    """The second process has other data."""
    processes = launched(timeout=60)
    model, adapters, data = job()
    if processes.rank == 1:
        data["two"][0]["input_ids"][0, 0] += 1
    optimise(model, adapters, data, PARAMETERS, processes=processes)


class Drawn:
    """Batches in an order that torch's global generator draws."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter([self.batches[i] for i in torch.randperm(len(self.batches)).tolist()])


def work_other_order(folder):
    processes = launched(timeout=60)
    model, adapters, data = job()
    batches = [token_batch(2, 5, seed=i) for i in range(40)]
    torch.manual_seed(processes.rank)
    optimise(model, adapters, {**data, "two": Drawn(batches)}, PARAMETERS, processes=processes)


def work_killed(folder):
    """The second process is killed in a step, as one without memory is."""
    processes = launched(timeout=60)
    kill = stopping_at(2, lambda: os.kill(os.getpid(), signal.SIGKILL))
    result_of("three tasks", processes, on_step=kill if processes.rank == 1 else None)


def work_stuck(folder):
    """The second process does not come back."""
    processes = launched(timeout=3)
    stop = stopping_at(2, lambda: time.sleep(6))
    result_of("three tasks", processes, on_step=stop if processes.rank == 1 else None)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Every case in two processes, as both of them saw it."""
    return results_of_two(work_cases, tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_what_one_gives(pairs, case):
    (first, history, _), (second, other, _) = (one[case] for one in pairs)
    assert history == other
    assert all(torch.equal(first[m], second[m]) for m in first)
    alone, expected, _ = result_of(case)
    assert any((value != 0.4).all() for value in alone.values())
    for module, value in alone.items():
        torch.testing.assert_close(first[module], value, rtol=1e-6, atol=1e-6)
    assert [r.loss for r in history] == pytest.approx([r.loss for r in expected], rel=1e-9)
    for got, want in zip(history, expected, strict=True):
        assert got.ratios == pytest.approx(want.ratios, rel=1e-9)


def test_the_first_process_keeps_checkpoints_for_all(tmp_path, pairs):
    codes, errors = launch(work_checkpoints, tmp_path)
    assert codes == [1, 1]
    assert errors[1] == "ValueError: the disk of the user's own log is full"
    assert errors[0] == f"ProcessError: process 1 failed: {errors[1].removeprefix('ValueError: ')}"
    codes, errors = launch(work_resumed, tmp_path)
    assert codes == [0, 0], errors
    for rank in range(2):
        got, whole = pickle.loads((tmp_path / f"resumed{rank}").read_bytes()), pairs[0]["three tasks"]
        assert got[1] == whole[1] and all(torch.equal(got[0][m], whole[0][m]) for m in whole[0])
    with pytest.raises(MergeError, match="another run: processes is 1 and was 2"):
        result_of("three tasks", checkpoints=Checkpoints(tmp_path / "kept", 2, resume=True))


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (work_differing, "process 1 has other inputs than process 0: data of two is not the same"),
        (work_other_order, "task 'two': processes 0 and 1 read different batches; give a list"),
        (work_killed, "process 0 of 2 lost the others: one has ended or does not answer"),
        (work_stuck, "process 0 of 2 lost the others: one has ended or does not answer"),
    ],
)
def test_the_failure_of_one_ends_all(tmp_path, work, told):
    codes, errors = launch(work, tmp_path)
    assert all(codes) and told in errors[0]


class TestLaunched:
    def test_alone(self, monkeypatch):
        for name in ("WORLD_SIZE", "RANK"):
            monkeypatch.delenv(name, raising=False)
        assert launched() is None
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert launched() is None

    def test_processes_that_know_nothing_of_each_other(self, monkeypatch):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
        with pytest.raises(MergeError, match="OMPI_COMM_WORLD_SIZE tells of several processes"):
            launched()
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.delenv("RANK", raising=False)
        with pytest.raises(MergeError, match="WORLD_SIZE is 4, but RANK is not set"):
            launched()

    def test_one_process_where_accelerate_was_asked_for_several(self, monkeypatch):
        """With --cpu it sets the address of the first process, and starts no other one."""
        for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        assert launched() is None
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        with pytest.raises(MergeError, match="started this one alone.*accelerate launch --multi_gpu"):
            launched()

    def test_a_process_without_a_device_of_its_own(self, monkeypatch):
        processes = object.__new__(Processes)
        processes.local_rank = 2
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(MergeError, match="has no cuda device of its own"):
            processes.device("cuda")
        assert processes.device("cpu") == "cpu"


class TestShare:
    def batches(self, *shapes):
        return {str(k): token_batch(*shape, seed=k) for k, shape in enumerate(shapes)}

    @pytest.mark.parametrize("size", [1, 2, 3, 5])
    @pytest.mark.parametrize("shapes", [[(4, 6)], [(1, 3), (5, 9), (2, 2)], [(1, 4)], [(7, 1), (7, 30)]])
    def test_every_sequence_is_in_exactly_one_part(self, size, shapes):
        batches = self.batches(*shapes)
        parts = [share(batches, rank, size) for rank in range(size)]
        for task, batch in batches.items():
            rows = [mine[task]["input_ids"] for mine, _ in parts if task in mine]
            assert torch.equal(torch.cat(rows), batch["input_ids"])
        for mine, wholes in parts:
            for task in mine:
                assert wholes[task] == (
                    batches[task]["attention_mask"].sum(),
                    len(batches[task]["input_ids"]),
                    0,
                )

    def test_parts_are_of_about_the_same_size(self):
        batches = self.batches((8, 10), (8, 20), (8, 40))
        tokens = [
            sum(b["input_ids"].numel() for b in share(batches, rank, 4)[0].values()) for rank in range(4)
        ]
        assert sum(tokens) == 560 and max(tokens) - min(tokens) <= 40
        assert [len(share(batches, rank, 4)[0]) for rank in range(4)] == [2, 2, 1, 1]

    def test_what_cannot_be_divided_goes_to_one(self):
        batches = self.batches((4, 6), (4, 6))
        batches["0"]["pixel_values"] = torch.zeros(3, 5)
        for divide in (True, False):
            parts = [share(batches, rank, 2, divide=divide) for rank in range(2)]
            if not divide:
                assert [list(mine) for mine, _ in parts] == [["0"], ["1"]]
            assert all(wholes is None for _, wholes in parts)
            assert parts[0][0]["0"] is batches["0"] and parts[1][0]["1"] is batches["1"]
