import pytest
import torch
from compare import error
from test_checkpointing import Case
from tiny import canonical_adapters, linear_names, random_adapters, tiny_bert, tiny_llama, token_batch
from torch import nn

from nsc_fast.driver import Driver, optimise
from nsc_fast.errors import MergeError
from nsc_fast.methods import MergeInputs, get
from nsc_fast.packing import check_positions, forward_options, obstacle, pack, parts, positions, whole_of
from nsc_fast.parameters import NSCParameters
from nsc_fast.processes import share


def run(case, **options):
    """Loss, ratios and gradients of a driver with other options."""
    case.driver = Driver(case.model, case.installation, **options)
    return case.step()


def same(found, want, limit):
    assert found[0] == pytest.approx(want[0], rel=limit)
    assert found[1] == pytest.approx(want[1], rel=limit)
    for name, grad in want[2].items():
        assert error(found[2][name], grad) <= limit, name


@pytest.mark.parametrize("together", ["never", "always"])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_parts_add_up_to_the_batch(kind, micro_batch, together):
    case = Case(kind)
    want = case.step()
    same(run(case, micro_batch=micro_batch, together=together), want, 1e-12)


def test_parts_count_by_their_tokens():
    # One long and one short sequence: the mean of the parts' means would be another number.
    case = Case()
    case.batches = {t: token_batch(2, 9, seed=k, padding=7) for k, t in enumerate(case.batches)}
    want = case.step()
    same(run(case, micro_batch=1), want, 1e-12)


def square(batch, kind):
    """The same batch with a mask of which token sees which."""
    real = batch["attention_mask"].bool()
    length = real.shape[1]
    sees = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None] & real[:, :, None]
    sees = (sees | torch.eye(length, dtype=torch.bool))[:, None]
    if kind == "added":
        sees = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, -1e9)
    return {**batch, "attention_mask": sees}


@pytest.mark.parametrize("kind", ["seen", "added"])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_parts_with_masks_of_which_token_sees_which_add_up(micro_batch, kind):
    case = Case()
    case.batches = {t: token_batch(3, 9, seed=k, padding=7) for k, t in enumerate(case.batches)}
    case.batches = {t: square(batch, kind) for t, batch in case.batches.items()}
    want = case.step()
    same(run(case, micro_batch=micro_batch), want, 1e-12)


@pytest.mark.parametrize("kind", ["seen", "added"])
def test_the_whole_counts_the_tokens_that_are_real(kind):
    batch = token_batch(3, 9, seed=0, padding=7)
    assert whole_of(batch) == whole_of(square(batch, kind)) == (20.0, 3, 0)
    assert share({"t": square(batch, kind)}, 0, 2)[1] == {"t": (20.0, 3, 0)}


def test_parts_of_images_count_by_their_rows():
    batch = {"x": torch.randn(5, 4, 8)}
    assert [p["x"].shape[0] for p in parts(batch, 2)] == [2, 2, 1]


@pytest.mark.parametrize("key", ["decoder_input_ids", "input_features", "pixel_values"])
def test_what_cannot_be_divided_is_refused(key):
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.int64), key: torch.ones(5, 3)}
    with pytest.raises(MergeError, match=key):
        parts(batch, 1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_is_the_same_as_padded(kind, attention):
    case = Case(kind, torch.float32)
    case.model.set_attn_implementation(attention)
    want = case.step()
    told = []
    found = run(case, packing="always", on_notice=told.append)
    same(found, want, 1e-5)
    assert not told
    ((inputs, _),) = case.driver._passes(case.batches, tuple(case.batches), torch.device("cpu"))
    real = sum(int(batch["attention_mask"].sum()) for batch in case.batches.values())
    assert inputs["input_ids"].shape == (1, real)
    same(run(case, packing="auto", micro_batch=1), want, 1e-5)


def test_packed_row():
    left = {
        "input_ids": torch.tensor([[5, 6, 0], [7, 8, 9]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1] * 3]),
    }
    right = {"input_ids": torch.tensor([[3, 4]])}
    inputs, tokens = pack({0: left, 2: right})
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3, 4]]
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1]]
    assert tokens.task.tolist() == [[0] * 5 + [2] * 2]
    padded_left = {**left, "attention_mask": torch.tensor([[0, 1, 1], [1] * 3])}
    inputs, _ = pack({0: padded_left})
    assert inputs["input_ids"].tolist() == [[6, 0, 7, 8, 9]]
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    for mask in ([1, 0, 1], [0.5, 1, 1]):
        assert pack({0: {**left, "attention_mask": torch.tensor([mask, [1] * 3])}}) is None
    assert pack({0: {**right, "token_type_ids": torch.zeros(1, 2)}}) is None


def padded_left(batch):
    """The same sequences with their padding before them."""
    lengths = batch["attention_mask"].sum(1).tolist()
    return {
        key: torch.stack([row.roll(row.shape[0] - n) for row, n in zip(value, lengths, strict=True)])
        for key, value in batch.items()
    }


