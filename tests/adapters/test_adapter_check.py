"""Adapters against each other and against the base."""

import dataclasses
import json

import pytest
import torch
from adapter_files import Mlp, build, with_lora
from safetensors.torch import save_file
from torch import nn

from nsc_fast.adapters import (
    AdapterError,
    check_against_model,
    common_base,
    common_task_type,
    folder_shapes,
    module_shapes,
    read_adapter,
)


@pytest.fixture
def adapter(make_adapter):
    return read_adapter(make_adapter())


def based_on(adapter, base, name="vqa", revision=None):
    config = adapter.config | {"revision": revision}
    return dataclasses.replace(adapter, base_model=base, name=name, config=config)


class TestCommonBase:
    def test_equal_but_for_a_slash(self, adapter):
        assert common_base([based_on(adapter, "org/base"), based_on(adapter, "org/base/")]) == "org/base"

    def test_two_paths_to_one_folder(self, adapter, tmp_path, monkeypatch):
        (tmp_path / "base").mkdir()
        monkeypatch.chdir(tmp_path)
        pair = [based_on(adapter, "base"), based_on(adapter, str(tmp_path / "x/../base"))]
        (tmp_path / "x").mkdir()
        assert common_base(pair) == "base"

    def test_different_bases(self, adapter, assert_says):
        pair = [based_on(adapter, "org/base"), based_on(adapter, "org/other", name="ocr")]
        with pytest.raises(AdapterError) as error:
            common_base(pair)
        assert_says(error.value, "'vqa' and 'ocr'", "'org/base' and 'org/other'", "--base-model")
        assert common_base(pair, "org/base") == "org/base"

    def test_a_local_copy_is_not_taken_for_the_hub_model(self, adapter, tmp_path):
        (tmp_path / "base").mkdir()
        with pytest.raises(AdapterError):
            common_base([based_on(adapter, "org/base"), based_on(adapter, str(tmp_path / "base"))])

    def test_different_revisions(self, adapter, assert_says):
        pair = [based_on(adapter, "org/base", revision="v1"), based_on(adapter, "org/base", name="ocr")]
        with pytest.raises(AdapterError) as error:
            common_base(pair)
        assert_says(error.value, "'vqa' and 'ocr'", "revision", "'v1' and 'main'", "--base-model")
        assert common_base([based_on(adapter, "org/base", revision="main"), based_on(adapter, "org/base")])

    def test_no_name(self, adapter, assert_says):
        with pytest.raises(AdapterError) as error:
            common_base([based_on(adapter, None, name="ocr")])
        assert_says(error.value, "adapter 'ocr'", "names no base", "--base-model")
        with pytest.raises(AdapterError):
            common_base([])


def test_common_task_type(adapter):
    causal = dataclasses.replace(adapter, task_type="CAUSAL_LM")
    assert common_task_type([causal, causal]) == "CAUSAL_LM"
    assert common_task_type([causal, adapter]) is None


class TestModuleShapes:
    def test_linears_and_others(self, mlp):
        shapes = module_shapes(mlp)
        assert shapes["layers.0.up"] == (10, 6)
        assert shapes["layers.0.norm"] is None
        assert shapes["layers"] is None

    def test_conv1d_is_transposed(self):
        shapes = module_shapes(build("gpt2"))
        assert shapes["transformer.h.0.attn.c_attn"] == (36, 12)
        assert shapes["transformer.wte"] is None

    def test_wrapped_layers_keep_their_names(self):
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(Mlp(), peft.LoraConfig(target_modules=["up"])).get_base_model()
        assert module_shapes(wrapped) == module_shapes(Mlp())

    def test_the_projection_inside_multihead_attention_is_never_called(self):
        assert module_shapes(nn.MultiheadAttention(4, 2))["out_proj"] is None


