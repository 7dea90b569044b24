"""Models of no common architecture, mixtures of experts, and tasks whose inputs differ."""

import pytest
import torch
from architecture_checks import (
    RANKS,
    check_gradients,
    check_reload,
    eager,
    leaves,
    merged_weights,
    second_step,
    train,
    with_weights,
)
from architecture_rows import ROWS, image_in_text, seen, text
from torch import nn

from nsc_fast import merge_adapters
from nsc_fast.adapters import AdapterError, read_adapter
from nsc_fast.batches import join
from nsc_fast.batches import token_batch as one_task
from nsc_fast.decoder_inputs import completed
from nsc_fast.driver import target_modules
from nsc_fast.errors import MergeError
from nsc_fast.loading import load_base
from nsc_fast.monitor import TokenBatch
from nsc_fast.parameters import NSCParameters
from nsc_fast.recipe import BaseSpec
from nsc_fast.targets import routed, tokens_of

peft = pytest.importorskip("peft")


class Experts(nn.Module):
    """Four experts of linear layers; each token goes to one of them, and none ever to the last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 3, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"w1": nn.Linear(width, 7), "w2": nn.Linear(7, width)}) for _ in range(4)
        )

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weight, choice = self.gate(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            chosen = tokens[choice == i]
            y = expert["w2"](torch.tanh(expert["w1"](chosen)))
            out = out.index_put((torch.where(choice == i)[0],), y * weight[choice == i, None])
        return out.view_as(x)


class Mixture(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.words = nn.Embedding(60, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mix": nn.Linear(width, width), "moe": Experts(width)}) for _ in range(2)
        )

    def forward(self, input_ids, attention_mask=None):
        x = self.words(input_ids)
        for layer in self.layers:
            x = x + torch.tanh(layer["mix"](x.cumsum(1)))
            x = x + layer["moe"](x)
        return x


class Odd(nn.Module):
    """No config, no blocks, inputs of its own; two layers that are not called in the order of their names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.zeta = nn.Linear(5, 6, bias=False)
        self.alpha = nn.ModuleDict({"second": nn.Linear(6, 3)})

    def forward(self, signal, gain):
        return self.alpha["second"](torch.tanh(self.zeta(signal)) * gain)


def check(model, fresh, adapted, batches, masks, parameters, folder, targets):
    """Gradients, a merge and its reload, as for the common architectures."""
    paths = train(model, adapted, folder)
    adapters = {task: read_adapter(path, name=task) for task, path in paths.items()}
    updates = {task: adapter.canonical() for task, adapter in adapters.items()}
    found = target_modules(model, updates, NSCParameters(**parameters))
    assert list(found) == targets
    modules = dict.fromkeys(m for adapter in adapters.values() for m in adapter.modules)
    expected = {m: {t: v for t, v in own.items() if m in updates[t]} for m, own in leaves(modules).items()}
    loss = eager(model, merged_weights(model, adapters, expected), adapters, batches, found, masks)
    loss.backward()
    value, coefficients = second_step(model, updates, batches, found)
    assert value == pytest.approx(loss.item(), rel=1e-9)
    check_gradients(coefficients, expected)
    how = {"steps": 2, "learning_rate": 0.1, "granularity": "module", **parameters}
    data = {task: [batch] for task, batch in batches.items()}
    result = merge_adapters(model, paths, data, parameters=how, base_name="odd")
    result.save_pretrained(folder / "out", dtype=torch.float64)
    table = {m: dict(zip(result.stack_tasks[m], c, strict=True)) for m, c in result.coefficients.items()}
    merged = with_weights(model, merged_weights(model, adapters, table))
    for batch in batches.values():
        check_reload(fresh(), folder / "out", merged, model, batch)
    return result


def test_experts_are_merged_but_do_not_enter_the_loss(tmp_path):
    result = check(
        Mixture().double(),
        lambda: Mixture().double(),
        ["mix", "w1", "w2"],
        {task: text(i) for i, task in enumerate(RANKS)},
        lambda module: "attention_mask",
        {},
        tmp_path,
        ["layers.1.mix"],
    )
    assert len(result.updates) == 2 * (1 + 4 * 2)
    # Nobody came to the last expert, so its coefficients stay where they began.
    assert (result.coefficients["layers.0.moe.experts.3.w1"] == 0.4).all()
    assert (result.coefficients["layers.0.moe.experts.0.w1"] != 0.4).any()
    assert any("16 modules inside the experts of a mixture (layers.0.moe." in n for n in result.notices)