@pytest.mark.parametrize("together", ["auto", "never"])
def test_left_padded_batches_are_packed(together):
    case = Case("llama", torch.float32)
    want = case.step()
    case.batches = {task: padded_left(batch) for task, batch in case.batches.items()}
    same(run(case, packing="always", together=together), want, 1e-5)
    ((inputs, _),) = case.driver._passes(case.batches, tuple(case.batches), torch.device("cpu"))
    real = sum(int(batch["attention_mask"].sum()) for batch in case.batches.values())
    assert inputs["input_ids"].shape == (1, real)


def test_a_later_batch_that_cannot_be_packed():
    case = Case("llama", torch.float32)
    gap = {
        task: {**batch, "attention_mask": batch["attention_mask"].clone()}
        for task, batch in case.batches.items()
    }
    gap["two"]["attention_mask"][0, 2] = 0
    padded = run(case)[0]
    run(case, packing="always")
    case.batches = gap
    with pytest.raises(MergeError, match="a batch cannot be packed.*side by side.*packing to 'auto'"):
        case.step()
    with pytest.raises(MergeError, match="cannot be packed: a batch does not fit"):
        run(case, packing="always")
    told = []
    want = run(case)
    same(run(case, packing="auto", on_notice=told.append), want, 1e-12)
    assert want[0] != padded and len(told) == 1 and "side by side" in told[0]


@pytest.mark.parametrize("padding", [0, 4])
def test_a_token_without_an_embedding_is_no_obstacle(padding):
    """It begins one of the two sequences that are tried, unless it is known for padding."""
    model = tiny_llama(torch.float32).model
    model.get_input_embeddings().weight.data[0] = 0.0
    batch = {"input_ids": torch.arange(8)[None]}
    if padding:
        batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"][:, 1:], (padding, 0))
        batch["attention_mask"] = (batch["input_ids"] != 0).long()
    assert obstacle(model, forward_options(model), [batch]) is None


def test_states_that_are_not_finite_are_named():
    model = tiny_llama(torch.float32).model
    model.get_input_embeddings().weight.data[3] = float("inf")
    batch = {"input_ids": torch.arange(21)[None]}
    assert "not finite" in obstacle(model, forward_options(model), [batch])


class Leaky(nn.Module):
    """Takes position ids and lets every token see all before it, of whatever sequence."""

    base_model_prefix = ""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x)).cumsum(1)
        return type("Output", (), {"last_hidden_state": x})()


@pytest.mark.parametrize("make, reason", [(Leaky, "see each other"), (tiny_bert, "packed")])
def test_models_that_cannot_pack_fall_back_and_say_so(make, reason):
    torch.manual_seed(0)
    model = make().double().eval()
    names = linear_names(model, ("query", "0", "1"))
    names = [n for n in names if isinstance(model.get_submodule(n), nn.Linear)]
    adapters = canonical_adapters(random_adapters(model, names, {"one": 2, "two": 2}))
    data = {t: [token_batch(2, 14, seed=k, padding=3)] for k, t in enumerate(adapters)}
    parameters = {"steps": 2, "scope": {"layers": "all"}}
    plain, _, _ = optimise(model, adapters, data, NSCParameters(**parameters))
    told = []
    other, _, _ = optimise(
        model, adapters, data, NSCParameters(**parameters, packing="auto"), on_notice=told.append
    )
    assert len(told) == 1 and reason in told[0]
    assert all(torch.equal(other[m], plain[m]) for m in plain)
    with pytest.raises(MergeError, match="packing to 'auto'"):
        optimise(model, adapters, data, NSCParameters(**parameters, packing="always"))


def test_notice_reaches_the_result():
    case = Case("bert")
    from nsc_fast.layers import remove

    remove(case.model)
    data = {task: [batch] for task, batch in case.batches.items()}
    inputs = MergeInputs(updates=case.adapters, factors={}, weights={}, model=case.model, data=data)
    result = get("nsc").run(inputs, NSCParameters(steps=1, packing="auto"))
    assert any("not packed" in notice for notice in result.notices)


def test_sequences_beyond_the_positions_are_refused_before_anything_runs():
    model = tiny_llama()
    adapters = canonical_adapters(random_adapters(model, linear_names(model, ("q_proj",)), {"one": 2}))
    data = {"one": [token_batch(1, 20, seed=0), token_batch(1, 65, seed=1)]}
    model.forward = model.model.forward = None
    with pytest.raises(MergeError, match="'one'.*65 tokens.*64 positions"):
        optimise(model, adapters, data, NSCParameters(steps=1))


def test_positions_of_a_stream_are_checked_as_they_come():
    model = tiny_llama()
    adapters = canonical_adapters(random_adapters(model, linear_names(model, ("q_proj",)), {"one": 2}))

    class Rows:
        def __iter__(self):
            return iter([token_batch(1, 65, seed=1)])

    with pytest.raises(MergeError, match="65 tokens"):
        optimise(model, adapters, {"one": Rows()}, NSCParameters(steps=1))
    check_positions(model, {"one": Rows()})


def test_roberta_counts_from_behind_its_padding():
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=34, vocab_size=40, pad_token_id=1,
    )  # fmt: skip
    model = RobertaModel(config).eval()
    limit = positions(model)
    assert limit == 32
    model(torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, limit + 1), 5))
