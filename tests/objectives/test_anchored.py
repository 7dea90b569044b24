"""Distance, gradients and the run of anchored merging against plain autograd with merged weights."""

from dataclasses import replace

import pytest
import torch
from compare import error
from pydantic import ValidationError
from tiny import (
    MLP_MODULES,
    Mlp,
    canonical_adapters,
    linear_names,
    random_adapters,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    token_batch,
)
from torch.func import functional_call

from nsc_fast import loop
from nsc_fast.checkpoint import Checkpoints
from nsc_fast.errors import MergeError
from nsc_fast.layers import MergedLinear, install, remove
from nsc_fast.methods import MergeInputs, anchored
from nsc_fast.objectives.anchored import AnchoredObjective
from nsc_fast.objectives.anchors import anchors
from nsc_fast.objectives.metric import metric_of
from nsc_fast.objectives.score import score
from nsc_fast.objectives.states import states

RANKS = {"one": 2, "two": 3}
# The root of the second moments has the rounding of its smallest eigenvalues, about 1e-8.
MODELS = {
    "bert": (tiny_bert, ("query", "value", "dense"), ".layer.", "bert"),
    "llama": (tiny_llama, ("q_proj", "v_proj", "down_proj"), "layers.", "model"),
    "gpt2": (tiny_gpt2, ("c_attn", "c_fc"), ".h.", "transformer"),
}


def _tokens(states, keep):
    return states[keep]


def _means(states, keep):
    return torch.stack([row[own].mean(0) for row, own in zip(states, keep, strict=True)])


class Job:
    def __init__(self, kind="bert", dtype=torch.float64, own_modules=False):
        make, ends, place, self.inner = MODELS[kind]
        self.model = make(dtype)
        modules = [n for n in linear_names(self.model, ends) if place in n]
        own = {"one": modules, "two": modules[1:]} if own_modules else modules
        self.raw = random_adapters(self.model, own, RANKS)
        self.updates = canonical_adapters(self.raw)
        self.data = {
            t: [token_batch(2, 6, seed=10 * k + i, padding=k) for i in range(4)] for k, t in enumerate(RANKS)
        }

    def states(self, deltas, batch):
        """Last states with full weights."""
        weights = {n: p.detach() for n, p in self.model.named_parameters()}
        for module, delta in deltas.items():
            transposed = hasattr(self.model.get_submodule(module), "nf")
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + (delta.T if transposed else delta)
        prefix = f"{self.inner}."
        inner = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        return states(functional_call(getattr(self.model, self.inner), inner, args=(), kwargs=batch))

    def eager(self, merged, batches):
        """Mean distance by the formula, differentiable in what ``merged`` holds."""
        total = 0.0
        for task, batch in batches.items():
            own = {m: u.dense() for m, u in self.updates[task].items()}
            pairs = [
                (self.states({}, b), self.states(own, b), b["attention_mask"].bool()) for b in self.data[task]
            ]
            moved = [(h - h0, keep) for h0, h, keep in pairs]
            keep = batch["attention_mask"].bool()
            off = self.states(merged, batch) - self.states(own, batch)
            for view in (_tokens, _means):
                step, now = torch.cat([view(*pair) for pair in moved]), view(off, keep)
                values, vectors = torch.linalg.eigh(step.T @ step / len(step))
                root = vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
                metric = root / root.trace() + 0.1 * torch.eye(len(root)) / len(root)
                base = torch.einsum("ni,ij,nj->n", step, metric, step).mean()
                here = torch.einsum("ni,ij,nj->n", now, metric, now).mean()
                total = total + here / base / 2 / len(batches)
        return total

    def run(self, **parameters):
        inputs = MergeInputs(updates=self.updates, model=self.model, data=self.data)
        return anchored.METHOD.run(inputs, anchored.Parameters(**parameters))


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_of_merged_layers_are_those_of_merged_weights(kind):
    job = Job(kind, own_modules=True)
    fixed = anchors(job.model, job.updates, job.data)
    start = {"one": 0.3, "two": 0.7}
    modules = list(job.updates["one"])
    values = {
        m: {t: torch.tensor(start[t], dtype=torch.float64, requires_grad=True) for t in RANKS}
        for m in modules
    }
    merged = {
        m: sum(values[m][t] * job.updates[t][m].dense() for t in RANKS if m in job.updates[t])
        for m in modules
    }
    batches = {t: own[1] for t, own in job.data.items()}
    loss = job.eager(merged, batches)
    loss.backward()
    installation = install(job.model, job.updates, granularity="module", init=start)
    try:
        objective = AnchoredObjective(job.model, installation, fixed)
        got, _ = objective.losses({t: own.batches[1] for t, own in fixed.items()})
        assert got == pytest.approx(float(loss.detach()), rel=1e-7)
        for module in modules:
            expected = [values[module][t].grad for t in RANKS if module in job.updates[t]]
            found = installation.coefficients.values[module.replace(".", "/")].grad
            assert error(found, torch.stack(expected)) < 1e-6
    finally:
        remove(job.model)


