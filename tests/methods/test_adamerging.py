"""AdaMerging: the entropy and its gradient against plain formulas, its three kinds, and what it refuses."""

from __future__ import annotations

import pytest
import tiny
import torch
from method_inputs import GOLDEN, error, golden, golden_raw, inputs_of
from pydantic import ValidationError

from nsc_fast import methods
from nsc_fast.errors import MergeError
from nsc_fast.factors import canonical
from nsc_fast.layers import install, remove
from nsc_fast.methods import adamerging
from nsc_fast.methods.entropy import EntropyObjective, answer, entropy, pack_left

METHOD = methods.get("adamerging")
RANKS = {"a": 2, "b": 3}


def _setting(model, ends):
    torch.manual_seed(3)
    raw = tiny.random_adapters(model, tiny.linear_names(model, ends), RANKS)
    return raw, {task: [tiny.token_batch(3, 6, seed=k, padding=2)] for k, task in enumerate(RANKS)}


def _merged(model, raw, coefficients):
    """The model's parameters with all updates added, differentiable in ``coefficients[task]``."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for task, own in raw.items():
        for module, (a, b, s) in own.items():
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + coefficients[task] * s * (b @ a)
    return weights


def test_entropy_of_simple_distributions():
    assert torch.allclose(entropy(torch.zeros(2, 8, dtype=torch.float64)), torch.tensor(8.0).log().double())
    certain = torch.tensor([[1000.0, 0.0, 0.0]])
    assert entropy(certain).item() == 0 and torch.isfinite(entropy(certain)).all()
    assert entropy(torch.randn(4, 5).bfloat16()).dtype == torch.float32


def test_classification_gradient_is_that_of_the_merged_weights():
    model = tiny.tiny_bert(blocks=1)
    raw, data = _setting(model, ("query", "value"))
    coefficients = {task: torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for task in raw}
    weights = _merged(model, raw, coefficients)
    expected = torch.zeros((), dtype=torch.float64)
    for batches in data.values():
        logits = torch.func.functional_call(model, weights, args=(), kwargs=batches[0]).logits
        p = logits.softmax(-1)
        expected = expected + 0.5 * -(p * p.log()).sum(-1).mean()
    gradient = torch.autograd.grad(expected, list(coefficients.values()))
    installed = install(model, inputs_of(raw).updates, granularity="task", init=0.3)
    objective = EntropyObjective(model, installed)
    loss, parts = objective.losses({task: batches[0] for task, batches in data.items()})
    got = next(installed.coefficients.parameters()).grad
    remove(model)
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    assert loss == pytest.approx(sum(parts.values()) / 2)
    assert torch.allclose(got, torch.stack(gradient), rtol=1e-8)


def _decode_by_hand(logits_of, batch, steps, end):
    """Entropy of every greedy token, one full pass per token and row, until ``end``."""
    rows = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        tokens, row = ids[mask > 0][None], []
        for _ in range(steps):
            logits = logits_of({"input_ids": tokens})[0, -1]
            p = logits.softmax(-1)
            row.append(-(p * p.log()).sum())
            choice = logits.argmax()
            tokens = torch.cat([tokens, choice[None, None]], dim=1)
            if int(choice) == end:
                break
        rows.append(torch.stack(row))
    return rows


@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny.tiny_gpt2])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mode", ["first_token", "all_tokens"])
def test_generation_equals_token_by_token(make, side, mode):
    model = make(blocks=1)
    ends = ("q_proj", "v_proj") if make is tiny.tiny_llama else ("c_proj",)
    raw, data = _setting(model, ends)
    batch = data["a"][0]
    if side == "left":
        batch = {key: value.flip(1) for key, value in batch.items()}
    installed = install(model, inputs_of(raw).updates, granularity="task", init=0.5)
    try:

        def logits_of(inputs):
            return model(**inputs).logits

        # An end that the greedy answer reaches, so that rows end at different lengths.
        longest = answer(model, pack_left(batch), 6)["input_ids"]
        end = int(longest[1, 8])
        model.generation_config.eos_token_id = end
        steps = 1 if mode == "first_token" else 6
        rows = _decode_by_hand(logits_of, batch, steps, end)
        expected = torch.stack([row.mean() for row in rows]).mean()
        value = next(installed.coefficients.parameters())
        (gradient,) = torch.autograd.grad(expected, value)
        objective = EntropyObjective(
            model, installed, mode=mode, max_new_tokens=6, preferences={"a": 1.0, "b": 0.0}
        )
        loss, _ = objective.losses({"a": batch})
        assert loss == pytest.approx(expected.item(), rel=1e-9)
        assert torch.allclose(value.grad, gradient, rtol=1e-7, atol=1e-12)
        if mode == "all_tokens":
            objective.token_reduction = "sum"
            summed, _ = objective.losses({"a": batch})
            assert summed == pytest.approx(torch.stack([row.sum() for row in rows]).mean().item(), rel=1e-9)
    finally:
        remove(model)


@pytest.mark.parametrize("granularity", ["task", "layer", "module", "rank"])
def test_entropy_falls_and_the_model_is_left_as_it_was(granularity):
    model = tiny.tiny_bert(blocks=2)
    raw, data = _setting(model, ("query", "value", "dense"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    parameters = METHOD.parameters(granularity=granularity, steps=15, learning_rate=0.03, bounds=None)
    result = METHOD.run(inputs_of(raw, model=model, data=data), parameters)
    assert len(result.history) == 15 and result.measure == "prediction entropy"
    assert result.history[-1].loss < result.history[0].loss
    assert set(result.history[0].ratios) == {"a", "b"}
    assert all(torch.equal(before[name], p) and p.requires_grad for name, p in model.named_parameters())
    for module, update in result.updates.items():
        coefficients = result.coefficients[module]
        if granularity != "rank":
            expected = sum(
                c * s * (b @ a) for c, (a, b, s) in zip(coefficients, _of(raw, module), strict=True)
            )
            assert error(update.dense(), expected) < 1e-6


def _of(raw, module):
    return [own[module] for own in raw.values()]


def test_bounds_hold_the_coefficients():
    model = tiny.tiny_bert(blocks=1)
    raw, data = _setting(model, ("query",))
    result = METHOD.run(
        inputs_of(raw, model=model, data=data),
        METHOD.parameters(steps=20, learning_rate=0.2, bounds=(0.2, 0.4)),
    )
    values = torch.cat(list(result.coefficients.values()))
    assert values.min() >= 0.2 and values.max() <= 0.4
    assert ((values - 0.2).abs() < 1e-6).any() or ((values - 0.4).abs() < 1e-6).any()


def test_own_heads_of_the_tasks():
    model = tiny.tiny_bert(blocks=1)
    raw, data = _setting(model, ("query",))
    head = {"classifier.weight": torch.zeros(7, 32), "classifier.bias": torch.zeros(7)}
    result = METHOD.run(inputs_of(raw, model=model, data=data, heads={"b": head}), METHOD.parameters(steps=1))
    assert result.history[0].ratios["b"] == pytest.approx(torch.tensor(7.0).log().item(), rel=1e-5)
    assert model.classifier.weight.shape == (3, 32)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no recorded numbers")
def test_plus_plus_takes_what_the_original_takes():
    recorded, raw = golden("adamergingpp_preproc_main"), golden_raw("main")
    parts, notices = adamerging.kept_parts(inputs_of(raw), METHOD.parameters(plus_plus=True))
    for key, expected in recorded.items():
        task, module, _ = key.split("/")
        assert error(parts[task][module].dense(), expected) <= 2e-5
    assert "full rank" in notices[0]


def test_plus_plus_runs():
    model = tiny.tiny_bert(blocks=1)
    raw, data = _setting(model, ("query", "value"))
    result = METHOD.run(
        inputs_of(raw, model=model, data=data), METHOD.parameters(plus_plus=True, steps=2, max_rank=6)
    )
    assert result.coefficients is None
    assert all(update.rank <= 2 * 6 for update in result.updates.values())


def test_what_it_refuses():
    model = tiny.tiny_bert(blocks=1)
    raw, data = _setting(model, ("query",))
    with pytest.raises(MergeError, match="needs the base model"):
        METHOD.run(inputs_of(raw), METHOD.parameters())
    with pytest.raises(MergeError, match="generates text"):
        METHOD.run(inputs_of(raw, model=tiny.Mlp(), data=data), METHOD.parameters(entropy="all_tokens"))
    model.config.num_labels = 1
    with pytest.raises(MergeError, match="not defined for regression"):
        METHOD.run(inputs_of(raw, model=model, data=data), METHOD.parameters())
    model.config.num_labels = 3
    number = {"classifier.weight": torch.zeros(1, 32), "classifier.bias": torch.zeros(1)}
    with pytest.raises(MergeError, match="head of task 'b'.*not defined for regression"):
        METHOD.run(inputs_of(raw, model=model, data=data, heads={"b": number}), METHOD.parameters())
    llama = tiny.tiny_llama(blocks=1)
    raw, data = _setting(llama, ("q_proj",))
    with pytest.raises(MergeError, match="predicts tokens"):
        METHOD.run(inputs_of(raw, model=llama, data=data), METHOD.parameters())


@pytest.mark.parametrize(
    "wrong",
    [{"bounds": (1.0, 0.0)}, {"density": 0.0}, {"max_rank": 4}, {"preferences": {"a": -1.0}}, {"scope": {}}],
)
def test_parameters_are_checked(wrong):
    with pytest.raises(ValidationError):
        METHOD.parameters(**wrong)


def test_zero_update_does_no_harm():
    model = tiny.tiny_bert(blocks=1)
    raw, data = _setting(model, ("query",))
    inputs = inputs_of(raw, model=model, data=data)
    inputs.updates["a"] = {m: canonical(torch.zeros(2, 32), torch.zeros(32, 2)) for m in inputs.updates["a"]}
    result = METHOD.run(inputs, METHOD.parameters(steps=2))
    assert all(torch.isfinite(u.dense()).all() for u in result.updates.values())
