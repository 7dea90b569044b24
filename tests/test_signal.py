"""The signal against the definition of the ratio, and what the user is told."""

from dataclasses import replace

import pytest
import torch
from tiny import canonical_adapters, linear_names, random_adapters, tiny_bert, token_batch

from nsc_fast.driver import Driver, optimise
from nsc_fast.errors import MergeError
from nsc_fast.factors import LowRankUpdate
from nsc_fast.layers import install, remove
from nsc_fast.methods import MergeInputs, nsc
from nsc_fast.objectives.running import adapted, evaluating, sample, watched
from nsc_fast.parameters import NSCParameters
from nsc_fast.signal import Signal, SignalProbe

RANKS = {"one": 2, "two": 3}
KINDS = ("random", "base", "alone", "initial", "final")


class Job:
    def __init__(self, dtype=torch.float64):
        self.model = tiny_bert(dtype)
        names = [n for n in linear_names(self.model, ("query", "value", "dense")) if ".layer." in n]
        self.updates = canonical_adapters(
            random_adapters(self.model, {"one": names, "two": names[:-1]}, RANKS)
        )
        self.targets = [n for n in names if ".layer.3." in n]
        self.data = {
            t: [token_batch(2, 6, seed=10 * k + i, padding=2) for i in range(3)] for k, t in enumerate(RANKS)
        }
        self.start = {
            m: LowRankUpdate(0.4 * u.columns, u.basis, 0.4 * u.singular_values)
            for m, u in self.updates["one"].items()
        }

    def mean(self, task, adapter, updates):
        """Mean ratio and mean share of ``task``'s rows over the targets, by the formula."""
        ratios, shares = [], []
        for module in self.targets:
            if module not in self.updates[adapter]:
                continue
            found = []
            with (
                evaluating(self.model),
                adapted(self.model, updates),
                watched(self.model, [module], lambda m, z, y, found=found: found.append(z)),
            ):
                for batch in self.data[task]:
                    self.model(**batch)
            masks = [b["attention_mask"].bool() for b in self.data[task]]
            z = torch.cat([one[mask] for one, mask in zip(found, masks, strict=True)])
            basis = self.updates[adapter][module].basis
            u = (z @ basis.T).square().sum(1) / z.square().sum(1)
            ratios.append(float((1 - u).sqrt().mean()))
            shares.append(float(u.mean()))
        return sum(ratios) / len(ratios), sum(shares) / len(shares)


def test_every_ratio_is_the_mean_of_the_definition():
    job = Job()
    probe = SignalProbe(job.model, job.updates, job.targets, job.data)
    signal = probe.after(probe.before(job.start), job.updates["two"])
    for task in RANKS:
        assert signal.base[task] == pytest.approx(job.mean(task, task, {})[0], rel=1e-10)
        assert signal.alone[task] == pytest.approx(job.mean(task, task, job.updates[task])[0], rel=1e-10)
        assert signal.initial[task] == pytest.approx(job.mean(task, task, job.start)[0], rel=1e-10)
        assert signal.final[task] == pytest.approx(job.mean(task, task, job.updates["two"])[0], rel=1e-10)
        for other in RANKS:
            expected = job.mean(task, other, job.updates[task])[1]
            assert signal.sees[task][other] == pytest.approx(expected, rel=1e-10)
        widths = [job.updates[task][m].shape[1] for m in job.targets if m in job.updates[task]]
        chance = sum((1 - RANKS[task] / d) ** 0.5 for d in widths) / len(widths)
        assert signal.random[task] == pytest.approx(chance)
        expected = (1 - signal.alone[task] ** 2) / (1 - signal.random[task] ** 2)
        assert signal.strength[task] == pytest.approx(expected)
        assert signal.tokens[task] == 3 * (2 * 6 - 2)


def test_the_dict_has_the_reports_shape():
    job = Job()
    probe = SignalProbe(job.model, job.updates, job.targets, job.data)
    content = probe.after(probe.before(job.start), job.start).to_dict()
    assert set(content) == {*KINDS, "strength", "modules", "sees", "tokens"}
    assert all(set(content[kind]) == set(RANKS) for kind in KINDS)
    assert set(content["modules"]) == set(job.targets)
    for module, own in content["modules"].items():
        assert set(own) == {t for t in RANKS if module in job.updates[t]}
        assert all(set(kinds) == set(KINDS) for kinds in own.values())


def make(**values):
    kinds = {kind: {"one": 0.99} for kind in ("random", "base", "alone", "initial")}
    kinds |= {kind: {"one": value} for kind, value in values.items()}
    return Signal(**kinds, modules={}, sees={}, tokens={"one": 1})


def test_notices_name_the_task():
    (weak,) = make(alone=0.988).notices()
    assert "'one'" in weak and "strength 1.20" in weak
    assert make(alone=0.9).notices() == ()
    (low,) = make(alone=0.9, final=0.8).notices()
    assert "'one' (0.800, alone 0.900)" in low and "stop_at_alone" in low
    assert make(alone=0.9, final=0.9).notices() == ()
    (unseen,) = replace(make(alone=0.9), tokens={"one": 1, "two": 5}).notices()
    assert "runs on the rows of task 'two'" in unseen


