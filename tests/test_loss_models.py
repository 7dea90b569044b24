"""NSCLoss in real models: which mask holds where, on which device, with checkpoints, and from any adapter."""

import pytest
import torch
from compare import error
from tiny import Ops, linear_names, module_inputs, random_adapters, random_factors, tiny_llama, token_batch

import nsc_fast.loss
from nsc_fast import reference
from nsc_fast.loss import NSCLoss

FLOAT32 = 1e-6


def tiny_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(4)
    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=60, decoder_start_token_id=0,
        dropout_rate=0.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def downs(model, names):
    return {m: f[0] for m, f in random_adapters(model, names, {"t": 3})["t"].items()}


class TestShapes:
    @pytest.fixture
    def a(self):
        return random_factors(3, 10, 1)[0]

    @pytest.fixture
    def nsc(self, a):
        return NSCLoss({"t": {"q": a}}).double()

    @pytest.mark.parametrize(
        ("activations", "mask"),
        [((4, 2), (2, 4)), ((2, 4), (4, 2)), ((2, 2, 2), (2, 4)), ((2, 4), (2, 1, 2, 2)), ((2, 4), (2, 3))],
    )
    def test_a_mask_in_another_order_is_refused(self, nsc, activations, mask):
        z = torch.randn(*activations, 10)
        told = f"task 't', module 'q': the mask has shape {mask} and the activations {tuple(z.shape)}"
        with pytest.raises(ValueError, match=told.replace("(", r"\(").replace(")", r"\)")):
            nsc(z, task="t", mask=torch.ones(mask))

    @pytest.mark.parametrize(
        ("activations", "shape"),
        [((2, 4), (2, 1, 1, 4)), ((2, 4), (8,)), ((8,), (2, 4)), ((1, 8), (2, 4)), ((2, 1, 4), (2, 4))],
    )
    def test_a_mask_in_the_same_order_fits(self, a, nsc, activations, shape):
        z = torch.randn(*activations, 10, dtype=torch.float64)
        mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]])
        truth = reference.ratio_loss(z.reshape(2, 4, 10), a, mask)
        assert error(nsc(z, task="t", mask=mask.reshape(shape)), truth) < FLOAT32


class TestEncoderDecoder:
    @pytest.fixture
    def model(self):
        return tiny_t5()

    @pytest.fixture
    def a(self, model):
        names = [n for n in linear_names(model, ("q", "v")) if ".block.1." in n]
        assert {n.split(".")[-2] for n in names} == {"SelfAttention", "EncDecAttention"}
        return downs(model, names)

    def batch(self, length):
        ids = torch.randint(1, 60, (2, length), generator=torch.Generator().manual_seed(3))
        return {**token_batch(2, 6, seed=0, padding=2), "decoder_input_ids": ids}

    # Of the length of the encoder's, nothing in the shapes tells the tokens apart.
    @pytest.mark.parametrize("length", [3, 6])
    @pytest.mark.parametrize("masked", [False, True])
    def test_every_module_has_the_mask_of_its_tokens(self, model, a, length, masked):
        batch = self.batch(length)
        decoder = torch.ones(2, length, dtype=torch.int64)
        if masked:
            decoder[1, 1:] = 0
            batch["decoder_attention_mask"] = decoder
        nsc = NSCLoss({"t": a})
        given = {"decoder_mask": decoder} if masked else {}
        with nsc.watch(model, "t", batch["attention_mask"], **given) as seen:
            model(**batch)
        for m, z in module_inputs(model, a, batch).items():
            crossing = "EncDecAttention.v" in m
            mask = decoder if m.startswith("decoder") and not crossing else batch["attention_mask"]
            truth = reference.ratio_loss(z.double(), a[m], mask.double())
            assert error(seen.breakdown[m], truth.detach()) < 1e-5, m
        called = nsc(module_inputs(model, a, batch), task="t", mask=batch["attention_mask"], **given)
        assert torch.equal(called.detach(), seen.loss.detach())

    def test_a_decoder_alone_has_the_mask(self):
        from transformers import OPTConfig, OPTForCausalLM

        torch.manual_seed(0)
        config = OPTConfig(
            hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=60,
            max_position_embeddings=32, word_embed_proj_dim=32, dropout=0.0,
        )  # fmt: skip
        model, batch = OPTForCausalLM(config).eval(), token_batch(2, 6, seed=0, padding=2)
        name = "model.decoder.layers.0.self_attn.v_proj"
        a = downs(model, [name])
        with NSCLoss({"t": a}).watch(model, "t", batch["attention_mask"]) as seen:
            model(**batch)
        z = module_inputs(model, a, batch)[name].double()
        assert error(seen.loss, reference.ratio_loss(z, a[name], batch["attention_mask"].double())) < 1e-5

    @pytest.mark.parametrize("length", [1, 6])
    def test_the_label_free_score(self, model, a, length):
        from nsc_fast.sweep import _task_ratio

        nsc = NSCLoss({"t": a})
        batch = self.batch(length)
        with nsc.watch(model, "t", batch["attention_mask"]) as seen:
            model(**batch)
        assert _task_ratio(nsc, model, "t", [batch]) == pytest.approx(float(seen.loss), rel=1e-6)


