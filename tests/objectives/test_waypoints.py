"""Distances on the way against their formula and plain autograd with merged weights."""

from functools import partial

import pytest
import torch
from compare import error
from test_anchored import MODELS, RANKS, Job, check_gradients_of_the_cores
from tiny import canonical_adapters, linear_names, random_adapters, tiny_llama

from nsc_fast.errors import MergeError
from nsc_fast.objectives.anchors import anchors
from nsc_fast.objectives.states import leaving
from nsc_fast.objectives.waypoints import DIRECTIONS, Passing, directions


def leaves(job, deltas, batch, names):
    """Block -> ``(B, S, d)`` with full weights."""
    seen = {}
    handles = [
        job.model.get_submodule(n).register_forward_hook(
            lambda _, a, out, n=n: seen.update({n: leaving(out)})
        )
        for n in names
    ]
    try:
        job.states(deltas, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def way(job, fixed, merged, batches):
    """Half of the last states' distance and half of the way's, in the mean over the tasks."""
    total = job.eager(merged, batches) / 2
    for task, batch in batches.items():
        own = {m: u.dense() for m, u in job.updates[task].items()}
        found = fixed[task].directions
        keep = batch["attention_mask"].bool()
        there, here = leaves(job, own, batch, found), leaves(job, merged, batch, found)
        terms = [
            ((here[n] - there[n])[keep] @ f.double()).square().sum() / keep.sum() for n, f in found.items()
        ]
        total = total + sum(terms) / len(terms) / 2 / len(batches)
    return total


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_of_the_cores_are_those_of_merged_weights(kind):
    job = Job(kind)
    fixed = anchors(job.model, job.updates, job.data, waypoints=True)
    assert all(own.directions for own in fixed.values())
    check_gradients_of_the_cores(job, fixed, partial(way, job, fixed), loss_within=1e-6, within=1e-5)


def test_directions_are_those_of_the_shifts_and_a_floor():
    """With as few features as directions ``F F^T`` is the metric, its floor in the mean over the draws."""
    torch.manual_seed(3)
    d, count = 24, 500
    shift = torch.randn(count, d) * torch.logspace(0, -3, d)
    state = torch.get_rng_state()
    f = directions({"b": shift})["b"].double()
    assert torch.equal(torch.get_rng_state(), state)
    assert f.shape == (d, 2 * d) and f.shape[1] <= DIRECTIONS
    assert float((shift.double() @ f).square().sum()) / count == pytest.approx(1.0, rel=1e-5)
    second = (shift.T @ shift).double() / count
    values, vectors = torch.linalg.eigh(second)
    root = vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
    main = f[:, :d] @ f[:, :d].T
    assert error(main / main.trace(), root / root.trace()) < 1e-4
    floor = f[:, d:] @ f[:, d:].T
    assert float(floor.trace() / main.trace()) == pytest.approx(0.1, rel=0.2)


def test_what_does_not_move_has_no_directions():
    moved = {"still": torch.zeros(4, 3), "broken": torch.full((4, 3), torch.nan), "moved": torch.ones(4, 3)}
    assert list(directions(moved)) == ["moved"]


def test_an_adapter_is_at_distance_zero_and_the_base_model_at_one():
    job = Job(dtype=torch.float32)
    fixed = anchors(job.model, job.updates, job.data, waypoints=True)
    for task, own in job.updates.items():
        for deltas, expected in (({}, 1.0), ({m: u.dense() for m, u in own.items()}, 0.0)):
            total = tokens = 0.0
            for anchor, batch in zip(fixed[task].batches, job.data[task], strict=True):
                seen = leaves(job, {m: x.float() for m, x in deltas.items()}, batch, fixed[task].directions)
                count = anchor.counts[0]
                total += count * sum(
                    float(fixed[task].way(anchor, n, anchor.tokens(h))) for n, h in seen.items()
                )
                tokens += count
            assert total / tokens == pytest.approx(expected, abs=1e-5)


def test_only_blocks_that_an_adapter_moves_below_the_last():
    """The adapter begins at block 1 of three: block 0 stays as it is, and block 2 is the last."""
    model = tiny_llama(blocks=3)
    names = [n for n in linear_names(model, ("q_proj", "v_proj")) if ".0." not in n]
    updates = canonical_adapters(random_adapters(model, dict.fromkeys(RANKS, names), RANKS))
    fixed = anchors(model, updates, Job("llama").data, waypoints=True)
    assert [list(own.directions) for own in fixed.values()] == [["model.layers.1"]] * 2


def test_without_waypoints_there_are_none():
    fixed = anchors(Job().model, Job().updates, Job().data)
    assert all(not own.directions and not own.sampled for own in fixed.values())
    assert all(not anchor.way for own in fixed.values() for anchor in own.batches)


def test_blocks_that_run_twice_or_have_other_tokens_are_left_out():
    last, passing = torch.zeros(2, 5, 8), Passing()
    passing.see("vision.0", None, torch.zeros(2, 5, 8))
    for name in ("h.0", "h.1", "h.2", "h.1", "h.3", "h.4"):
        tokens = 3 if name == "h.3" else 5
        passing.see(name, None, (torch.zeros(2, tokens, 8), "cache"))
    assert list(passing.below(last)) == ["h.0", "h.2"]
    assert Passing().below(last) == {}


class Sometimes(torch.nn.Module):
    """Its block sees half of the tokens where a batch has more than four."""

    def __init__(self):
        super().__init__()
        self.h = torch.nn.ModuleList(torch.nn.Linear(8, 8, bias=False) for _ in range(2))

    def forward(self, x):
        short = self.h[0](x[:, :2] if x.shape[1] > 4 else x)
        return self.h[1](short.mean(1, keepdim=True) + x)


def test_a_block_whose_tokens_fit_in_some_batches_only():
    torch.manual_seed(0)
    model = Sometimes().double()
    updates = canonical_adapters(random_adapters(model, {"one": ["h.0", "h.1"]}, {"one": 2}))
    data = {"one": [{"x": torch.randn(600, n, 8, dtype=torch.float64)} for n in (4, 6)]}
    assert anchors(model, updates, {"one": data["one"][:1]}, waypoints=True)["one"].directions
    with pytest.raises(MergeError, match="task 'one': block 'h.0' .* set waypoints"):
        anchors(model, updates, data, waypoints=True)
