"""The writer: layout, suffixes, truncation, and all or nothing on disk."""

import json
import os
import shutil

import pytest
import torch
from adapter_files import Mlp, build
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from nsc_fast.adapters import AdapterError, module_shapes, read_adapter, write_lora
from nsc_fast.adapters.targets import choose_targets
from nsc_fast.factors import LowRankUpdate, canonical

FILES = ["adapter_config.json", "adapter_model.safetensors"]


def update(d_out: int, d_in: int, rank: int, scale: float = 1.0, seed: int = 0) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, d_in, generator=generator)
    return canonical(down, torch.randn(d_out, rank, generator=generator), scale)


@pytest.fixture
def updates():
    return {"layers.0.up": update(10, 6, 3), "layers.1.down": update(6, 10, 2, seed=1)}


def write(out, updates, **arguments):
    return write_lora(out, updates, **({"base_model": "org/base"} | arguments))


def tensors_of(folder):
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


class TestLayout:
    def test_uniform_rank_and_alpha(self, tmp_path, updates):
        report = write(tmp_path / "out", updates, base_shapes=module_shapes(Mlp()), revision="v1")
        config = json.loads((tmp_path / "out/adapter_config.json").read_text())
        assert list(config) == sorted(config)
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)
        assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "v1")
        assert config["target_modules"] == ["down", "up"]
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
        tensors = tensors_of(tmp_path / "out")
        for layer in (0, 1):
            for name, d_out, d_in in (("up", 10, 6), ("down", 6, 10)):
                path = f"base_model.model.layers.{layer}.{name}"
                assert tensors.pop(f"{path}.lora_A.weight").shape == (3, d_in)
                assert tensors.pop(f"{path}.lora_B.weight").shape == (d_out, 3)
        assert not tensors
        assert report.zero_modules == ("layers.0.down", "layers.1.up")
        assert (report.rank, report.parameters) == (3, 4 * 3 * 16)
        assert report.total_kept_energy == 1.0
        assert report.kept_energy == {"layers.0.up": 1.0, "layers.1.down": 1.0}
        assert sorted(os.listdir(tmp_path / "out")) == FILES

    def test_only_uses_fields_that_peft_knows(self, tmp_path, updates):
        peft = pytest.importorskip("peft")
        write(tmp_path / "out", updates)
        config = json.loads((tmp_path / "out/adapter_config.json").read_text())
        assert set(config) <= set(peft.LoraConfig().to_dict())
        assert config["peft_version"] == peft.__version__

    def test_without_the_base_full_paths_are_targets(self, tmp_path, updates):
        report = write(tmp_path / "out", updates)
        assert report.target_modules == ("layers.0.up", "layers.1.down")
        assert report.zero_modules == ()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_dtype(self, tmp_path, updates, dtype):
        write(tmp_path / "out", updates, dtype=dtype)
        assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {dtype}
        found = read_adapter(tmp_path / "out").canonical()["layers.0.up"].dense()
        error = (found - updates["layers.0.up"].dense()).norm() / found.norm()
        assert error < 8 * torch.finfo(dtype).eps

    def test_the_singular_values_are_split_evenly(self, tmp_path, updates):
        write(tmp_path / "out", updates, dtype=torch.float64)
        factors = read_adapter(tmp_path / "out").modules["layers.0.up"]
        roots = updates["layers.0.up"].singular_values.sqrt()
        torch.testing.assert_close(factors.down.norm(dim=1), roots)
        torch.testing.assert_close(factors.up.norm(dim=0), roots)

    def test_extra_files(self, tmp_path, updates):
        extra = {"README.md": "# Größe\n", "nsc_fast/coefficients.json": b"{}"}
        write(tmp_path / "out", updates, extra_files=extra)
        assert (tmp_path / "out/README.md").read_text(encoding="utf-8") == "# Größe\n"
        assert (tmp_path / "out/nsc_fast/coefficients.json").read_bytes() == b"{}"
        assert sorted(os.listdir(tmp_path / "out")) == ["README.md", *FILES, "nsc_fast"]


