"""Bases that are large: never copied, offloaded, in half precision, quantised."""

import importlib.util
import json
import shutil
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from compare import error
from tiny import random_factors, token_batch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nsc_fast import merge_adapters
from nsc_fast.adapters import Adapter, LoraFactors
from nsc_fast.errors import MergeError, RecipeError
from nsc_fast.factors import canonical, stack
from nsc_fast.layers import MergedLinear
from nsc_fast.loading import load_base
from nsc_fast.memory import LiveBytes
from nsc_fast.merge import check_inputs, run_recipe
from nsc_fast.quantised import check_installed, keep_differentiable
from nsc_fast.recipe import BaseSpec, load_recipe, make_recipe
from nsc_fast.verify import verify_output


class Wide(nn.Module):
    """Layers that are large beside everything else."""

    def __init__(self, width=512):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x, attention_mask=None):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


def wide_adapter(name, model, rank=2, start=""):
    modules = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            down, up = random_factors(rank, layer.in_features, layer.out_features, torch.float32)
            modules[start + path] = LoraFactors(down, up, 1.0)
    return Adapter(name, "memory", "base", None, modules, {})


def test_a_merge_neither_copies_nor_moves_the_weights_of_the_base():
    model = Wide()
    adapters = {name: wide_adapter(name, model) for name in ("one", "two")}
    data = {name: [{"x": torch.randn(2, 4, 512), "attention_mask": torch.ones(2, 4)}] for name in adapters}
    before = {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()}
    layers = list(model.blocks)
    during = []

    def on_step(_):
        during.append({id(m.base): m.base.weight.data_ptr() for m in model.modules() if hasattr(m, "base")})

    with LiveBytes().ignore(model.parameters()) as live:
        merge_adapters(
            model,
            adapters,
            data,
            parameters={"steps": 2, "scope": {"layers": "all"}, "signal_rows": 0},
            on_step=on_step,
        )
    assert during == [{id(layer): layer.weight.data_ptr() for layer in layers}] * 2
    assert {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()} == before
    assert list(model.blocks) == layers
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert live.largest < 512 * 512 / 16  # no tensor of the size of a weight
    assert live.peak < weights / 5


class Packed(torch.Tensor):
    """A weight in 8 bits that only a linear layer may use, as torchao's are: wrapped in a tensor class."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    def dense(self):
        return self.values.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            z, weight, *bias = args
            return nn.functional.linear(z, weight.dense(), *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Packed(args[0].values, args[0].scale)
        raise NotImplementedError(f"a packed weight was used in {func}")


def packed_layer():
    layer = nn.Linear(64, 48)
    scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
    weight = Packed((layer.weight.detach() / scale).round().to(torch.int8), scale)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer, weight.dense()


def bitsandbytes_layer(bits):
    bnb = pytest.importorskip("bitsandbytes")
    dense = nn.Linear(64, 48)
    if bits == 4:
        layer = bnb.nn.Linear4bit(64, 48, compute_dtype=torch.float32, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    layer.load_state_dict(dense.state_dict())
    layer = layer.to("cpu")
    if bits == 4:
        return layer, bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    state = layer.weight.CB, layer.weight.SCB
    return layer, state[0].float() * state[1][:, None] / 127


def torchao_layer():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(64, 48)).requires_grad_(False)
    quantize_(model, Int8WeightOnlyConfig())
    return model[0], model[0].weight.dequantize()


# bitsandbytes imports torch's compiler, which takes ten seconds and more.
LAYERS = [
    pytest.param(packed_layer, id="packed"),
    pytest.param(torchao_layer, id="torchao-int8", marks=pytest.mark.slow),
    pytest.param(lambda: bitsandbytes_layer(4), id="bitsandbytes-4bit", marks=pytest.mark.slow),
    pytest.param(lambda: bitsandbytes_layer(8), id="bitsandbytes-8bit", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("ratio", [False, True])
def test_a_quantised_layer_merges_like_the_same_layer_dequantised(make, ratio):
    """Output and gradients to 1e-5 in float32. (8 bits on a GPU round activations too and differ more.)"""
    quantised, weight = make()
    plain = nn.Linear(64, 48).requires_grad_(False)
    plain.weight.copy_(weight)
    plain.bias.copy_(quantised.bias.detach())
    stacked = stack([(str(k), canonical(*random_factors(4, 64, 48))) for k in range(3)])
    z, g = torch.randn(6, 64), torch.randn(6, 48)
    found = []
    for layer in (quantised, plain):
        coefficients = nn.Parameter(torch.tensor([0.4, 0.3, -0.2]))
        merged = MergedLinear(layer, stacked, lambda c=coefficients: c)
        assert merged._plain == (layer is plain)
        if ratio:
            merged.monitor = _Own(torch.arange(6, dtype=torch.int32) % 3)
        own = z.clone().requires_grad_()
        y = merged(own)
        loss = (y * g).sum() + (merged.monitor.omega.sum() if ratio else 0)
        loss.backward()
        found.append((y.detach(), own.grad, coefficients.grad))
    for got, expected in zip(*found, strict=True):
        assert error(got, expected) <= 1e-5


class _Own:
    """A monitor that keeps the ratios in the graph."""

    active, recording, last = True, False, None

    def __init__(self, task):
        self.task = task

    def own_segment(self, name, z):
        return self.task

    def record(self, name, z, omega):
        self.omega = omega


@cache
def plain_result(workshop):
    return run_recipe(load_recipe(workshop / "recipe.yaml"))[0]


def recipe_on(workshop, **base):
    return load_recipe(workshop / "recipe.yaml", base_model={"path": str(workshop / "base"), **base})


def same_coefficients(got, expected, limit):
    for module, values in expected.coefficients.items():
        assert (got.coefficients[module].cpu() - values).abs().max() <= limit


OFFLOADED = {
    **dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"], "cpu"),
    **{f"model.layers.{i}": "disk" if i in (1, 3) else "cpu" for i in range(4)},
}


def test_a_base_that_lies_on_the_disk_merges_alike(workshop):
    result, model = run_recipe(recipe_on(workshop, device_map=OFFLOADED))
    layer = model.model.layers[3].self_attn.v_proj
    assert layer.weight.device.type == "meta" and hasattr(layer, "_hf_hook")
    same_coefficients(result, plain_result(workshop), 1e-6)


def test_a_dispatched_base_merges_alike(workshop):
    """Weights on the host that visit the device layer by layer."""
    accelerate = pytest.importorskip("accelerate")
    recipe = load_recipe(workshop / "recipe.yaml")
    model = AutoModelForCausalLM.from_pretrained(workshop / "base").eval()
    model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    from nsc_fast.data import read_data
    from nsc_fast.merge import read_adapters

    data, _ = read_data(recipe, recipe.base_model, "CAUSAL_LM")
    result = merge_adapters(model, read_adapters(recipe), data, parameters=recipe.method_parameters())
    same_coefficients(result, plain_result(workshop), 1e-6)
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_base_is_loaded_in_the_dtype_that_is_asked_for(workshop, dtype):
    model = load_base(
        BaseSpec(path=str(workshop / "base"), dtype=dtype, device_map={"": "cpu"}), (), task_type=None
    )
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    # One device: no hooks, which would keep merged layers off their fused path.
    assert not any(hasattr(m, "_hf_hook") for m in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("settings, limit", [({"load_in_4bit": True}, 0.05), ({"load_in_8bit": True}, 0.02)])
def test_a_base_that_is_quantised_while_it_is_loaded(tmp_path, settings, limit):
    """As wide as bitsandbytes' blocks, which it cannot cut on some CPUs."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=60,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    found = []
    for spec in (BaseSpec(path=str(tmp_path / "base"), **settings), BaseSpec(path=str(tmp_path / "base"))):
        model = load_base(spec, ["model.layers.0.self_attn.q_proj"], task_type="CAUSAL_LM")
        if not found:
            assert type(model.model.layers[0].mlp.up_proj).__name__ in ("Linear4bit", "Linear8bitLt")
            torch.manual_seed(2)
            adapters = {name: wide_adapter(name, model.model.layers, start="model.layers.") for name in "ab"}
        data = {name: [token_batch(2, 6, seed)] for seed, name in enumerate(adapters)}
        result = merge_adapters(model, adapters, data, parameters={"steps": 4, "learning_rate": 1e-2})
        result.save_pretrained(tmp_path / str(len(found)))
        checks = verify_output(tmp_path / str(len(found)), result.updates, model)
        assert all(check.passed for check in checks), checks
        found.append(result)
    # AdamW's first steps follow the gradient's sign, so the coefficients themselves say little.
    rough, exact = (result.history[0].loss for result in found)
    assert 0 < abs(rough - exact) <= limit * exact