def test_experts_alone_give_no_null_space_ratio(tmp_path):
    model = Mixture().double()
    paths = train(model, ["w1"], tmp_path)
    data = {task: [text(i)] for i, task in enumerate(RANKS)}
    with pytest.raises(
        ValueError, match="the only modules to look at are experts .*'layers.0.moe.experts.0.w1'"
    ):
        merge_adapters(model, paths, data, base_name="moe")
    assert len(merge_adapters(model, paths, method="ties", base_name="moe").updates) == 8


def test_fused_experts_are_refused_with_the_reason(tmp_path):
    model = ROWS["mixtral"].build()
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    peft.get_peft_model(model, lora).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="target_parameters.*fused experts.*train on target_modules"):
        read_adapter(tmp_path)


def test_a_model_that_nobody_thought_of(tmp_path):
    torch.manual_seed(0)
    batches = {
        task: {"signal": torch.randn(3, 4, 5).double(), "gain": torch.rand(3, 1, 1).double()}
        for task in RANKS
    }
    scope = {"scope": {"layers": "all"}}
    targets = ["zeta", "alpha.second"]
    model = Odd().double()
    check(
        model, lambda: Odd().double(), ["zeta", "second"], batches, lambda m: None, scope, tmp_path, targets
    )
    data = {task: [batch] for task, batch in batches.items()}
    with pytest.raises(ValueError, match="stand in no numbered blocks; use layers='all'"):
        merge_adapters(model, {t: tmp_path / t for t in RANKS}, data, base_name="odd")


def test_one_task_with_images_and_one_without(tmp_path):
    """The text, first, does not reach the vision tower; the pass with images must not stop there."""
    row = ROWS["llava"]
    adapted = {"a": r".*language_model.*\.(q_proj|v_proj)", "b": ["q_proj", "v_proj"]}
    check(
        row.build(),
        row.build,
        adapted,
        {"a": text(1), "b": image_in_text(2)},
        seen,
        {},
        tmp_path,
        [
            *(f"model.vision_tower.encoder.layers.3.self_attn.{name}" for name in ("v_proj", "q_proj")),
            *(f"model.language_model.layers.1.self_attn.{name}" for name in ("q_proj", "v_proj")),
        ],
    )


class TestDecoders:
    @pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
    def test_a_batch_without_decoder_inputs_gets_the_first_token(self, name, tmp_path):
        row = ROWS[name]
        model = row.build()
        batch = {key: value for key, value in row.inputs(1).items() if not key.startswith("decoder_")}
        start = model.generation_config.decoder_start_token_id
        full = completed(model, {"a": [batch]})["a"][0]
        assert full["decoder_input_ids"].tolist() == [[start], [start]]
        paths = train(model, row.adapted, tmp_path)
        how = {"steps": 1, "signal_rows": 0}
        result = merge_adapters(model, paths, {t: [batch] for t in RANKS}, parameters=how, base_name=name)
        assert 0 < result.history[0].loss < 1

    def test_other_sources_are_read_again_each_round(self):
        class Source:
            def __iter__(self):
                return iter([text(1)])

        data = completed(ROWS["t5"].build(), {"a": Source(), "b": iter([text(2)])})
        assert all("decoder_input_ids" in next(iter(data["a"])) for _ in range(2))
        assert "decoder_input_ids" in data["b"][0]

    def test_a_config_that_names_no_first_token(self):
        model = ROWS["t5"].build()
        model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = None
        with pytest.raises(
            MergeError, match="task 'a': T5ForConditionalGeneration .* no decoder_start_token_id"
        ):
            completed(model, {"a": [text(1)]})

    def test_models_that_need_nothing_keep_their_data(self):
        data = {"a": [text(1)]}
        assert completed(ROWS["llama"].build(), data) is data and completed(None, data) is data


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", "input"),
        ("model.decoder.layers.3.self_attn.k_proj", "decoder"),
        ("model.decoder.layers.3.encoder_attn.q_proj", "decoder"),
        ("model.decoder.layers.3.encoder_attn.k_proj", "encoder"),
        ("decoder.block.1.layer.1.EncDecAttention.v", "encoder"),
        ("decoder.bert.encoder.layer.0.crossattention.self.key", "encoder"),
        ("decoder.bert.encoder.layer.0.attention.self.key", "decoder"),
        ("encoder.block.1.layer.0.SelfAttention.v", "input"),
        ("model.vision_tower.encoder.layers.1.self_attn.q_proj", "other"),
        ("model.visual.blocks.1.attn.qkv", "other"),
        ("model.multi_modal_projector.linear_1", "other"),
        ("model.audio_tower.layers.0.fc1", "other"),
    ],
)
def test_whose_tokens_a_module_receives(module, kind):
    assert tokens_of(module) == kind