class TestRank:
    def test_truncation_keeps_the_largest_and_reports(self, tmp_path, updates):
        report = write(tmp_path / "out", updates, max_rank=2)
        energy = updates["layers.0.up"].singular_values.square()
        kept = float(energy[:2].sum() / energy.sum())
        assert report.rank == 2
        assert report.kept_energy["layers.0.up"] == pytest.approx(kept)
        assert report.kept_energy["layers.1.down"] == 1.0
        other = updates["layers.1.down"].energy
        total = (kept * float(energy.sum()) + other) / (float(energy.sum()) + other)
        assert report.total_kept_energy == pytest.approx(total)
        best, _ = updates["layers.0.up"].truncate(2)
        found = read_adapter(tmp_path / "out").canonical()["layers.0.up"].dense()
        torch.testing.assert_close(found, best.dense(), rtol=1e-5, atol=1e-5)

    def test_max_rank_above_the_rank_changes_nothing(self, tmp_path, updates):
        report = write(tmp_path / "out", updates, max_rank=99)
        assert (report.rank, report.total_kept_energy) == (3, 1.0)

    @pytest.mark.parametrize(("d_out", "d_in"), [(2, 9), (9, 2), (1, 1)])
    def test_more_rank_than_the_layer_has(self, tmp_path, d_out, d_in):
        small = update(d_out, d_in, 5)
        report = write(tmp_path / "out", {"small": small, "large": update(9, 9, 6)})
        assert report.rank == 6
        found = read_adapter(tmp_path / "out").canonical()["small"].dense()
        torch.testing.assert_close(found, small.dense(), rtol=1e-5, atol=1e-6)

    def test_all_zero_is_still_an_adapter(self, tmp_path):
        nothing = {"a": canonical(torch.zeros(2, 4), torch.zeros(3, 2)), "b": update(3, 4, 2, scale=0.0)}
        report = write(tmp_path / "out", nothing, max_rank=1)
        assert (report.rank, report.total_kept_energy) == (1, 1.0)
        assert read_adapter(tmp_path / "out").canonical()["a"].energy == 0.0
        assert all(not tensor.any() for tensor in tensors_of(tmp_path / "out").values())

    def test_directions_that_are_zero_take_no_space(self, tmp_path):
        down, up = torch.randn(2, 9).double(), torch.randn(8, 2).double()
        twice = canonical(torch.cat([down, torch.randn(2, 9)]), torch.cat([up, torch.zeros(8, 2)], dim=1))
        assert twice.rank == 4
        assert write(tmp_path / "out", {"a": twice}).rank == 2


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [
            ({"max_rank": 0}, ["max_rank = 0", "1 or more"]),
            ({"dtype": torch.int8}, ["dtype = torch.int8", "torch.bfloat16"]),
            ({"updates": {}}, ["updates", "at least one adapter"]),
            ({"base_shapes": {"layers.0.up": (10, 6)}}, ["'layers.1.down'", "missing module", "was merged"]),
            (
                {"base_shapes": {"layers.0.up": (10, 6), "layers.1.down": (6, 11)}},
                ["'layers.1.down'", "(6, 10)", "(6, 11)"],
            ),
            ({"base_shapes": {"layers.0.up": None, "layers.1.down": (6, 10)}}, ["'layers.0.up'", "None"]),
            ({"updates": {"a": update(3, 4, 2).scaled(torch.nan)}}, ["module 'a'", "NaN", "coefficients"]),
            (
                {"updates": {"a": update(3, 4, 2, scale=1e12)}, "dtype": torch.float16},
                ["module 'a'", "range of torch.float16", "bfloat16"],
            ),
            ({"extra_files": {"../x": ""}}, ["'../x'", "outside", "relative path"]),
            ({"extra_files": {"/x": ""}}, ["'/x'", "outside"]),
            ({"extra_files": {"a\\b": ""}}, ["outside"]),
            ({"extra_files": {"": ""}}, ["outside"]),
            ({"extra_files": {"./adapter_config.json": ""}}, ["adapter_config.json'", "leave it out"]),
        ],
    )
    def test_named_and_nothing_written(self, tmp_path, updates, assert_says, arguments, parts):
        arguments = {"updates": updates} | arguments
        with pytest.raises(AdapterError) as error:
            write(tmp_path / "deep/er/out", **arguments)
        assert_says(error.value, "output ", *parts)
        assert os.listdir(tmp_path) == []

    def test_an_update_that_is_not_finite(self, tmp_path, updates, assert_says):
        updates["layers.0.up"].columns[0, 0] = torch.inf
        with pytest.raises(AdapterError) as error:
            write(tmp_path / "out", updates)
        assert_says(error.value, "output ", "'layers.0.up'", "infinite")
        assert os.listdir(tmp_path) == []


