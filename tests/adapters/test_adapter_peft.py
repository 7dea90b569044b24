"""PEFT as the oracle: single updates equal its own, and what we write means the same to it."""

import warnings

import pytest
import torch
from adapter_files import build, output_of, with_lora
from safetensors.torch import load_file

from nsc_fast.adapters import from_peft_model, inspect_adapter, module_shapes, read_adapter, write_lora
from nsc_fast.factors import stack

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")

CASES = {
    "plain": ("mlp", {"r": 3, "lora_alpha": 3, "target_modules": ["up", "down"]}),
    "alpha": ("mlp", {"r": 3, "lora_alpha": 7, "target_modules": ["up", "head"]}),
    "rslora": ("mlp", {"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": ["up"]}),
    "wide": ("mlp", {"r": 16, "lora_alpha": 8, "target_modules": ["up", "down"]}),
    "patterns": (
        "bert",
        {
            "r": 3,
            "lora_alpha": 7,
            "use_rslora": True,
            "target_modules": ["query", "value", "output.dense"],
            "rank_pattern": {
                r".*attention\.output\.dense": 2,
                "output.dense": 5,
                "layer.1.attention.self.query": 1,
            },
            "alpha_pattern": {"output.dense": 11, r"layer\.0\..*query": 1},
        },
    ),
    "regex": (
        "bert",
        {"r": 2, "lora_alpha": 5, "target_modules": r".*layer\.1\..*(query|intermediate\.dense)"},
    ),
    "all-linear": ("llama", {"r": 2, "lora_alpha": 5, "target_modules": "all-linear"}),
    "layers": (
        "llama",
        {"r": 2, "lora_alpha": 5, "target_modules": ["v_proj", "down_proj"], "layers_to_transform": [1, 2]},
    ),
    "head": ("llama", {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "lm_head"]}),
    "conv1d": (
        "gpt2",
        {"r": 2, "lora_alpha": 5, "fan_in_fan_out": True, "target_modules": ["c_attn", "mlp.c_proj"]},
    ),
    "conv1d, rslora": (
        "gpt2",
        {"r": 4, "lora_alpha": 5, "use_rslora": True, "target_modules": ["c_attn", "c_fc"]},
    ),
    "default targets": ("gpt2", {"r": 2, "lora_alpha": 5}),
}


@pytest.fixture(params=list(CASES))
def case(request):
    kind, config = CASES[request.param]
    return kind, with_lora(kind, **config)


def saved(model, folder, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **({"save_embedding_layers": False} | arguments))
    return folder


def test_the_embedding_that_peft_saves_beside_an_adapted_head(tmp_path):
    kind, config = CASES["head"]
    folder = saved(with_lora(kind, **config), tmp_path / "a", save_embedding_layers="auto")
    with pytest.raises(ValueError, match="lm_head.base_layer.weight.*modules_to_save=drop"):
        read_adapter(folder)
    adapter = read_adapter(folder, modules_to_save="drop")
    assert "lm_head" in adapter.modules
    assert any("lm_head.base_layer.weight" in notice for notice in adapter.notices)


def peft_deltas(model):
    """PEFT's own update of every module as (d_out, d_in)."""
    deltas = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach()
            transposed = type(module.get_base_layer()).__name__ == "Conv1D"
            deltas[name.removeprefix("base_model.model.")] = delta.T if transposed else delta
    return deltas


def test_updates_equal_those_of_peft(case, tmp_path):
    _, model = case
    expected = peft_deltas(model)
    for adapter in (read_adapter(saved(model, tmp_path / "a")), from_peft_model(model)["default"]):
        assert set(adapter.modules) == set(expected)
        for path, factors in adapter.modules.items():
            update = factors.scaling * factors.up @ factors.down
            torch.testing.assert_close(update, expected[path], rtol=1e-5, atol=1e-6)
    assert inspect_adapter(tmp_path / "a").problems == ()


def test_written_folder_gives_the_same_outputs_and_reads_back(case, tmp_path):
    kind, model = case
    expected = output_of(kind, model)
    updates = read_adapter(saved(model, tmp_path / "a")).canonical()
    base = build(kind)
    assert (output_of(kind, base) - expected).abs().max() > 1e-3, "the adapter does nothing"
    report = write_lora(tmp_path / "b", updates, base_model="org/base", base_shapes=module_shapes(base))

    with warnings.catch_warnings():
        # PEFT tells of missing keys by a warning only.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "b").eval()
    torch.testing.assert_close(output_of(kind, loaded), expected, rtol=1e-5, atol=1e-5)

    again = read_adapter(tmp_path / "b")
    assert again.notices == ()
    assert set(again.modules) == set(updates) | set(report.zero_modules)
    for path, update in again.canonical().items():
        dense = updates[path].dense() if path in updates else torch.zeros(update.shape, dtype=torch.float64)
        torch.testing.assert_close(update.dense(), dense, rtol=1e-5, atol=1e-6)