def run(job, data=None, **parameters):
    inputs = MergeInputs(updates=job.updates, model=job.model, data=data or job.data)
    return nsc.METHOD.run(inputs, NSCParameters(**{"steps": 12, "learning_rate": 0.02, **parameters}))


class Loader:
    """Batches in a new order each round, as a DataLoader that shuffles."""

    def __init__(self, batches):
        self.batches, self.rounds = batches, 0

    def __iter__(self):
        self.rounds += 1
        order = torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(self.rounds))
        return iter([self.batches[i] for i in order])


class TestNsc:
    @pytest.mark.parametrize("kind", ["list", "loader", "iterator"])
    def test_the_measurement_changes_no_bit_of_the_coefficients(self, kind):
        def data(job):
            if kind == "list":
                return job.data
            if kind == "loader":
                return {t: Loader(own) for t, own in job.data.items()}
            return {t: iter(own) for t, own in job.data.items()}

        job = Job(torch.float32)
        parameters = NSCParameters(steps=12, learning_rate=0.02)
        plain, history, _ = optimise(job.model, job.updates, data(job), parameters)
        result = run(job, data(job), signal_rows=2)
        assert all(torch.equal(plain[m], result.coefficients[m]) for m in plain)
        assert list(result.history) == history
        assert result.signal is not None and run(job, signal_rows=0).signal is None

    def test_the_signal_tells_first_and_last_ratios(self):
        job = Job()
        job.data = {t: own[:1] for t, own in job.data.items()}
        result = run(job)
        assert result.signal["initial"] == pytest.approx(result.history[0].ratios, rel=1e-9)
        assert result.signal["final"] != result.signal["initial"]

    @pytest.mark.parametrize("together", ["always", "never"])
    def test_a_task_at_its_own_level_gets_no_gradient_from_the_next_step_on(self, together):
        job = Job()
        batches = {t: own[0] for t, own in job.data.items()}

        def gradients(levels, preferences=None):
            installation = install(
                job.model,
                job.updates,
                targets=job.targets,
                preferences=preferences,
            )
            try:
                driver = Driver(job.model, installation, together, levels)
                found = []
                for _ in range(2):
                    installation.coefficients.zero_grad()
                    loss, ratios = driver.losses(batches)
                    found.append([p.grad.clone() for p in installation.coefficients.parameters()])
                return found, loss, ratios
            finally:
                remove(job.model)

        free, loss, ratios = gradients({})
        stopped, same_loss, same_ratios = gradients({"one": 2.0, "two": 0.0})
        only, _, _ = gradients({}, {"one": 0.0, "two": 1.0})
        assert same_loss == pytest.approx(loss) and same_ratios == pytest.approx(ratios)
        for step, expected in ((0, free[0]), (1, [g / 2 for g in only[1]])):
            for got, wanted in zip(stopped[step], expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-15)

    @pytest.mark.parametrize("batching", ["always", "never"])
    def test_nothing_is_left_when_all_tasks_stop(self, batching):
        job = Job()
        parameters = NSCParameters(steps=9, batching=batching)
        _, history, interrupted = optimise(
            job.model, job.updates, job.data, parameters, levels=dict.fromkeys(RANKS, 2.0)
        )
        assert len(history) == 1 and not interrupted

    def test_stop_at_alone_takes_the_levels_of_the_adapters_alone(self, monkeypatch):
        job, seen = Job(), {}

        def recorded(*args, levels, **kwargs):
            seen.update(levels)
            return optimise(*args, levels=levels, **kwargs)

        monkeypatch.setattr(nsc, "optimise", recorded)
        result = run(job, steps=2, stop_at_alone=True)
        assert seen == result.signal["alone"]

    def test_stopping_needs_the_measurement(self):
        with pytest.raises(ValueError, match="signal_rows above 0"):
            NSCParameters(stop_at_alone=True, signal_rows=0)


class TestSample:
    def test_a_list_is_sampled_evenly_and_left_alone(self):
        batches = [token_batch(2, 4, seed=i) for i in range(8)]
        chosen, rest = sample("a", batches, 4)
        assert rest is batches and len(chosen) == 2
        assert torch.equal(chosen[1]["input_ids"], batches[4]["input_ids"])

    def test_a_loader_gives_its_first_round_once(self):
        loader = Loader([token_batch(2, 4, seed=i) for i in range(5)])
        expected = [[b["input_ids"] for b in loader] for _ in range(2)]
        loader.rounds = 0
        chosen, rest = sample("a", loader, 3)
        assert len(chosen) == 2
        for round_ in expected:
            got = [b["input_ids"] for b in rest]
            assert all(torch.equal(a, b) for a, b in zip(got, round_, strict=True))

    @pytest.mark.parametrize("source", [[], iter(()), Loader([])], ids=["list", "iterator", "loader"])
    def test_empty(self, source):
        with pytest.raises(MergeError, match="task 'a': the data holds no batch"):
            sample("a", source, 4)

    def test_fully_masked(self):
        batch = token_batch(1, 3, seed=0)
        batch["attention_mask"].zero_()
        with pytest.raises(MergeError, match="task 'a': a batch is fully masked"):
            sample("a", [batch], 4)

    def test_labels_are_dropped(self):
        chosen, _ = sample("a", [{**token_batch(2, 4, seed=0), "labels": torch.ones(2)}], 4)
        assert "labels" not in chosen[0]