class TestReplacing:
    def test_an_empty_folder_is_used(self, tmp_path, updates):
        (tmp_path / "out").mkdir()
        write(tmp_path / "out", updates)
        assert sorted(os.listdir(tmp_path / "out")) == FILES

    def test_existing_content_is_kept(self, tmp_path, updates, assert_says):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.tex").write_text("x")
        with pytest.raises(AdapterError) as error:
            write(tmp_path / "out", updates)
        assert_says(error.value, "output ", "not empty", "--overwrite")
        with pytest.raises(AdapterError) as error:
            write(tmp_path / "out", updates, overwrite=True)
        assert_says(error.value, "output ", "no adapter", "empty it yourself")
        assert (tmp_path / "out/thesis.tex").read_text() == "x"

    def test_a_file_is_kept(self, tmp_path, updates, assert_says):
        (tmp_path / "out").write_text("x")
        with pytest.raises(AdapterError) as error:
            write(tmp_path / "out", updates, overwrite=True)
        assert_says(error.value, "output ", "not a folder", "another")
        assert (tmp_path / "out").read_text() == "x"

    def test_overwrite_replaces_the_whole_folder(self, tmp_path, updates):
        write(tmp_path / "out", updates, extra_files={"old.txt": "old"})
        write(tmp_path / "out", updates, max_rank=1, overwrite=True)
        assert sorted(os.listdir(tmp_path / "out")) == FILES
        assert read_adapter(tmp_path / "out").config["r"] == 1
        assert os.listdir(tmp_path) == ["out"]

    def test_a_link_stays_a_link(self, tmp_path, updates):
        write(tmp_path / "real", updates)
        (tmp_path / "link").symlink_to(tmp_path / "real")
        write(tmp_path / "link", updates, max_rank=1, overwrite=True)
        assert (tmp_path / "link").is_symlink()
        assert read_adapter(tmp_path / "real").config["r"] == 1

    def test_the_folder_has_ordinary_permissions(self, tmp_path, updates):
        write(tmp_path / "out", updates)
        (tmp_path / "plain").mkdir()
        assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode

    @pytest.mark.parametrize("interruption", [OSError("disk full"), KeyboardInterrupt()])
    def test_a_failure_leaves_nothing_behind(self, tmp_path, updates, monkeypatch, interruption):
        def fail(*_, **__):
            raise interruption

        monkeypatch.setattr("nsc_fast.adapters.write.save_file", fail)
        with pytest.raises(type(interruption)):
            write(tmp_path / "deep/er/out", updates)
        assert os.listdir(tmp_path) == []

    def test_a_late_failure_leaves_nothing_behind(self, tmp_path, updates):
        with pytest.raises(OSError):  # a file and a folder of one name
            write(tmp_path / "out", updates, extra_files={"a": "", "a/b": ""})
        assert os.listdir(tmp_path) == []

    def test_a_failure_keeps_the_old_output(self, tmp_path, updates, monkeypatch):
        write(tmp_path / "out", updates)
        before = read_adapter(tmp_path / "out").digest
        rename = type(tmp_path).rename

        def fail_for_the_new(self, target):
            if "adapter_config.json" in os.listdir(self) and target.name == "out" and ".old" not in self.name:
                raise OSError("no")
            return rename(self, target)

        monkeypatch.setattr(type(tmp_path), "rename", fail_for_the_new)
        with pytest.raises(OSError, match="no"):
            write(tmp_path / "out", updates, max_rank=1, overwrite=True)
        assert os.listdir(tmp_path) == ["out"]
        assert read_adapter(tmp_path / "out").digest == before

    def test_somebody_else_was_faster(self, tmp_path, updates, monkeypatch):
        from nsc_fast.adapters import write as module

        save = module.save_file

        def save_slowly(*arguments, **keywords):
            save(*arguments, **keywords)
            shutil.copytree(tmp_path, tmp_path / "out", ignore=lambda *_: [])

        monkeypatch.setattr(module, "save_file", save_slowly)
        with pytest.raises(AdapterError, match="not empty"):
            write(tmp_path / "out", updates)
        assert os.listdir(tmp_path) == ["out"]