def check_gradients_of_the_cores(job, fixed, formula, *, loss_within, within):
    """One step over the first batches against autograd through ``formula(merged weights, batches)``."""
    installation = install(job.model, job.updates, granularity="core", init={"one": 0.3, "two": 0.7})
    try:
        objective = AnchoredObjective(job.model, installation, fixed)
        got, _ = objective.losses({t: own.batches[0] for t, own in fixed.items()})
        layers = {n: m for n, m in job.model.named_modules() if isinstance(m, MergedLinear)}
        cores = {n: installation.coefficients.of(n) for n in layers}
    finally:
        remove(job.model)
    copies = {n: x.detach().clone().requires_grad_() for n, x in cores.items()}
    merged = {n: layers[n].columns @ copies[n] @ layers[n].basis for n in layers}
    loss = formula(merged, {t: own[0] for t, own in job.data.items()})
    assert got == pytest.approx(float(loss.detach()), rel=loss_within)
    for name, gradient in zip(copies, torch.autograd.grad(loss, list(copies.values())), strict=True):
        assert error(cores[name].grad, gradient) < within


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_of_the_cores_are_those_of_merged_weights(kind):
    job = Job(kind)
    fixed = anchors(job.model, job.updates, job.data)
    check_gradients_of_the_cores(job, fixed, job.eager, loss_within=1e-7, within=1e-6)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "changed",
    [
        {"batching": "never"},
        {"batching": "always"},
        {"micro_batch": 1},
        {"micro_batch": 2, "batching": "never"},
        {"checkpointing": "always"},
        {"checkpointing": "always", "offload": True, "micro_batch": 1},
    ],
    ids=str,
)
def test_joined_divided_or_computed_again_the_step_is_the_same(kind, changed):
    def run(**parameters):
        job = Job(kind)
        for k, own in enumerate(job.data.values()):
            # Three sequences, with other lengths and other padding in each task.
            own[:] = [token_batch(3, 5 + k, seed=10 * k + i, padding=k) for i in range(4)]
        passes = []
        handle = getattr(job.model, job.inner).register_forward_hook(lambda *_: passes.append(1))
        result = job.run(steps=3, learning_rate=0.02, signal_rows=0, **parameters)
        handle.remove()
        return result, len(passes)

    (got, passes), (expected, before) = run(**changed), run()
    for a, b in zip(got.history, expected.history, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        assert a.ratios == pytest.approx(b.ratios, rel=1e-6)
    for module, update in expected.updates.items():
        assert error(got.updates[module].dense(), update.dense()) < 1e-5
    # Forward passes: joined, a step has one.
    divided = "micro_batch" in changed or changed.get("batching") == "never"
    assert (passes > before) == divided


def test_layers_with_the_same_input_are_computed_together():
    job = Job("llama")
    fixed = anchors(job.model, job.updates, job.data)
    installation = install(job.model, job.updates, granularity="core")
    try:
        objective = AnchoredObjective(job.model, installation, fixed)
        objective.losses({t: own.batches[0] for t, own in fixed.items()})
        groups = {m.siblings for m in job.model.modules() if isinstance(m, MergedLinear) and m.siblings}
        assert groups and all(len(group.layers) == 2 for group in groups)
    finally:
        remove(job.model)


def test_an_adapter_is_at_distance_zero_and_the_base_model_at_one():
    job = Job()
    fixed = anchors(job.model, job.updates, job.data)
    assert score(job.model, {}, fixed).distances == pytest.approx(dict.fromkeys(RANKS, 1.0))
    for task, own in job.updates.items():
        assert score(job.model, own, fixed).distances[task] == pytest.approx(0.0, abs=1e-12)


def test_padding_does_not_matter():
    job = Job()
    fixed = anchors(job.model, job.updates, job.data)
    for batch in job.data["two"]:
        batch["input_ids"] = torch.where(batch["attention_mask"] == 0, 9, batch["input_ids"])
    again = anchors(job.model, job.updates, job.data)
    for ours, theirs in zip(again["two"].metrics, fixed["two"].metrics, strict=True):
        assert error(dense(ours), dense(theirs)) < 1e-6


def dense(metric):
    return metric.root @ metric.root.T + metric.floor * torch.eye(len(metric.root)).to(metric.root)


@pytest.mark.parametrize("columns", [5, 8, 100])
def test_the_metric_is_its_formula(columns, monkeypatch):
    """What does not fit into the columns keeps its share of the trace."""
    monkeypatch.setattr("nsc_fast.objectives.metric.COLUMNS", columns)
    moved = torch.randn(50, 8, dtype=torch.float64) * torch.tensor([3.0, 2, 1, 1, 0.5, 0.1, 0.1, 0.01])
    second = moved.T @ moved / len(moved)
    values, vectors = torch.linalg.eigh(second)
    share = values.sqrt() / values.sqrt().sum()
    kept = share.clone()
    kept[: max(8 - columns, 0)] = 0
    wanted = vectors @ kept.diag() @ vectors.T
    wanted.diagonal().add_((0.1 + 1 - kept.sum()) / 8)
    wanted = wanted / (wanted * second).sum()
    found = metric_of("one", second, torch.float64)
    assert found.root.shape == (8, min(columns, 8))
    assert error(dense(found), wanted) < 1e-12
    assert found.of(moved).mean().item() == pytest.approx(1.0, rel=1e-12)
    assert error(found.of(moved), ((moved @ wanted) * moved).sum(1)) < 1e-12


@pytest.mark.parametrize("granularity", ["core", "rank", "module", "layer", "task"])
def test_the_distance_goes_down_and_the_model_comes_back(granularity):
    job = Job()
    modules = dict(job.model.named_modules())
    frozen = [p.requires_grad for p in job.model.parameters()]
    result = job.run(granularity=granularity, steps=40, learning_rate=0.03)
    first, last = result.history[0].loss, sum(r.loss for r in result.history[-4:]) / 4
    assert last < 0.9 * first
    assert all(m is modules[n] for n, m in job.model.named_modules())
    assert frozen == [p.requires_grad for p in job.model.parameters()]
    assert (result.coefficients is None) == (granularity == "core")
    assert result.measure != "null-space ratio"


@pytest.mark.parametrize("granularity", ["core", "rank"])
def test_an_interrupted_descent_goes_on_with_the_same_bits(tmp_path, granularity):
    class Interrupted(Exception):
        pass

    def run(checkpoints=None, stop_at=None):
        def on_step(record):
            if record.step == stop_at:
                raise Interrupted

        job = Job(dtype=torch.float32)
        inputs = MergeInputs(
            updates=job.updates, model=job.model, data=job.data, checkpoints=checkpoints, on_step=on_step
        )
        parameters = anchored.Parameters(granularity=granularity, steps=14, signal_rows=0)
        return anchored.METHOD.run(inputs, parameters)

    whole = run()
    with pytest.raises(Interrupted):
        run(Checkpoints(tmp_path / "run", 4), stop_at=11)
    notices = []
    resumed = run(Checkpoints(tmp_path / "run", 4, resume=True, on_notice=notices.append))
    assert notices == ["going on after step 8"]
    assert resumed.history == whole.history
    for module, update in whole.updates.items():
        assert torch.equal(resumed.updates[module].columns, update.columns)


@pytest.mark.parametrize("granularity", ["core", "rank", "task"])
def test_cores_are_descended_by_soap_and_coefficients_by_adamw(monkeypatch, granularity):
    made = []
    for owner, name in ((loop, "SOAP"), (torch.optim, "AdamW")):
        kind = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _n=name, _k=kind, **k: made.append(_n) or _k(*a, **k))
    Job().run(granularity=granularity, steps=1, signal_rows=0)
    assert made == ["SOAP" if granularity == "core" else "AdamW"]