def test_one_merged_adapter_gives_the_sum_of_several(tmp_path):
    config = {"lora_alpha": 6, "target_modules": ["query", "value"]}
    first = with_lora("bert", seed=1, r=2, **config)
    second = with_lora("bert", seed=2, r=3, use_rslora=True, **config)
    deltas = [peft_deltas(first), peft_deltas(second)]
    one = read_adapter(saved(first, tmp_path / "one")).canonical()
    two = read_adapter(saved(second, tmp_path / "two")).canonical()
    merged = {
        path: stack([("one", one[path]), ("two", two[path])]).merged(torch.tensor([0.5, -2.0]))
        for path in one
    }
    report = write_lora(
        tmp_path / "out", merged, base_model="org/base", base_shapes=module_shapes(build("bert"))
    )
    assert report.rank == 5
    loaded = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "out")
    for path, delta in peft_deltas(loaded).items():
        torch.testing.assert_close(delta, 0.5 * deltas[0][path] - 2.0 * deltas[1][path], rtol=1e-5, atol=1e-5)


def test_a_task_type_for_which_peft_wants_a_head(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20
    )
    base = BertForSequenceClassification(config).eval()
    weights = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    lora = {"task_type": "SEQ_CLS", "r": 2, "lora_alpha": 4, "target_modules": ["query"]}
    folder = saved(with_lora("bert", model=base, **lora), tmp_path / "a")

    adapter = read_adapter(folder, modules_to_save="keep-separate")
    assert set(adapter.heads) == {"classifier.weight", "classifier.bias"}
    fresh = BertForSequenceClassification(config).eval()
    fresh.load_state_dict(weights)
    report = write_lora(
        tmp_path / "b",
        adapter.canonical(),
        base_model="org/base",
        base_shapes=module_shapes(fresh),
        task_type=adapter.task_type,
    )
    assert any("SEQ_CLS" in notice for notice in report.notices)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "b")
    assert set(peft_deltas(loaded)) == set(adapter.modules)


def test_the_layout_is_that_of_peft(tmp_path):
    folder = saved(with_lora("mlp", r=3, lora_alpha=3, target_modules=["up", "down"]), tmp_path / "a")
    write_lora(tmp_path / "b", read_adapter(folder).canonical(), base_model="org/base")
    theirs = load_file(folder / "adapter_model.safetensors")
    ours = load_file(tmp_path / "b/adapter_model.safetensors")
    assert {key: (t.shape, t.dtype) for key, t in ours.items()} == {
        key: (t.shape, t.dtype) for key, t in theirs.items()
    }
    written = peft.LoraConfig.from_pretrained(tmp_path / "b")
    assert (written.r, written.lora_alpha, written.inference_mode) == (3, 3, True)


class TestVariantsThatPeftWrites:
    """What PEFT saves for the variants is recognised, field and tensors."""

    @pytest.mark.parametrize(
        ("kind", "config", "subjects"),
        [
            ("mlp", {"use_dora": True, "target_modules": ["up"]}, ["use_dora", "lora_magnitude_vector"]),
            ("mlp", {"lora_bias": True, "target_modules": ["up"]}, ["lora_bias", "lora_B.bias"]),
            ("mlp", {"bias": "lora_only", "target_modules": ["up"]}, ["bias = ", "up.base_layer.bias"]),
            ("mlp", {"bias": "all", "target_modules": ["up"]}, ["bias = ", "head.bias"]),
            ("mlp", {"modules_to_save": ["head"], "target_modules": ["up"]}, ["modules_to_save = head"]),
            ("llama", {"target_modules": ["embed_tokens"]}, ["lora_embedding_A"]),
            ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1]}, ["trainable_token"]),
            ("mlp", {"init_lora_weights": "pissa", "target_modules": ["up"]}, ["init_lora_weights"]),
            (
                "llama",
                {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 3]]},
                ["layer_replication"],
            ),
        ],
    )
    def test_refused_from_folder_and_live(self, tmp_path, kind, config, subjects):
        model = with_lora(kind, r=2, **config)
        problems = inspect_adapter(saved(model, tmp_path / "a")).problems
        for subject in subjects:
            assert any(subject in problem.subject for problem in problems), problems
        with pytest.raises(ValueError) as error:
            from_peft_model(model)
        assert subjects[0] in str(error.value)

    def test_another_method_is_refused(self, tmp_path):
        model = peft.get_peft_model(build("mlp"), peft.LoHaConfig(r=2, target_modules=["up"]))
        with pytest.raises(ValueError, match="save_as_lora"):
            read_adapter(saved(model, tmp_path / "a"))
