"""Which merged layers are computed together, and that nothing but the time depends on it."""

import gc
import weakref

import pytest
import torch
from compare import assert_same
from tiny import canonical_adapters, linear_names, random_adapters, tiny_bert, tiny_llama, token_batch

from nsc_fast.driver import optimise
from nsc_fast.layers import install, remove
from nsc_fast.parameters import NSCParameters
from nsc_fast.siblings import share

RANKS = {"one": 2, "two": 3}
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def installed(model, modules, **kinds):
    names = modules if isinstance(modules, dict) else linear_names(model, modules)
    return install(model, canonical_adapters(random_adapters(model, names, RANKS)), **kinds)


def groups(found):
    return sorted(sorted(one.name for one in group.layers) for group in found)


def test_queries_keys_and_values_and_gate_and_up():
    model = tiny_llama(blocks=2)
    installed(model, LLAMA)
    batch = token_batch(2, 5, seed=0)
    expected = model(**batch).logits
    found = share(model, lambda: model(**batch))
    parts = [("self_attn", "kqv"), ("mlp", ("gate", "up"))]
    expected_groups = [
        [f"model.layers.{i}.{part}.{n}_proj" for n in names] for i in range(2) for part, names in parts
    ]
    assert groups(found) == sorted(expected_groups)
    assert_same("logits", model(**batch).logits, expected, 1e3)
    assert share(model, lambda: model(**batch)) == [], "they are in groups already"
    remove(model)
    assert not any(hasattr(m, "siblings") for m in model.modules())


def test_the_queries_of_a_cross_attention_stay_alone():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=4, vocab_size=30,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).double().eval()
    installed(model, ("q", "k", "v", "wi_0", "wi_1"))
    ids = torch.randint(0, 30, (2, 6))
    expected = model(input_ids=ids, labels=ids).logits
    found = groups(share(model, lambda: model(input_ids=ids, labels=ids)))
    cross = "decoder.block.0.layer.1.EncDecAttention"
    assert [f"{cross}.k", f"{cross}.v"] in found
    assert not any(f"{cross}.q" in group for group in found)
    assert [
        "encoder.block.0.layer.1.DenseReluDense.wi_0",
        "encoder.block.0.layer.1.DenseReluDense.wi_1",
    ] in found
    assert_same("logits", model(input_ids=ids, labels=ids).logits, expected, 1e3)


def test_layers_of_other_tasks_stay_alone():
    model = tiny_bert(blocks=1)
    every = linear_names(model, ("query", "key", "value"))
    installed(model, {"one": every, "two": [n for n in every if not n.endswith("key")]})
    found = share(model, lambda: model(**token_batch(2, 5, seed=0)))
    assert [[name.rpartition(".")[2] for name in group] for group in groups(found)] == [["query", "value"]]


class Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (torch.nn.Linear(6, 4, dtype=torch.float64) for _ in range(2))

    def forward(self, x, other=None):
        return self.a(x), self.b(x if other is None else other)


def pair():
    model = Pair()
    installed(model, ("a", "b"), granularity="module")
    x = torch.randn(5, 6, dtype=torch.float64)
    (group,) = share(model, lambda: model(x))
    return model, x, group


def test_another_tensor_starts_anew():
    model, x, _ = pair()
    other = torch.randn_like(x)
    a, b = model(x, other)
    expected_a, expected_b = model(x)[0], model(other)[1]
    assert torch.equal(a, expected_a) and torch.equal(b, expected_b)


def test_a_tensor_that_was_written_to_starts_anew():
    model, x, _ = pair()
    model.a(x)
    x.mul_(2)
    assert torch.equal(model.b(x), model(x.clone())[1])


def test_a_layer_called_twice_gives_its_output_twice():
    model, x, _ = pair()
    assert torch.equal(model.a(x), model.a(x))


def test_what_was_not_called_for_is_dropped():
    model, x, group = pair()
    z = x.clone()
    seen = weakref.ref(z)
    model.a(z)
    del z
    gc.collect()
    assert seen() is not None
    group.forget()
    gc.collect()
    assert seen() is None


def test_the_layers_keep_views_of_the_shared_basis():
    model, _, group = pair()
    assert model.a.basis.untyped_storage().data_ptr() == group.basis.untyped_storage().data_ptr()


def test_moved_layers_are_stacked_again():
    model, x, group = pair()
    expected = model(x)
    model.float()
    got = model(x.float())
    assert group.basis.dtype == torch.float32
    for a, b in zip(got, expected, strict=True):
        assert_same("y", a.double(), b, 1e10)


def test_calls_with_different_partners_stay_alone():
    model = Pair()
    installed(model, ("a", "b"))
    x = torch.randn(5, 6, dtype=torch.float64)

    def run():
        model(x)
        model(x.clone(), x.clone())

    assert share(model, run) == []


def test_inference_mode():
    model, x, _ = pair()
    expected = model(x)
    with torch.inference_mode():
        got = model(x.clone())
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("granularity", ["layer", "rank"])
def test_an_optimisation_gives_the_same_without_sharing(granularity, monkeypatch):
    model = tiny_llama()
    raw = random_adapters(model, linear_names(model, LLAMA), RANKS)
    data = {task: [token_batch(2, 5, seed=i)] for i, task in enumerate(RANKS)}
    parameters = NSCParameters(steps=4, granularity=granularity, learning_rate=1e-2)
    got, history, _ = optimise(model, canonical_adapters(raw), data, parameters)
    shared = []
    monkeypatch.setattr("nsc_fast.driver.share", lambda model, run: shared.append(run()) or [])
    expected, other, _ = optimise(model, canonical_adapters(raw), data, parameters)
    assert len(shared) == 1
    assert [r.loss for r in history] == pytest.approx([r.loss for r in other], rel=1e-12)
    for module, value in expected.items():
        assert_same(module, got[module], value, 1e4)