def test_the_merged_update_is_what_was_optimised():
    """One LoRA: columns times core times basis, of the sum of the ranks at most."""
    job = Job()
    fixed = anchors(job.model, job.updates, job.data)
    inputs = MergeInputs(updates=job.updates, model=job.model, data=job.data)
    result = anchored.fit(inputs, fixed, anchored.Parameters(steps=20))
    assert all(update.rank <= sum(RANKS.values()) for update in result.updates.values())
    merged = {m: u.dense() for m, u in result.updates.items()}
    expected = float(job.eager(merged, {t: own[0] for t, own in job.data.items()}))
    judged = {t: replace(own, batches=own.batches[:1]) for t, own in fixed.items()}
    assert score(job.model, result.updates, judged).mean == pytest.approx(expected, rel=1e-7)
    assert expected < 0.99 * float(job.eager(start(job), {t: own[0] for t, own in job.data.items()}))


def start(job):
    """Task arithmetic at the initial coefficient."""
    return {m: sum(0.4 * own[m].dense() for own in job.updates.values()) for m in job.updates["one"]}


def test_two_runs_give_the_same_bits():
    a, b = (Job(dtype=torch.float32).run(steps=5) for _ in range(2))
    assert a.history == b.history
    assert all(torch.equal(a.updates[m].columns, b.updates[m].columns) for m in a.updates)


