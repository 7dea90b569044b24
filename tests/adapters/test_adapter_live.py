"""Adapters of a live PeftModel: the same as from the folder, and judged the same way."""

import pytest
import torch
from adapter_files import Mlp, build, with_lora

from nsc_fast.adapters import AdapterError, from_peft_model, read_adapter

peft = pytest.importorskip("peft")

CONFIG = {"r": 2, "lora_alpha": 6, "target_modules": ["up", "down"]}


@pytest.fixture
def model():
    return with_lora("mlp", **CONFIG)


def refused(*arguments, **keywords) -> AdapterError:
    with pytest.raises(AdapterError) as error:
        from_peft_model(*arguments, **keywords)
    return error.value


def test_equals_the_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    stored, live = read_adapter(tmp_path / "a"), from_peft_model(model)["default"]
    assert list(live.modules) == list(stored.modules)
    for path, factors in live.modules.items():
        assert torch.equal(factors.down, stored.modules[path].down)
        assert torch.equal(factors.up, stored.modules[path].up)
        assert factors.scaling == stored.modules[path].scaling
    assert (live.name, live.source, live.dtype, live.notices) == ("default", "live model", "float32", ())
    assert set(live.config["target_modules"]) == {"up", "down"}


def test_the_factors_are_copies(model):
    adapter = from_peft_model(model)["default"]
    before = adapter.modules["layers.0.up"].down.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(adapter.modules["layers.0.up"].down, before)
    assert not adapter.modules["layers.0.up"].down.requires_grad


def test_several_adapters_are_kept_apart(model):
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=3, target_modules=["head"]))
    adapters = from_peft_model(model)
    assert {name: sorted(a.modules) for name, a in adapters.items()} == {
        "default": ["layers.0.down", "layers.0.up", "layers.1.down", "layers.1.up"],
        "second": ["head"],
    }
    assert list(from_peft_model(model, "second")) == ["second"]
    assert adapters["default"].digest != adapters["second"].digest
    assert adapters["default"].digest == from_peft_model(model, "default")["default"].digest


def test_a_transformers_model_with_add_adapter():
    model = build("llama")
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    adapter = from_peft_model(model)["default"]
    assert "model.layers.0.self_attn.q_proj" in adapter.modules


def test_a_changed_scale_is_used_and_told(model):
    model.base_model.model.layers[0]["up"].set_scale("default", 2.0)
    adapter = from_peft_model(model)["default"]
    assert adapter.modules["layers.0.up"].scaling == 6.0
    assert adapter.modules["layers.1.up"].scaling == 3.0
    assert any("1 modules (layers.0.up" in notice for notice in adapter.notices)


def test_heads():
    model = with_lora("mlp", modules_to_save=["head"], **CONFIG)
    heads = from_peft_model(model, modules_to_save="keep-separate")["default"].heads
    assert {key: tensor.shape for key, tensor in heads.items()} == {"head.weight": (3, 6), "head.bias": (3,)}


def test_no_adapters(assert_says):
    assert_says(refused(Mlp()), "live model", "Mlp", "no peft_config", "PeftModel itself")


def test_unknown_name(model, assert_says):
    assert_says(refused(model, "third"), "adapter 'third'", "not in the model", "'default'")


def test_merged_into_the_base(model, assert_says):
    model.merge_adapter()
    assert_says(refused(model), "adapter 'default'", "module 'layers.0.up'", "unmerge_adapter()")


def test_meta_device(assert_says):
    with torch.device("meta"):
        model = peft.get_peft_model(Mlp(), peft.LoraConfig(**CONFIG))
    assert_says(refused(model), "adapter 'default'", "meta device", "load the weights")


def test_values_that_are_not_finite(model, assert_says):
    with torch.no_grad():
        model.base_model.model.layers[0]["up"].lora_A["default"].weight[0, 0] = torch.nan
    assert_says(refused(model), "adapter 'default'", "layers.0.up.lora_A.weight'", "NaN")