def test_the_label_free_score_reads_masks_of_which_token_sees_which():
    from nsc_fast.sweep import _task_ratio

    model = tiny_llama(blocks=1)
    nsc = NSCLoss({"t": downs(model, linear_names(model, ("v_proj",)))}).double()
    batch = token_batch(2, 6, seed=0, padding=3)
    real = batch["attention_mask"].bool()
    sees = torch.ones(6, 6, dtype=torch.bool).tril() & real[:, None] & real[:, :, None]
    square = {**batch, "attention_mask": (sees | torch.eye(6, dtype=torch.bool))[:, None]}
    other = token_batch(2, 6, seed=1)
    expected = _task_ratio(nsc, model, "t", [batch, other])
    assert _task_ratio(nsc, model, "t", [square, other]) == pytest.approx(expected, rel=1e-6)


class TestDevices:
    def spy(self, monkeypatch):
        """Devices of activations, basis and weights; no operation runs, for "meta" has none of the values."""
        calls = []

        def ratio(z, basis, *, ranks, weight, impl, check):
            calls.append((z, basis, weight))
            return torch.zeros(len(ranks), device=z.device)

        monkeypatch.setattr(nsc_fast.loss, "null_space_ratio", ratio)
        return calls

    def test_bases_and_mask_follow_the_activations(self, monkeypatch):
        nsc = NSCLoss({"t": {m: random_factors(2, 10, 1)[0] for m in ("q", "k", "v")}})
        calls = self.spy(monkeypatch)
        shared = torch.empty(2, 3, 10, device="meta")
        z = {"q": shared, "k": shared, "v": torch.randn(2, 3, 10)}
        for mask in (torch.ones(2, 3), None):
            nsc(z, task="t", mask=mask)
        assert [{x.device.type for x in call} for call in calls] == [{"meta"}, {"cpu"}] * 2

    def test_a_basis_is_copied_once_and_again_when_it_changes(self, monkeypatch):
        nsc = NSCLoss({"t": {"q": random_factors(2, 10, 1)[0]}})
        calls = self.spy(monkeypatch)
        z = torch.empty(3, 10, device="meta")

        def basis():
            nsc(z, task="t")
            return calls[-1][1]

        first = basis()
        assert basis() is first
        nsc.load_state_dict(nsc.state_dict())
        second = basis()
        assert second is not first and basis() is second
        assert nsc.double() and basis().dtype == torch.float64


def test_the_mask_is_looked_at_once():
    model = tiny_llama(blocks=3)
    batch = token_batch(2, 6, seed=0, padding=2)
    nsc = NSCLoss({"t": downs(model, linear_names(model, ("q_proj", "down_proj")))})
    z = module_inputs(model, nsc.modules_of["t"], batch)
    with Ops() as ops:
        nsc(z, task="t", mask=batch["attention_mask"])
    # What a GPU has to be waited for.
    assert len(z) == 6 and ops.seen["_local_scalar_dense"] == 1


class TestCheckpoints:
    @pytest.mark.parametrize("inner", [False, True])
    def test_reentrant_ones_are_refused(self, inner):
        model = tiny_llama(blocks=2)
        model.enable_input_require_grads()
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": True})
        model.train()
        nsc = NSCLoss({"t": downs(model, linear_names(model, ("v_proj",)))})
        batch = token_batch(1, 5, seed=0)
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            with nsc.watch(model, "t"):
                model(**batch)
        assert not any(m._forward_pre_hooks for n, m in model.named_modules() if "layers" in n or not n)
        # Nobody asks for gradients.
        with torch.no_grad() if not inner else nsc.watch(model, "t") as outer:
            with nsc.watch(model, "t") if not inner else torch.no_grad() as middle:
                model(**batch)
        seen = outer if inner else middle
        assert seen.loss.isfinite() and not seen.loss.requires_grad


def test_adapters_with_a_trained_head(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, vocab_size=60
    )
    model = get_peft_model(
        BertForSequenceClassification(config),
        LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path)
    read = NSCLoss.from_adapters({"default": tmp_path})
    live = NSCLoss.from_peft_model(model)
    assert read.modules_of == live.modules_of
    assert read.modules_of["default"] == ("bert.encoder.layer.0.attention.self.query",)
    z = torch.randn(3, 32)
    assert torch.equal(read(z, task="default"), live(z, task="default"))
