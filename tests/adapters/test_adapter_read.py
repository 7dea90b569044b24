"""Reading and inspecting folders: what comes out, and every refusal by name with a way out."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from adapter_files import PREFIX, plain_config, plain_tensors
from huggingface_hub import constants
from safetensors.torch import save_file

from nsc_fast.adapters import AdapterError, inspect_adapter, read_adapter

UP = f"{PREFIX}layers.0.up"
DOWN = f"{PREFIX}layers.1.down"


def test_reads_factors_scale_and_identity(make_adapter):
    folder = make_adapter()
    adapter = read_adapter(folder)
    assert adapter.name == "vqa"
    assert adapter.source == str(folder)
    assert adapter.base_model == "org/base"
    assert adapter.task_type is None
    assert adapter.config == plain_config()
    assert adapter.dtype == "float32"
    assert adapter.notices == ()
    assert adapter.heads == {}
    assert adapter.digest == hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert list(adapter.modules) == ["layers.0.down", "layers.0.up", "layers.1.down", "layers.1.up"]
    factors = adapter.modules["layers.0.up"]
    assert (factors.rank, factors.shape, factors.scaling) == (2, (10, 6), 2.0)
    torch.testing.assert_close(factors.down, plain_tensors()[f"{UP}.lora_A.weight"], rtol=0, atol=0)
    exact = 2.0 * factors.up.double() @ factors.down.double()
    torch.testing.assert_close(adapter.canonical()["layers.0.up"].dense(), exact, rtol=1e-12, atol=1e-12)


def test_names_come_from_the_path_or_the_user(make_adapter, tmp_path, monkeypatch):
    folder = make_adapter()
    assert read_adapter(str(folder) + os.sep).name == "vqa"
    assert read_adapter(folder, name="mine").name == "mine"
    nested = tmp_path / "outer"
    nested.mkdir()
    folder.rename(nested / "inner")
    assert read_adapter(nested, subfolder="inner").name == "inner"
    monkeypatch.chdir(nested / "inner")
    assert read_adapter(".").name == "inner"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay_as_stored(make_adapter, dtype):
    adapter = read_adapter(make_adapter(tensors={k: t.to(dtype) for k, t in plain_tensors().items()}))
    assert adapter.modules["layers.0.up"].down.dtype == dtype
    assert adapter.dtype == str(dtype).removeprefix("torch.")


def test_mixed_dtypes_are_told(make_adapter):
    key = f"{UP}.lora_A.weight"
    folder = make_adapter(tensors={key: plain_tensors()[key].half()})
    assert read_adapter(folder).dtype == "float16+float32"


@pytest.mark.parametrize(
    ("config", "tensors", "parts"),
    [
        ({"use_dora": True}, {}, ["use_dora = true", "DoRA", "plain LoRA"]),
        ({"new_field": 1}, {}, ["new_field = 1", "update nsc_fast"]),
        ({"r": 4}, {}, ["module 'layers.0.up'", "r = 4 in the config", "2 in the file"]),
        ({"rank_pattern": {"up": 1}}, {}, ["module 'layers.0.up'", "r = 1 in the config"]),
        ({"target_modules": ["up"]}, {}, ["module 'layers.0.down'", "belongs to these weights"]),
        ({"target_modules": ["up", "down", "gate"]}, {}, ["target_modules entry 'gate'", "complete weights"]),
        ({"exclude_modules": ["up"]}, {}, ["module 'layers.0.up'", "exclude_modules"]),
        ({"layers_to_transform": [0]}, {}, ["module 'layers.1.down'", "layers_to_transform"]),
        ({}, {f"{UP}.lora_A.weight": None}, [f"tensor '{UP}.lora_B.weight'", "without lora_A"]),
        ({}, {f"{UP}.lora_B.weight": None}, [f"tensor '{UP}.lora_A.weight'", "without lora_B"]),
        ({}, {f"{UP}.lora_A.weight": torch.zeros(0)}, [f"'{UP}.lora_A.weight'", "ZeRO-3", "gather"]),
        ({}, {f"{UP}.lora_A.weight": torch.zeros(12)}, [f"'{UP}.lora_A.weight'", "ZeRO-3", "gather"]),
        ({}, {f"{UP}.lora_A.weight": torch.zeros(2, 0)}, [f"'{UP}.lora_A.weight'", "ZeRO-3", "gather"]),
        ({}, {f"{UP}.lora_A.weight": torch.zeros(2, 3, 1, 1)}, [f"'{UP}.lora_A.weight'", "convolution"]),
        ({}, {f"{UP}.lora_A.weight": torch.zeros(2, 3, 1)}, [f"'{UP}.lora_A.weight'", "convolution"]),
        ({}, {f"{UP}.lora_A.weight": torch.zeros(3, 6)}, ["module 'layers.0.up'", "(3, 6)", "(10, 2)"]),
        ({}, {f"{UP}.lora_A.weight": torch.zeros(2, 6).char()}, [f"'{UP}.lora_A.weight'", "I8", "float16"]),
        ({}, {f"{UP}.lora_A.weight": torch.full((2, 6), torch.nan)}, [f"'{UP}.lora_A.weight'", "NaN"]),
        ({}, {f"{UP}.lora_B.weight": torch.full((10, 2), torch.inf)}, [f"'{UP}.lora_B.weight'", "infinite"]),
        ({}, {f"{UP}.lora_magnitude_vector": torch.ones(10)}, ["lora_magnitude_vector'", "DoRA"]),
        ({}, {f"{PREFIX}wte.lora_embedding_A": torch.ones(2, 5)}, ["wte.lora_embedding_A'", "embedding"]),
        ({}, {f"{UP}.lora_B.bias": torch.ones(10)}, ["lora_B.bias'", "lora_bias=False"]),
        ({}, {f"{UP}.lora_diag": torch.ones(2)}, ["lora_diag'", "KaSA"]),
        ({}, {f"{UP}.bias": torch.ones(10)}, ["layers.0.up.bias'", 'bias="none"']),
        (
            {},
            {f"{PREFIX}e.token_adapter.trainable_tokens_delta": torch.ones(1, 4)},
            ["trainable_tokens_delta'"],
        ),
        ({}, {f"{PREFIX}wte.weight": torch.ones(5, 4)}, ["wte.weight'", "save_embedding_layers=False"]),
        ({}, {f"{PREFIX}odd.thing": torch.ones(1)}, ["odd.thing'", "unknown tensor", "remove it"]),
        ({}, {"model.up.lora_A.weight": torch.ones(2, 6)}, ["'model.up.lora_A.weight'", "in front"]),
        ({}, {f"{UP}.lora_A.default.weight": torch.ones(2, 6)}, ["lora_A.default.weight'", "adapter name"]),
        ({}, dict.fromkeys(plain_tensors()), ["weights", "no LoRA factors"]),
        (
            {"ensure_weight_tying": True, "target_modules": ["up", "down", "lm_head"]},
            {
                f"{PREFIX}lm_head.lora_A.weight": torch.ones(2, 6),
                f"{PREFIX}lm_head.lora_B.weight": torch.ones(9, 2),
            },
            ["ensure_weight_tying = true", "'lm_head'", "ensure_weight_tying=False"],
        ),
    ],
)
def test_refusals_name_adapter_thing_and_way_out(make_adapter, assert_says, config, tensors, parts):
    folder = make_adapter(config=config, tensors=tensors)
    with pytest.raises(AdapterError) as error:
        read_adapter(folder)
    assert_says(error.value, "adapter 'vqa'", *parts)


def test_everything_is_refused_at_once_and_repetitions_are_counted(make_adapter):
    tensors = {f"{PREFIX}layers.{i}.up.lora_magnitude_vector": torch.ones(10) for i in range(5)}
    with pytest.raises(AdapterError) as error:
        read_adapter(make_adapter(config={"use_dora": True, "bias": "all"}, tensors=tensors))
    message = str(error.value)
    assert "3 problems" in message
    assert "use_dora" in message and "bias = " in message and "and 2 more" in message
    assert len(error.value.problems) == 7


def test_the_error_survives_pickling(make_adapter):
    with pytest.raises(AdapterError) as error:
        read_adapter(make_adapter(config={"use_dora": True}))
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


class TestModulesToSave:
    HEAD = {f"{PREFIX}head.weight": torch.ones(3, 6), f"{PREFIX}head.bias": torch.ones(3)}

    def test_error_is_the_default(self, make_adapter, assert_says):
        folder = make_adapter(config={"modules_to_save": ["head"]}, tensors=self.HEAD)
        with pytest.raises(AdapterError) as error:
            read_adapter(folder)
        assert_says(error.value, "adapter 'vqa'", "modules_to_save = head", "keep-separate", "drop")

    def test_drop_says_so(self, make_adapter):
        folder = make_adapter(config={"modules_to_save": ["head"]}, tensors=self.HEAD)
        adapter = read_adapter(folder, modules_to_save="drop")
        assert adapter.heads == {}
        assert any("2 tensors dropped" in notice for notice in adapter.notices)

    def test_keep_separate_hands_the_head_over(self, make_adapter):
        folder = make_adapter(config={"modules_to_save": ["head"]}, tensors=self.HEAD)
        heads = read_adapter(folder, modules_to_save="keep-separate").heads
        assert {key: tensor.shape for key, tensor in heads.items()} == {
            "head.weight": (3, 6),
            "head.bias": (3,),
        }

    def test_a_head_that_is_broken_is_refused(self, make_adapter, assert_says):
        head = self.HEAD | {f"{PREFIX}head.bias": torch.full((3,), torch.nan)}
        folder = make_adapter(config={"modules_to_save": ["head"]}, tensors=head)
        with pytest.raises(AdapterError) as error:
            read_adapter(folder, modules_to_save="keep-separate")
        assert_says(error.value, "adapter 'vqa'", "head.bias'", "NaN")

    def test_listed_and_absent(self, make_adapter, assert_says):
        folder = make_adapter(config={"modules_to_save": ["head"]})
        with pytest.raises(AdapterError) as error:
            read_adapter(folder, modules_to_save="keep-separate")
        assert_says(error.value, "modules_to_save = head", "no tensor of these modules", "drop")
        assert read_adapter(folder, modules_to_save="drop").heads == {}

    def test_a_head_that_the_task_implies_need_not_be_listed(self, make_adapter, assert_says):
        head = {f"{PREFIX}classifier.weight": torch.ones(3, 6)}
        folder = make_adapter(config={"task_type": "SEQ_CLS"}, tensors=head)
        with pytest.raises(AdapterError) as error:
            read_adapter(folder)
        assert_says(error.value, "modules_to_save = classifier", "keep-separate")
        assert list(read_adapter(folder, modules_to_save="keep-separate").heads) == ["classifier.weight"]

    def test_an_unknown_policy(self, make_adapter):
        with pytest.raises(ValueError, match="keep-separate"):
            read_adapter(make_adapter(), modules_to_save="average")


def test_run_time_buffers_are_left_out_with_a_notice(make_adapter):
    folder = make_adapter(
        config={"velora_config": {"num_groups": 2}, "monteclora_config": {"num_samples": 4}},
        tensors={
            f"{UP}.lora_velora_embed": torch.ones(2),
            f"{UP}.lora_monteclora_sampler.expert_weights": torch.ones(4),
        },
    )
    adapter = read_adapter(folder)
    assert len(adapter.modules) == 4
    assert [notice.split(":")[0] for notice in adapter.notices] == [
        "monteclora_config",
        "velora_config",
        "2 tensors of MonteCLoRA or VeLoRA are left out",
    ]


class TestFiles:
    def refused(self, path, **arguments) -> AdapterError:
        with pytest.raises(AdapterError) as error:
            read_adapter(path, **arguments)
        with pytest.raises(AdapterError):
            inspect_adapter(path, **arguments)
        return error.value

    @pytest.mark.parametrize("kind", [str, Path])
    def test_missing_folder(self, tmp_path, assert_says, kind):
        error = self.refused(kind(tmp_path / "gone"))
        assert_says(error, "adapter 'gone'", "does not exist", "check the path")

    def test_a_file_instead_of_a_folder(self, make_adapter, assert_says):
        error = self.refused(make_adapter() / "adapter_config.json")
        assert_says(error, "is a file", "give the folder")

    def test_missing_subfolder(self, make_adapter, assert_says):
        error = self.refused(make_adapter(), subfolder="gone")
        assert_says(error, "adapter 'gone'", "adapter_config.json", "subfolder")

    def test_missing_config(self, make_adapter, assert_says):
        folder = make_adapter()
        (folder / "adapter_config.json").unlink()
        assert_says(self.refused(folder), "adapter 'vqa'", "'adapter_config.json'", "save_pretrained")
        (folder / "config.json").write_text("{}")
        assert_says(self.refused(folder), "full model")

    def test_adapters_one_level_down_are_pointed_at(self, make_adapter, assert_says, tmp_path):
        make_adapter("first")
        make_adapter("second")
        assert_says(self.refused(tmp_path), "subfolder='first' or 'second'")

    def test_missing_weights(self, make_adapter, assert_says):
        folder = make_adapter()
        (folder / "adapter_model.safetensors").unlink()
        assert_says(self.refused(folder), "adapter 'vqa'", "'adapter_model.safetensors'", "complete adapter")

    def test_a_pickle_is_never_opened(self, make_adapter, assert_says, tmp_path):
        class Trap:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "sprung",))

        folder = make_adapter()
        (folder / "adapter_model.safetensors").unlink()
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
        error = self.refused(folder)
        assert_says(error, "adapter 'vqa'", "'adapter_model.bin'", "pickle", "safe_serialization=True")
        assert not (tmp_path / "sprung").exists()

    @pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"{'r': 1}"])
    def test_corrupt_config(self, make_adapter, assert_says, content):
        folder = make_adapter()
        (folder / "adapter_config.json").write_bytes(content)
        assert_says(self.refused(folder), "adapter 'vqa'", "'adapter_config.json'", "not valid JSON", "again")

    def test_config_that_is_no_object(self, make_adapter, assert_says):
        folder = make_adapter()
        (folder / "adapter_config.json").write_text("[1]")
        assert_says(self.refused(folder), "'adapter_config.json'", "object")

    @pytest.mark.parametrize("size", [0, 4, 100, -1])
    def test_truncated_weights(self, make_adapter, assert_says, size):
        file = make_adapter() / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:size])
        error = self.refused(file.parent)
        assert_says(error, "adapter 'vqa'", "'adapter_model.safetensors'", "truncated", "again")

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    def test_git_lfs_pointer(self, make_adapter, assert_says, name):
        folder = make_adapter()
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")
        assert_says(self.refused(folder), "adapter 'vqa'", repr(name), "git-lfs pointer", "git lfs pull")


class TestHub:
    """Against a cache written by hand: no request is made."""

    @pytest.fixture
    def cached(self, tmp_path, monkeypatch):
        snapshot = tmp_path / "hub/models--org--vqa-lora/snapshots/abc"
        (snapshot / "sub").mkdir(parents=True)
        refs = tmp_path / "hub/models--org--vqa-lora/refs"
        refs.mkdir()
        (refs / "main").write_text("abc")
        for folder in (snapshot, snapshot / "sub"):
            (folder / "adapter_config.json").write_text(json.dumps(plain_config()))
            save_file(plain_tensors(), folder / "adapter_model.safetensors")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        return snapshot

    def test_reads_from_the_cache(self, cached):
        adapter = read_adapter("org/vqa-lora", offline=True)
        assert (adapter.name, adapter.source, len(adapter.modules)) == ("vqa-lora", "org/vqa-lora", 4)
        adapter = read_adapter("org/vqa-lora", subfolder="sub", offline=True)
        assert (adapter.name, adapter.source) == ("sub", "org/vqa-lora/sub")

    def test_not_in_the_cache(self, cached, assert_says):
        with pytest.raises(AdapterError) as error:
            read_adapter("org/other", offline=True)
        assert_says(error.value, "adapter 'other'", "'org/other'", "no such folder", "hf download")

    def test_weights_not_in_the_cache(self, cached, assert_says):
        (cached / "adapter_model.safetensors").unlink()
        with pytest.raises(AdapterError) as error:
            read_adapter("org/vqa-lora", offline=True)
        assert_says(error.value, "adapter 'vqa-lora'", "'adapter_model.safetensors'")

    def test_a_path_object_is_no_hub_id(self, cached, assert_says):
        with pytest.raises(AdapterError) as error:
            read_adapter(Path("org/vqa-lora"), offline=True)
        assert_says(error.value, "does not exist")


class TestInspect:
    def test_tells_what_the_file_holds(self, make_adapter):
        folder = make_adapter(
            config={"alpha_pattern": {"down": 3}, "revision": "v1", "task_type": "CAUSAL_LM"}
        )
        found = inspect_adapter(folder)
        assert found.name == "vqa"
        assert (found.base_model, found.revision, found.task_type) == ("org/base", "v1", "CAUSAL_LM")
        assert (found.ranks, found.scales, found.targets) == ((2,), (1.5, 2.0), ("down", "up"))
        assert (found.modules, found.parameters, found.dtype) == (4, 4 * 32, "float32")
        assert found.digest == read_adapter(folder).digest
        assert (found.problems, found.notices) == ((), ())

    def test_lists_all_problems_and_still_tells_the_rest(self, make_adapter):
        folder = make_adapter(
            config={"use_dora": True, "bias": "all"},
            tensors={f"{UP}.lora_magnitude_vector": torch.ones(10), f"{DOWN}.lora_B.weight": None},
        )
        found = inspect_adapter(folder)
        assert [problem.subject for problem in found.problems] == [
            'bias = "all"',
            "use_dora = true",
            f"tensor '{UP}.lora_magnitude_vector'",
            f"tensor '{DOWN}.lora_A.weight'",
        ]
        assert (found.modules, found.ranks, found.scales) == (3, (2,), ())

    def test_loads_no_weight(self, make_adapter):
        folder = make_adapter(tensors={f"{UP}.lora_A.weight": torch.full((2, 6), torch.nan)})
        assert inspect_adapter(folder).problems == ()
