"""The full model: what is written is the base plus the update, and nothing is written otherwise."""

import json
import shutil

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import run
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GteConfig,
    GteModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from nsc_fast import read_adapter
from nsc_fast.adapters import AdapterError, write_lora
from nsc_fast.apply import apply_lora
from nsc_fast.cli import REFUSED
from nsc_fast.errors import MergeError
from nsc_fast.factors import canonical
from nsc_fast.memory import LiveBytes
from nsc_fast.recipe import BaseSpec
from nsc_fast.verify import verify_full_model


def adapter_of(model, folder, modules, **settings):
    """A folder with a random LoRA on ``modules``, as PEFT writes it."""
    peft = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=modules, **settings))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
        if "modules_to_save" in name:
            parameter.data.add_(0.01 * torch.randn_like(parameter))
    peft.save_pretrained(folder, save_embedding_layers=False)
    return folder


class RealBytes(LiveBytes):
    """Without the model on the meta device, which has no memory."""

    def _add(self, tensor):
        if tensor.device.type != "meta":
            super()._add(tensor)


def stored(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def base_of(folder):
    return BaseSpec(path=str(folder))


class TestWhatIsWritten:
    def test_it_is_the_base_plus_the_update_in_shards_that_transformers_loads(self, workshop, tmp_path):
        base = base_of(workshop / "base")
        report = apply_lora(workshop / "a1", tmp_path / "full", base=base, shard_size="50KB")
        files = sorted(f.name for f in (tmp_path / "full").glob("model-*.safetensors"))
        assert files == sorted(report.files) and len(files) == 4
        index = json.loads((tmp_path / "full" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == report.size
        before, after = stored(workshop / "base"), stored(tmp_path / "full")
        assert set(before) == set(after) == set(index["weight_map"])
        adapter = read_adapter(workshop / "a1")
        for name, weight in before.items():
            factors = adapter.modules.get(name.removesuffix(".weight"))
            change = 0 if factors is None else factors.scaling * (factors.up.double() @ factors.down.double())
            assert (after[name] - (weight.double() + change)).abs().max() <= 1e-7
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "full" / file, framework="pt") as opened:
                assert name in opened.keys() and opened.metadata() == {"format": "pt"}
        check = verify_full_model(tmp_path / "full", workshop / "a1", base)
        assert check.passed and check.limit == 1e-5 and report.total_rounding == 0
        ids = AutoTokenizer.from_pretrained(tmp_path / "full")("w1 w2").input_ids
        assert ids == AutoTokenizer.from_pretrained(workshop / "base")("w1 w2").input_ids
        assert (tmp_path / "full" / "generation_config.json").is_file()

    def test_the_check_sees_another_model(self, workshop, tmp_path):
        apply_lora(workshop / "a1", tmp_path / "full", base=base_of(workshop / "base"))
        assert not verify_full_model(tmp_path / "full", workshop / "a0", base_of(workshop / "base")).passed

    def test_the_weights_of_conv1d_are_transposed(self, tmp_path):
        tiny.tiny_gpt2(torch.float32).save_pretrained(tmp_path / "base")
        lora = adapter_of(
            tiny.tiny_gpt2(torch.float32), tmp_path / "lora", ["c_attn", "c_fc"], fan_in_fan_out=True
        )
        apply_lora(lora, tmp_path / "full", base=base_of(tmp_path / "base"))
        assert verify_full_model(tmp_path / "full", lora, base_of(tmp_path / "base")).passed

    def test_modules_that_were_trained_whole_replace_those_of_the_base(self, tmp_path):
        tiny.tiny_llama(torch.float32).save_pretrained(tmp_path / "base")
        lora = adapter_of(
            tiny.tiny_llama(torch.float32),
            tmp_path / "lora",
            ["q_proj"],
            modules_to_save=["model.norm", "lm_head"],
        )
        report = apply_lora(lora, tmp_path / "full", base=base_of(tmp_path / "base"))
        assert set(report.replaced) == {"model.norm.weight", "lm_head.weight"}
        assert verify_full_model(tmp_path / "full", lora, base_of(tmp_path / "base")).passed

    def test_names_that_transformers_changes_at_load_stay_those_of_the_file(self, tmp_path):
        model = tiny.tiny_llama(torch.float32)
        model.model.save_pretrained(tmp_path / "base")
        lora = adapter_of(model, tmp_path / "lora", ["q_proj"], task_type="CAUSAL_LM")
        apply_lora(lora, tmp_path / "full", base=base_of(tmp_path / "base"))
        before, after = stored(tmp_path / "base"), stored(tmp_path / "full")
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {f"layers.{i}.self_attn.q_proj.weight" for i in range(4)}

    def test_only_one_tensor_and_its_successor_are_in_memory(self, workshop, tmp_path):
        with RealBytes() as live:
            report = apply_lora(workshop / "a1", tmp_path / "full", base=base_of(workshop / "base"))
        largest = max(t.numel() * t.element_size() for t in stored(workshop / "base").values())
        factors = sum(
            2 * (f.up.numel() + f.down.numel()) * 4 for f in read_adapter(workshop / "a1").modules.values()
        )
        assert live.peak <= factors + 4 * largest < report.size


@pytest.fixture(scope="module")
def half_base(tmp_path_factory):
    """bfloat16 weights of standard deviation 0.02."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bf16")
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=60,
        initializer_range=0.02,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


class TestRounding:
    @pytest.mark.parametrize("size, low, high", [(1e-2, 0.14, 0.20), (1e-3, 0.72, 0.86)])
    def test_what_bfloat16_takes_from_a_small_update_is_told(self, half_base, tmp_path, size, low, high):
        name = "model.layers.0.self_attn.q_proj"
        weight = stored(half_base)[f"{name}.weight"].double()
        a, b = torch.randn(16, 256, dtype=torch.float64), torch.randn(256, 16, dtype=torch.float64)
        b *= size * weight.norm() / (b @ a).norm()
        write_lora(tmp_path / "lora", {name: canonical(a, b)}, base_model=str(half_base))
        report = apply_lora(tmp_path / "lora", tmp_path / "full")
        after = stored(tmp_path / "full")[f"{name}.weight"]
        assert after.dtype == torch.bfloat16
        expected = (after.double() - weight - b @ a).norm() / (b @ a).norm()
        assert low < report.rounding[name] < high
        assert abs(report.rounding[name] - expected) <= 1e-4 * expected and report.total_rounding < high
        wide = apply_lora(tmp_path / "lora", tmp_path / "wide", dtype=torch.float32)
        assert wide.total_rounding == 0
        kept = stored(tmp_path / "wide")[f"{name}.weight"].double() - weight
        assert (kept - b @ a).norm() <= 1e-3 * (b @ a).norm()

    def test_another_dtype_stands_in_the_config_too(self, half_base, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(half_base)
        lora = adapter_of(model, tmp_path / "lora", ["q_proj"])
        apply_lora(lora, tmp_path / "full", base=base_of(half_base), dtype=torch.float16)
        assert {t.dtype for t in stored(tmp_path / "full").values()} == {torch.float16}
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype="auto").dtype == torch.float16


class TestRefused:
    """With a message that names it, and nothing written."""

    def refuse(self, lora, base, out, match, error=MergeError, **options):
        with pytest.raises(error, match=match):
            apply_lora(lora, out, base=base_of(base), **options)
        assert not [path for path in out.parent.iterdir() if out.name in path.name]

    def test_a_tied_weight(self, tmp_path):
        tiny.tiny_gpt2(torch.float32).save_pretrained(tmp_path / "base")
        lora = adapter_of(tiny.tiny_gpt2(torch.float32), tmp_path / "lora", ["lm_head"])
        self.refuse(lora, tmp_path / "base", tmp_path / "full", "lm_head.weight and transformer.wte.weight")

    def test_a_weight_that_the_files_hold_in_another_form(self, tmp_path):
        config = GteConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        )
        GteModel(config).save_pretrained(tmp_path / "base")
        assert any("qkv_proj" in name for name in stored(tmp_path / "base"))
        fused = adapter_of(GteModel(config), tmp_path / "fused", ["v_proj"])
        match = "layers.0.self_attn.v_proj.*not in the files"
        self.refuse(fused, tmp_path / "base", tmp_path / "full", match)
        single = adapter_of(GteModel(config), tmp_path / "single", ["down_proj"])
        apply_lora(single, tmp_path / "full", base=base_of(tmp_path / "base"))
        assert verify_full_model(tmp_path / "full", single, base_of(tmp_path / "base")).passed

    def test_a_quantised_base(self, workshop, tmp_path):
        shutil.copytree(workshop / "base", tmp_path / "base")
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
        match = "is quantised .bitsandbytes.*quantised from"
        self.refuse(workshop / "a0", tmp_path / "base", tmp_path / "full", match)

    def test_a_base_of_pickles(self, workshop, tmp_path):
        shutil.copytree(workshop / "base", tmp_path / "base")
        (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "pytorch_model.bin")
        self.refuse(workshop / "a0", tmp_path / "base", tmp_path / "full", "save_pretrained")

    def test_a_damaged_file(self, workshop, tmp_path):
        shutil.copytree(workshop / "base", tmp_path / "base")
        file = tmp_path / "base" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        self.refuse(workshop / "a0", tmp_path / "base", tmp_path / "full", "missing or damaged")

    def test_values_that_the_dtype_cannot_hold(self, workshop, tmp_path):
        shutil.copytree(workshop / "base", tmp_path / "base")
        weights = stored(workshop / "base")
        weights["model.norm.weight"] = weights["model.norm.weight"] + 1e5
        save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
        options = {"dtype": torch.float16}
        match = "model.norm.weight: values do not fit"
        self.refuse(workshop / "a0", tmp_path / "base", tmp_path / "full", match, **options)

    def test_too_little_space(self, workshop, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        self.refuse(workshop / "a0", workshop / "base", tmp_path / "full", "10 KB free")

    def test_an_adapter_of_another_base(self, workshop, tmp_path):
        tiny.tiny_llama(torch.float32, blocks=2).save_pretrained(tmp_path / "base")
        self.refuse(workshop / "a0", tmp_path / "base", tmp_path / "full", "layers.2")

    def test_a_hub_id_that_is_not_here(self, workshop, tmp_path):
        with pytest.raises(MergeError, match="org/nothing"):
            apply_lora(workshop / "a0", tmp_path / "full", base=BaseSpec(path="org/nothing"))

    def test_a_folder_with_something_else_in_it(self, workshop, tmp_path):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.txt").write_text("")
        for overwrite in (False, True):
            with pytest.raises(AdapterError, match="not empty|config.json"):
                apply_lora(
                    workshop / "a0", tmp_path / "full", base=base_of(workshop / "base"), overwrite=overwrite
                )
        assert [f.name for f in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_the_program_applies_what_it_merged(workshop, tmp_path):
    out, full = tmp_path / "out", tmp_path / "full"
    run("merge", workshop / "recipe.yaml", out, "--set", "steps=1", "--device", "cpu", "--no-verify")
    arguments = ("apply", out, "--base-model", workshop / "base", "--out", full)
    code, output = run(*arguments, "--shard-size", "60KB", "--verify")
    assert code == 0 and "28 modules updated" in output and "ok full model" in output
    assert run(*arguments)[0] == REFUSED
    code, output = run(*arguments, "--overwrite", "--dtype", "bfloat16", "--verify")
    assert code == 0 and "ok full model" in output and "off by" in output
    assert json.loads((full / "nsc_fast" / "apply.json").read_text())["total_rounding"] > 0