class TestSuffixes:
    @pytest.mark.parametrize(
        ("kind", "adapted", "expected"),
        [
            ("llama", ["self_attn.v_proj"], ["v_proj"]),
            ("llama", ["self_attn.v_proj", "mlp.down_proj"], ["down_proj", "v_proj"]),
            ("bert", ["attention.self.query"], ["query"]),
            ("bert", ["attention.output.dense"], ["attention.output.dense"]),
            ("bert", ["intermediate.dense"], ["intermediate.dense"]),
            ("bert", ["attention.output.dense", "output.dense"], ["output.dense"]),
            (
                "bert",
                ["attention.output.dense", "output.dense", "intermediate.dense"],
                ["intermediate.dense", "output.dense"],
            ),
            (
                "bert",
                ["attention.self.query", "attention.self.key"],
                ["key", "query"],
            ),
            ("gpt2", ["attn.c_proj"], ["attn.c_proj"]),
            ("gpt2", ["attn.c_proj", "mlp.c_proj"], ["c_proj"]),
        ],
    )
    def test_shortest_that_selects_nothing_else(self, kind, adapted, expected):
        shapes = module_shapes(build(kind))
        kinds = {
            f"{layer}.{i}.{name}" for name in adapted for i in range(3) for layer in ("layers", "layer", "h")
        }
        names = [name for name in shapes if any(name.endswith(kind) for kind in kinds)]
        assert choose_targets(names, shapes) == expected
        # Some layers only: the same suffixes, further layers of these kinds come along.
        assert choose_targets([name for name in names if ".1." in name], shapes) == expected

    def test_another_kind_is_avoided_by_layer_numbers(self):
        shapes = module_shapes(build("bert"))
        names = [f"encoder.layer.{i}.output.dense" for i in range(2)]
        assert choose_targets(names, shapes) == ["0.output.dense", "1.output.dense"]

    def test_another_tower_is_avoided_by_full_paths(self):
        language = [f"language_model.layers.{i}.self_attn.q_proj" for i in range(2)]
        vision = [f"vision_tower.layers.{i}.self_attn.q_proj" for i in range(2)]
        shapes = dict.fromkeys(language + vision, (4, 4))
        assert choose_targets(language, shapes) == language

    def test_modules_that_are_not_linear_are_never_selected(self):
        shapes = {"patch_embed.proj": None, "blocks.0.proj": (4, 4), "blocks.1.proj": (4, 4)}
        assert choose_targets(["blocks.0.proj"], shapes) == ["0.proj"]
        with pytest.raises(AdapterError, match="module 'proj'.*Way out"):
            choose_targets(["proj"], {"proj": (4, 4), "embed.proj": None})

    def test_top_level_modules(self):
        assert choose_targets(["head"], module_shapes(Mlp())) == ["head"]

    NAMES = st.lists(st.sampled_from(["a", "b", "dense", "0", "1"]), min_size=1, max_size=4).map(".".join)

    @settings(max_examples=300, derandomize=True, deadline=None)
    @given(shapes=st.dictionaries(NAMES, st.sampled_from([(2, 2), None]), min_size=1), data=st.data())
    def test_selects_all_adapted_and_no_module_that_is_not_linear(self, shapes, data):
        linear = sorted(name for name, shape in shapes.items() if shape)
        adapted = data.draw(st.lists(st.sampled_from(linear), min_size=1, unique=True)) if linear else []
        try:
            targets = choose_targets(adapted, shapes)
        except AdapterError:
            blocked = [n for n in adapted if any(o.endswith(f".{n}") and not shapes[o] for o in shapes)]
            assert blocked, "refused although full paths would have done"
            return
        selected = {n for n in shapes if any(n == t or n.endswith(f".{t}") for t in targets)}
        assert selected.issuperset(adapted)
        assert all(shapes[name] for name in selected)