def test_weights_that_no_gradient_goes_through_are_refused():
    """bitsandbytes packs 4-bit weights on some CPUs in a pass without gradients, and then there are none."""
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].support_avx512bf16_for_cpu = True
    keep_differentiable(model)
    assert not model[0].support_avx512bf16_for_cpu
    model[0].weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(MergeError, match="'0' are packed for inference"):
        keep_differentiable(model)


class TestWhatIsMissing:
    @pytest.fixture
    def nothing_installed(self, monkeypatch):
        find = importlib.util.find_spec
        hidden = ("bitsandbytes", "torchao")
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in hidden else find(n, *a))

    @pytest.mark.parametrize(
        "settings, package",
        [
            ({"load_in_4bit": True}, "load_in_4bit needs bitsandbytes"),
            ({"load_in_8bit": True, "quant_method": "torchao"}, "load_in_8bit needs torchao"),
        ],
    )
    def test_an_extra_is_named_before_anything_is_loaded(
        self, workshop, nothing_installed, settings, package
    ):
        with pytest.raises(MergeError, match=rf"{package}.*nsc-fast\[quantised\]"):
            check_inputs(recipe_on(workshop, **settings))

    def test_also_for_a_base_that_is_stored_quantised(self, workshop, nothing_installed, tmp_path):
        shutil.copytree(workshop / "base", tmp_path / "base")
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
        with pytest.raises(MergeError, match=r"quantised weights needs bitsandbytes.*nsc-fast\[quantised\]"):
            check_inputs(recipe_on(workshop, path=str(tmp_path / "base")))

    def test_nothing_is_asked_of_a_plain_base(self, workshop, nothing_installed):
        check_installed(BaseSpec(path=str(workshop / "base"), dtype="bfloat16"))

    @pytest.mark.parametrize(
        "settings, match",
        [
            ({"load_in_4bit": True, "load_in_8bit": True}, "choose one"),
            ({"quant_method": "torchao"}, "say load_in_4bit or load_in_8bit"),
            ({"quant_method": "torchao", "load_in_4bit": True}, "bitsandbytes does 4 bits"),
        ],
    )
    def test_settings_that_contradict_each_other(self, settings, match):
        content = {"adapters": [{"name": "a", "path": "a"}], "base_model": {"path": "b", **settings}}
        with pytest.raises(RecipeError, match=match):
            make_recipe(content, where="test")
