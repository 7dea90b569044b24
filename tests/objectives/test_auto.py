"""The choice among merges: by the score alone, on rows that nothing was fitted to, the same every time."""

import pytest
import torch
from compare import error
from pydantic import ValidationError
from tiny import canonical_adapters, linear_names, random_adapters, tiny_bert, token_batch

from nsc_fast import methods
from nsc_fast.errors import MergeError
from nsc_fast.methods import MergeInputs, auto
from nsc_fast.objectives.anchors import anchors
from nsc_fast.objectives.score import Score, held_out, score

RANKS = {"one": 2, "two": 3}
QUICK = {
    "data_free": ("iso_c",),
    "scales": (0.2, 0.5, 0.9),
    "closed_form_scales": (1.0,),
    "anchored_steps": 30,
    "anchored_rate": 0.03,
    "margin": 10.0,
}


class Job:
    def __init__(self, dtype=torch.float64):
        self.model = tiny_bert(dtype, blocks=2)
        names = [n for n in linear_names(self.model, ("query", "value", "dense")) if ".layer." in n]
        self.updates = canonical_adapters(random_adapters(self.model, names, RANKS))
        self.data = {t: [token_batch(2, 6, seed=10 * k + i) for i in range(8)] for k, t in enumerate(RANKS)}

    def inputs(self, **more):
        return MergeInputs(updates=self.updates, model=self.model, data=self.data, **more)

    def run(self, **parameters):
        return auto.METHOD.run(self.inputs(), auto.Parameters(**{**QUICK, **parameters}))


def test_the_candidate_with_the_best_score_is_returned():
    job = Job()
    result = job.run()
    _, kept = held_out(job.data)
    fixed = anchors(job.model, job.updates, kept)
    found = score(job.model, result.updates, fixed)
    for scale in QUICK["scales"]:
        one = methods.get("task_arithmetic")
        other = one.run(job.inputs(), one.parameters(scaling=scale))
        assert found.value <= score(job.model, other.updates, fixed).value + 1e-12
    (notice,) = result.notices
    chosen = notice.split(" among ")[0].removeprefix("auto chose ")
    assert f"{chosen}: {found.value:.3f} (mean {found.mean:.3f}" in notice
    assert notice.count("\n") == 7 and "one 4, two 4" in notice
    # 8 rows judged by 6 merges, by base and adapter; 24 rows fitted with moments, with two kinds of states,
    # and with two that show the directions on the way.
    assert f"cost: {8 * 8 + 5 * 24} rows forward, and 30 optimisation steps" in notice
    assert result.method == "auto" and result.tasks == tuple(RANKS)


def test_in_small_parts_and_computed_again_it_is_the_same_merge():
    less, all_at_once = Job().run(micro_batch=1, checkpointing="always", batching="never"), Job().run()
    assert less.notices == all_at_once.notices
    for module, update in all_at_once.updates.items():
        assert error(less.updates[module].dense(), update.dense()) < 1e-6


def test_without_fitting_the_best_scale_wins():
    job = Job()
    result = job.run(data_free=(), closed_form_scales=(), anchored_steps=0)
    _, kept = held_out(job.data)
    fixed = anchors(job.model, job.updates, kept)
    arithmetic = methods.get("task_arithmetic")
    values = {
        s: score(
            job.model, arithmetic.run(job.inputs(), arithmetic.parameters(scaling=s)).updates, fixed
        ).value
        for s in QUICK["scales"]
    }
    best = min(values, key=values.get)
    assert result.notices[0].startswith(f"auto chose task_arithmetic {best:g} among 3 merges")
    expected = arithmetic.run(job.inputs(), arithmetic.parameters(scaling=best))
    assert all(torch.equal(result.updates[m].columns, u.columns) for m, u in expected.updates.items())


def test_a_fitted_merge_that_is_not_clearly_nearer_is_not_chosen():
    (notice,) = Job().run(margin=0.0).notices
    assert notice.startswith(("auto chose task_arithmetic", "auto chose iso_c"))
    assert notice.count("not chosen: fitted, and above 0.000") == 2


def test_two_runs_give_the_same_bits():
    a, b = Job(torch.float32).run(), Job(torch.float32).run()
    assert a.notices == b.notices
    assert all(torch.equal(a.updates[m].columns, b.updates[m].columns) for m in a.updates)


def test_the_order_of_the_tasks_does_not_decide():
    job = Job()
    first = job.run()
    job.updates = dict(reversed(job.updates.items()))
    again = job.run()
    assert first.notices[0].split(" among ")[0] == again.notices[0].split(" among ")[0]


class TestHeldOut:
    def test_every_fourth_batch_and_no_row_twice(self):
        batches = [{"x": torch.arange(2 * i, 2 * i + 2)} for i in range(9)]
        fitted, kept = held_out({"a": batches})
        assert [b["x"].tolist() for b in kept["a"]] == [[6, 7], [14, 15]]
        seen = [v for b in (*fitted["a"], *kept["a"]) for v in b["x"].tolist()]
        assert sorted(seen) == list(range(18))

    @pytest.mark.parametrize("rows", [2, 3, 5, 8])
    def test_one_batch_is_divided(self, rows):
        fitted, kept = held_out({"a": [{"x": torch.arange(rows)}]})
        seen = [v for b in (*fitted["a"], *kept["a"]) for v in b["x"].tolist()]
        assert sorted(seen) == list(range(rows)) and fitted["a"] and kept["a"]

    def test_one_row_is_too_few(self):
        job = Job()
        job.data["two"] = [token_batch(1, 5, seed=0)]
        with pytest.raises(MergeError, match="task 'two' has one unlabeled row only"):
            job.run()


def test_the_value_is_half_mean_half_worst():
    assert Score({"a": 0.2, "b": 0.6}).value == pytest.approx((0.4 + 0.6) / 2)


class TestBadInput:
    def test_no_data_and_empty_data(self):
        job = Job()
        job.data.pop("two")
        with pytest.raises(MergeError, match="'two' has no unlabeled data"):
            job.run()
        job.data["two"] = []
        with pytest.raises(MergeError, match="'two': the data holds no batch"):
            job.run()

    def test_weights(self):
        job = Job()
        with pytest.raises(MergeError, match="finds the coefficients itself: leave the weights out"):
            auto.METHOD.run(job.inputs(weights={"one": 0.3}), auto.Parameters())

    @pytest.mark.parametrize("name", ["nsc", "reversible"])
    def test_candidates_must_give_one_merge_without_data(self, name):
        with pytest.raises(ValidationError, match=f"'{name}' is no method that gives one merge without data"):
            auto.Parameters(data_free=(name,))