def test_ctrl_c_keeps_what_there_is():
    job = Job()

    def on_step(record):
        if record.step == 3:
            raise KeyboardInterrupt

    inputs = MergeInputs(updates=job.updates, model=job.model, data=job.data, on_step=on_step)
    result = anchored.METHOD.run(inputs, anchored.Parameters(steps=50))
    assert result.interrupted and len(result.history) == 3
    assert not any(isinstance(m, MergedLinear) for m in job.model.modules())


def test_a_model_that_is_no_transformer():
    torch.manual_seed(0)
    model = Mlp().double()
    updates = canonical_adapters(random_adapters(model, MLP_MODULES, RANKS))
    data = {t: [{"x": torch.randn(4, 8, dtype=torch.float64)} for _ in range(3)] for t in RANKS}
    inputs = MergeInputs(updates=updates, model=model, data=data)
    result = anchored.METHOD.run(inputs, anchored.Parameters(steps=60, learning_rate=0.03))
    assert result.history[-1].loss < result.history[0].loss


class TestBadInput:
    def test_missing_and_empty_data(self):
        job = Job()
        job.data.pop("two")
        with pytest.raises(MergeError, match="'two' has no unlabeled data"):
            job.run()
        job.data["two"] = []
        with pytest.raises(MergeError, match="'two': the data holds no batch"):
            job.run()

    def test_not_finite(self):
        job = Job()
        job.model.get_input_embeddings().weight.data.fill_(float("nan"))
        with pytest.raises(MergeError, match="states of task 'one' are not finite"):
            job.run()

    def test_a_learning_rate_that_overflows(self):
        job = Job(dtype=torch.float32)
        with pytest.raises(MergeError, match="distance of task '.*' is .*lower the learning rate"):
            job.run(learning_rate=1e30, steps=20)

    def test_an_adapter_that_does_nothing(self):
        job = Job()
        job.updates["one"] = {m: u.scaled(0.0) for m, u in job.updates["one"].items()}
        with pytest.raises(MergeError, match="adapter of task 'one' changes nothing"):
            job.run()

    def test_parameters(self):
        with pytest.raises(ValidationError):
            anchored.Parameters(preferences={"one": -1.0})


def test_cores_around_layers_whose_weights_wait_elsewhere():
    """Offloaded weights are on "meta" until their layer runs."""
    accelerate = pytest.importorskip("accelerate")
    job = Job("llama")
    batch = token_batch(2, 6, seed=0)

    def run(model):
        installation = install(model, job.updates, granularity="core")
        loss = model(**batch).logits.square().mean()
        loss.backward()
        grads = {m: installation.coefficients.of(m).grad for m in installation.modules}
        remove(model)
        return loss.detach(), grads

    loss, grads = run(job.model)
    offloaded = accelerate.cpu_offload(job.model, execution_device=torch.device("cpu"))
    got, others = run(offloaded)
    assert error(got, loss) < 1e-12
    assert all(error(others[m], grad) < 1e-12 for m, grad in grads.items())