def test_experts_are_known_by_their_place():
    paths = ["layers.1.mlp.experts.12.up_proj", "layers.1.mlp.shared_expert.up_proj", "experts.up"]
    assert routed(paths) == (paths[0],)


class TestTokens:
    task = torch.tensor([5, 7])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])

    def test_patches_have_no_text_mask_even_where_their_number_is_the_texts(self):
        tokens = TokenBatch(self.task, self.mask)
        assert tokens.tokens(torch.Size((2, 4)), "visual.blocks.0.qkv")[1].sum() == 8
        assert tokens.tokens(torch.Size((2, 4)), "layers.0.qkv")[1].sum() == 4

    def test_patches_in_one_list_are_known_to_be_of_one_task_only(self):
        batch = {"input_ids": torch.ones(2, 4), "pixel_values": torch.ones(48, 3)}
        task, weight = one_task(batch, 3, torch.device("cpu")).tokens(torch.Size((48,)), "visual.patch")
        assert task.tolist() == [3] * 48 and weight.tolist() == [1.0] * 48
        with pytest.raises(ValueError, match="module 'visual.patch' .* leave the module out"):
            TokenBatch(self.task, self.mask).tokens(torch.Size((48,)), "visual.patch")
        assert join({0: batch, 1: batch}) is None

    def test_sound_is_masked_by_the_first_frame_of_a_token(self):
        tokens = TokenBatch(self.task, self.mask, frames=True)
        assert tokens.tokens(torch.Size((2, 2)), "encoder.layers.0.fc1")[1].tolist() == [1, 1, 1, 0]

    def test_only_text_is_padded(self):
        """Three channels, and texts of three and of five tokens."""
        short, long = ({**text(i, n), "pixel_values": torch.ones(2, 3, 8, 8)} for i, n in enumerate((3, 5)))
        inputs, tokens = join({0: short, 1: long})
        assert inputs["pixel_values"].shape == (4, 3, 8, 8) and inputs["input_ids"].shape == (4, 5)
        assert tokens.task.tolist() == [0, 0, 1, 1] and not tokens.one_task


class TestLoading:
    @pytest.mark.parametrize("name", ["llava", "whisper", "clip", "modernbert", "dinov2"])
    def test_the_class_that_was_saved_is_found(self, name, tmp_path):
        row = ROWS[name]
        model = row.build(torch.float32)
        model.save_pretrained(tmp_path)
        modules = [n for n, m in model.named_modules() if n.endswith(tuple(f".{x}" for x in row.adapted))]
        loaded = load_base(BaseSpec(path=str(tmp_path)), modules, task_type=None)
        assert type(loaded).__name__ == row.model
        with torch.no_grad():
            inputs = {k: v.float() if v.is_floating_point() else v for k, v in row.inputs(1).items()}
            got, wanted = loaded(**inputs).to_tuple()[0], model(**inputs).to_tuple()[0]
        torch.testing.assert_close(got, wanted)

    def test_the_classes_that_were_tried_are_named(self, tmp_path):
        ROWS["vit"].build(torch.float32).save_pretrained(tmp_path)
        with pytest.raises(
            MergeError, match="no module 'nowhere'.*tried AutoModel, ViTForImageClassification"
        ):
            load_base(BaseSpec(path=str(tmp_path)), ["nowhere"], task_type=None)


@pytest.mark.parametrize("method", ["anchored", "closed_form", "auto"])
def test_experts_in_merges_by_agreement(tmp_path, method):
    model = Mixture().double()
    paths = train(model, ["mix", "w1", "w2"], tmp_path)
    data = {task: [text(2 * i + k) for k in range(4)] for i, task in enumerate(RANKS)}
    how = {
        "anchored": {"steps": 3},
        "closed_form": {},
        "auto": {"scales": (0.2, 0.5), "data_free": ("iso_c",), "anchored_steps": 3, "margin": 10.0},
    }
    result = merge_adapters(model, paths, data, method=method, parameters=how[method], base_name="moe")
    assert len(result.updates) == 2 * (1 + 4 * 2)
    if method == "closed_form":
        # Nobody came to the last expert: it is merged with the coefficients that the ridge pulls to.
        own = [read_adapter(path, name=task).canonical() for task, path in paths.items()]
        name = "layers.0.moe.experts.3.w1"
        torch.testing.assert_close(result.updates[name].dense(), 0.4 * sum(u[name].dense() for u in own))
