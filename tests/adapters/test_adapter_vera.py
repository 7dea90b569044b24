"""VeRA folders: PEFT's own layers are the oracle."""

import json

import pytest
import torch
from adapter_files import build
from safetensors.torch import load_file, save_file

from nsc_fast import merge_adapters
from nsc_fast.adapters import AdapterError, fit_to_model, inspect_adapter, read_adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# Layers of several shapes: in 12, out 12, 6, 20; in 20, out 12.
TARGETS = {
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "bert": ["query", "output.dense"],
    "gpt2": ["c_attn", "c_fc"],
}


@pytest.fixture
def make_vera(tmp_path):
    def make(kind="llama", name="vera", **config):
        model = build(kind)
        settings = {"r": 5, "target_modules": TARGETS[kind], "d_initial": 0.3} | config
        model = peft.get_peft_model(model, peft.VeraConfig(**settings)).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "vera_lambda" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / name)
        return model, tmp_path / name

    return make


def change(folder, **tensors):
    file = folder / "adapter_model.safetensors"
    content = {**load_file(file), **tensors}
    save_file({key: t for key, t in content.items() if t is not None}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", list(TARGETS))
def test_every_update_is_that_of_peft(make_vera, kind):
    model, folder = make_vera(kind, fan_in_fan_out=kind == "gpt2")
    adapter = fit_to_model(read_adapter(folder), build(kind))
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert set(adapter.modules) == set(layers) and adapter.config["peft_type"] == "VERA"
    for path, layer in layers.items():
        delta = layer.get_delta_weight("default").double()
        delta = delta.T if kind == "gpt2" else delta
        factors = adapter.modules[path]
        assert factors.scaling == 1.0 and factors.down.dtype == torch.float64
        torch.testing.assert_close(adapter.canonical()[path].dense(), delta, rtol=1e-5, atol=1e-6)


def test_a_merge_of_vera_and_lora_is_the_sum(make_vera, tmp_path):
    _, one = make_vera()
    lora = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    base = build("llama")
    result = merge_adapters(
        base, {"v": one, "l": tmp_path / "lora"}, method="task_arithmetic", base_name="org/base"
    )
    parts = fit_to_model(read_adapter(one), base).canonical()
    down = "model.layers.0.mlp.down_proj"
    torch.testing.assert_close(result.updates[down].dense(), 0.3 * parts[down].dense())
    assert result.updates[down].shape == (12, 20)


def test_without_the_base_its_layers_are_not_known(make_vera, assert_says):
    _, folder = make_vera()
    with pytest.raises(AdapterError) as error:
        merge_adapters(None, {"v": folder}, method="uniform")
    assert_says(error.value, "adapter 'v'", "VERA", "base model", "save_as_lora")


def test_inspection_tells_rank_and_scale(make_vera):
    found = inspect_adapter(make_vera()[1])
    assert (found.ranks, found.scales, found.problems, found.modules) == ((5,), (1.0,), (), 12)


def test_projections_that_were_not_saved_are_refused(make_vera, assert_says):
    _, folder = make_vera(save_projection=False)
    for read in (read_adapter, inspect_adapter):
        with pytest.raises(AdapterError) as error:
            read(folder)
        assert_says(error.value, "adapter 'vera'", "base_model.vera_A", "save_projection")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"base_model.vera_A": torch.ones(4, 20)}, "do not fit vera_A (4, 20)"),
        ({"base_model.vera_B": torch.ones(8, 5)}, "is longer than vera_B (8, 5) is tall"),
        (
            {"base_model.model.model.layers.1.mlp.up_proj.vera_lambda_d": None},
            "vera_lambda_b without vera_lambda_d",
        ),
        ({"base_model.model.model.layers.1.mlp.up_proj.vera_lambda_d": torch.full((5,), torch.nan)}, "NaN"),
    ],
)
def test_vectors_and_projections_that_do_not_fit_are_refused(make_vera, assert_says, tensors, message):
    _, folder = make_vera()
    change(folder, **tensors)
    with pytest.raises(AdapterError) as error:
        read_adapter(folder)
    assert_says(error.value, "adapter 'vera'", message)


@pytest.mark.parametrize(
    ("field", "value"), [("bias", "vera_only"), ("use_dora", True), ("novel", 1), ("r", 4)]
)
def test_fields_are_judged_as_those_of_lora(make_vera, assert_says, field, value):
    _, folder = make_vera()
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(AdapterError) as error:
        read_adapter(folder)
    assert_says(error.value, "adapter 'vera'", field)
