"""The closed form against dense least squares on the activations themselves."""

from functools import partial

import pytest
import torch
from compare import error
from tiny import canonical_adapters, linear_names, random_adapters, tiny_bert, token_batch

from nsc_fast.errors import MergeError
from nsc_fast.methods import MergeInputs, closed_form
from nsc_fast.objectives.least_squares import coefficients, core, second_moments
from nsc_fast.objectives.running import adapted, evaluating, watched

RANKS = {"one": 2, "two": 3, "three": 2}
NONE = dict.fromkeys(RANKS, 0.0)


@pytest.fixture(scope="module")
def job():
    model = tiny_bert()
    modules = [n for n in linear_names(model, ("query", "value", "dense")) if ".layer." in n]
    own = {"one": modules, "two": modules[1:], "three": modules}
    updates = canonical_adapters(random_adapters(model, own, RANKS))
    batches = {
        t: [token_batch(3, 6 + k, seed=10 * k + i, padding=2) for i in range(3)] for k, t in enumerate(RANKS)
    }
    return model, updates, batches


def inputs_seen(model, updates, batches, module):
    """Task -> activations ``(N, d_in)`` under its own adapter, without padding."""
    out = {}
    for task, own in updates.items():
        if module not in own:
            continue
        seen: list[torch.Tensor] = []
        see = partial(lambda kept, module, z, y: kept.append(z), seen)
        with evaluating(model), adapted(model, own), watched(model, [module], see):
            for batch in batches[task]:
                model(**batch)
        keep = [b["attention_mask"].bool() for b in batches[task]]
        out[task] = torch.cat([z[k] for z, k in zip(seen, keep, strict=True)])
    return out


def test_the_moments_are_those_of_the_activations(job):
    model, updates, batches = job
    moments = second_moments(model, updates, batches)
    assert set(moments.values) == {m for own in updates.values() for m in own}
    for module in list(moments.values)[::5]:
        for task, z in inputs_seen(model, updates, batches, module).items():
            p = z @ moments.stacks[module].basis.T
            assert error(moments.values[module][task], p.T @ p / len(p)) < 1e-10
            expected = (z @ updates[task][module].dense().T).square().sum(1).mean()
            assert moments.energy(module, task) == pytest.approx(float(expected), rel=1e-10)


def test_one_forward_pass_a_batch(job):
    model, updates, batches = job
    calls = []
    handle = model.bert.register_forward_hook(lambda *_: calls.append(1))
    second_moments(model, updates, batches)
    handle.remove()
    assert len(calls) == sum(len(own) for own in batches.values())


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_the_core_is_the_dense_least_squares_solution(job, ridge):
    """Gradient of the dense objective in all d_out x R directions of the span is zero at ``C X Q``."""
    model, updates, batches = job
    moments = second_moments(model, updates, batches)
    module = list(moments.values)[2]
    stacked = moments.stacks[module]
    toward = {"one": 0.4, "two": 0.1, "three": 0.7}
    x = core(moments, module, ridge=ridge, toward=toward).requires_grad_()
    weights, total = [], 0.0
    for task, z in inputs_seen(model, updates, batches, module).items():
        wished = z @ updates[task][module].dense().T
        got = z @ stacked.basis.T @ x.T @ stacked.columns.T
        weight = 1 / wished.square().sum(1).mean()
        total = total + weight * (got - wished).square().sum(1).mean()
        weights.append((weight, (z @ stacked.basis.T).square().mean(0).mean()))
    (gradient,) = torch.autograd.grad(total, x)
    if ridge:
        # The ridge is measured in the metric of C, as the objective is.
        rho = ridge * float(sum(w * p for w, p in weights))
        start = torch.diag(
            stacked.expand(torch.tensor([toward[t] for t in stacked.tasks], dtype=torch.float64))
        )
        gradient = gradient + 2 * rho * stacked.columns.T @ stacked.columns @ (x.detach() - start)
    scale = (stacked.columns.T @ stacked.columns).norm() * sum(float(w * p) for w, p in weights)
    assert gradient.norm() < 1e-9 * scale


def test_a_single_adapter_comes_out_as_it_is(job):
    model, updates, batches = job
    single = {"two": updates["two"]}
    result = run(model, single, {"two": batches["two"]}, ridge=0.0)
    for module, update in updates["two"].items():
        assert error(result.updates[module].dense(), update.dense()) < 1e-6


@pytest.mark.parametrize("granularity", ["module", "layer", "task"])
def test_coefficients_solve_the_small_system(job, granularity):
    model, updates, batches = job
    moments = second_moments(model, updates, batches)
    modules = list(moments.values)[1:4]
    found = coefficients(moments, modules, ridge=0.0, toward=NONE)
    values = {t: torch.tensor(v, dtype=torch.float64, requires_grad=True) for t, v in found.items()}
    total = 0.0
    for module in modules:
        for task, z in inputs_seen(model, updates, batches, module).items():
            wished = z @ updates[task][module].dense().T
            got = sum(values[t] * (z @ own[module].dense().T) for t, own in updates.items() if module in own)
            total = total + (got - wished).square().sum() / wished.square().sum()
    gradients = torch.autograd.grad(total, list(values.values()))
    assert max(abs(float(g)) for g in gradients) < 1e-9 * float(total.detach())
    result = run(model, updates, batches, granularity=granularity, ridge=0.0)
    groups = {tuple(c.tolist()) for m, c in result.coefficients.items() if len(c) == 3}
    blocks = 1 if granularity == "task" else 4
    assert len(groups) == blocks if granularity != "module" else len(groups) > blocks


def run(model, updates, batches, **parameters):
    inputs = MergeInputs(updates=updates, model=model, data=batches)
    return closed_form.METHOD.run(inputs, closed_form.Parameters(**parameters))


def test_scale_and_ridge(job):
    model, updates, batches = job
    once, twice = run(model, updates, batches), run(model, updates, batches, scale=2.0)
    for module in once.updates:
        assert error(twice.updates[module].dense(), 2 * once.updates[module].dense()) < 1e-10
    far = run(model, updates, batches, ridge=1e9, toward=0.4)
    for module in list(far.updates)[::4]:
        arithmetic = sum(0.4 * own[module].dense() for own in updates.values() if module in own)
        assert error(far.updates[module].dense(), arithmetic) < 1e-6


def test_two_runs_give_the_same_bits_and_the_model_is_unchanged(job):
    model, updates, batches = job
    before = {n: p.clone() for n, p in model.named_parameters()}
    a, b = run(model, updates, batches), run(model, updates, batches)
    assert all(torch.equal(a.updates[m].columns, b.updates[m].columns) for m in a.updates)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())


class TestBadInput:
    def test_no_data(self, job):
        model, updates, batches = job
        with pytest.raises(MergeError, match="'two' has no unlabeled data"):
            run(model, updates, {"one": batches["one"], "three": batches["three"]})

    def test_empty_data(self, job):
        model, updates, batches = job
        with pytest.raises(MergeError, match="'two': the data holds no batch"):
            run(model, updates, {**batches, "two": []})

    def test_not_finite(self, job):
        model, updates, batches = job
        embedding = model.get_input_embeddings().weight
        kept = embedding.data.clone()
        embedding.data[batches["two"][0]["input_ids"][0, 0]] = float("nan")
        try:
            with pytest.raises(MergeError, match="activations of task '.*' at 'bert.* are not finite"):
                run(model, updates, batches)
        finally:
            embedding.data.copy_(kept)