class TestFolderShapes:
    @pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
    def test_agrees_with_the_live_model(self, tmp_path, kind):
        model = build(kind)
        model.save_pretrained(tmp_path)
        live = {name: shape for name, shape in module_shapes(model).items() if shape}
        tied = {"lm_head"} if kind == "gpt2" else set()  # not in the checkpoint
        found = folder_shapes(tmp_path, list(live))
        # A checkpoint cannot tell an embedding from a linear layer; nobody adapts one as such.
        assert {name: found[name] for name in live.keys() - tied} == {
            name: shape for name, shape in live.items() if name not in tied
        }

    def test_shards(self, tmp_path):
        build("llama").save_pretrained(tmp_path, max_shard_size="8KB")
        files = sorted(tmp_path.glob("model-*.safetensors"))
        assert len(files) > 1
        path = "model.layers.2.mlp.down_proj"
        assert folder_shapes(tmp_path, [path])[path] == (12, 20)
        files[0].unlink()
        with pytest.raises(AdapterError, match="in the index and not in the folder.*Way out"):
            folder_shapes(tmp_path, [path])

    @pytest.mark.parametrize(
        ("stored", "adapted"),
        [("bert.encoder.query", "encoder.query"), ("encoder.query", "bert.encoder.query")],
    )
    def test_a_prefix_more_or_less(self, tmp_path, stored, adapted):
        save_file({f"{stored}.weight": torch.zeros(3, 4)}, tmp_path / "model.safetensors")
        assert folder_shapes(tmp_path, [adapted])[adapted] == (3, 4)

    def test_refusals(self, tmp_path, assert_says):
        def refused(*parts):
            with pytest.raises(AdapterError) as error:
                folder_shapes(tmp_path, ["up"])
            assert_says(error.value, f"base model {str(tmp_path)!r}", *parts)

        refused("no safetensors files", "folder of the base model")
        (tmp_path / "model.safetensors").write_bytes(b"no")
        refused("'model.safetensors'", "cannot be read", "again")
        save_file({"up.weight": torch.zeros(3, 4, dtype=torch.uint8)}, tmp_path / "model.safetensors")
        refused("'up.weight'", "quantised (U8)", "loaded model")
        (tmp_path / "config.json").write_text("{")
        refused("'config.json'", "not valid JSON")

    def test_an_adapter_file_beside_the_base_is_not_the_base(self, tmp_path):
        save_file({"up.weight": torch.zeros(3, 4)}, tmp_path / "model.safetensors")
        save_file({"x.lora_A.weight": torch.zeros(3, 4)}, tmp_path / "adapter_model.safetensors")
        assert folder_shapes(tmp_path, ["up"]) == {"up": (3, 4)}


class TestCheckAgainstModel:
    def refused(self, adapter, base) -> AdapterError:
        with pytest.raises(AdapterError) as error:
            check_against_model([adapter], base)
        return error.value

    def test_fits(self, adapter, mlp):
        assert check_against_model([adapter], mlp) == ()
        assert check_against_model([adapter], module_shapes(mlp)) == ()

    def test_fits_the_folder(self, tmp_path):
        pytest.importorskip("peft")
        model = with_lora("gpt2", r=2, target_modules=["c_attn", "c_proj"])
        model.save_pretrained(tmp_path / "adapter")
        build("gpt2").save_pretrained(tmp_path / "base")
        adapter = read_adapter(tmp_path / "adapter")
        assert check_against_model([adapter], folder_shapes(tmp_path / "base", adapter.modules)) == ()

    def test_missing_module_names_the_nearest(self, adapter, mlp, assert_says):
        renamed = dataclasses.replace(adapter, modules={"layer.0.up": adapter.modules["layers.0.up"]})
        error = self.refused(renamed, mlp)
        assert_says(
            error, "adapter 'vqa'", "module 'layer.0.up'", "(10, 6)", "no such module", "'layers.0.up'"
        )

    def test_all_missing_modules_are_found(self, adapter):
        assert len(self.refused(adapter, nn.Sequential(nn.Linear(2, 2))).problems) == 4

    def test_not_linear(self, adapter, mlp, assert_says):
        moved = dataclasses.replace(adapter, modules={"layers.0.norm": adapter.modules["layers.0.up"]})
        assert_says(
            self.refused(moved, mlp), "module 'layers.0.norm'", "not a linear layer", "target_modules"
        )

    def test_other_shape(self, adapter, assert_says):
        base = Mlp()
        base.layers[1]["down"] = nn.Linear(10, 7)
        error = self.refused(adapter, base)
        assert_says(error, "adapter 'vqa'", "module 'layers.1.down'", "(6, 10)", "(7, 10)", "base model")

    def test_selected_modules_without_factors_are_told(self, make_adapter, mlp):
        folder = make_adapter()
        config = json.loads((folder / "adapter_config.json").read_text())
        config["target_modules"] = r"layers\.0\.(up|down)|layers\.1\.(up|down)|head"
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (notice,) = check_against_model([read_adapter(folder)], mlp)
        assert "adapter 'vqa'" in notice and "1 more modules" in notice and "head" in notice
