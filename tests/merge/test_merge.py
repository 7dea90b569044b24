"""Whole merges on a tiny model: what is written is what was merged, and PEFT loads it."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nsc_fast import merge_adapters, read_adapter
from nsc_fast.adapters import AdapterError
from nsc_fast.errors import MergeError
from nsc_fast.layers import install, remove
from nsc_fast.merge import check_inputs, run_recipe
from nsc_fast.recipe import load_recipe, make_recipe
from nsc_fast.verify import verify_folder, verify_output


@pytest.fixture(scope="module")
def merged(workshop, tmp_path_factory):
    result, model = run_recipe(load_recipe(workshop / "recipe.yaml"))
    out = tmp_path_factory.mktemp("out") / "merged"
    report = result.save_pretrained(out)
    return result, model, out, report


def _base(workshop):
    return AutoModelForCausalLM.from_pretrained(workshop / "base").eval()


def _logits(model):
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_peft_gives_the_outputs_of_the_merge_in_memory(merged, workshop):
    result, _, out, _ = merged
    loaded = _logits(PeftModel.from_pretrained(_base(workshop), str(out)))
    model = _base(workshop)
    adapters = {f"a{k}": read_adapter(workshop / f"a{k}").canonical() for k in range(3)}
    weights = {n: p.clone() for n, p in model.named_parameters()}
    for module, coefficients in result.coefficients.items():
        present = [name for name, own in adapters.items() if module in own]
        assert len(present) == len(coefficients)
        for name, c in zip(present, coefficients, strict=True):
            weights[f"{module}.weight"] += (float(c) * adapters[name][module].dense()).float()
    model.load_state_dict(weights, strict=False)
    expected = _logits(model)
    assert (loaded - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_output_is_lossless_and_its_rank_is_the_sum_of_the_ranks(merged):
    result, _, out, report = merged
    assert report.rank == 4 + 8 + 3 and report.total_kept_energy == 1.0
    again = read_adapter(out).canonical()
    for module, update in result.updates.items():
        difference = (again[module].dense() - update.dense()).norm()
        assert difference <= 1e-6 * update.dense().norm()


def test_the_loss_falls_and_the_model_is_left_alone(merged, workshop):
    result, model, _, _ = merged
    assert result.history[-1].loss < result.history[0].loss
    fresh = _base(workshop).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())


def test_the_evidence_is_beside_the_adapter(merged):
    result, _, out, _ = merged
    folder = out / "nsc_fast"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(1, 7))
    coefficients = load_file(folder / "coefficients.safetensors")
    assert set(coefficients) == set(result.updates)
    resolved = load_recipe(folder / "config.resolved.yaml")
    assert resolved.method_parameters().steps == 6 and resolved.method_parameters().init == 0.4
    assert json.loads((folder / "environment.json").read_text())["torch"] == torch.__version__
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card and "a0" in card


def test_two_runs_with_one_seed_give_the_same_bits(merged, workshop):
    result, _, _, _ = merged
    again, _ = run_recipe(load_recipe(workshop / "recipe.yaml"))
    assert all(torch.equal(result.coefficients[m], c) for m, c in again.coefficients.items())


def test_all_checks_pass_and_again_on_the_folder(merged, workshop):
    result, model, out, _ = merged
    adapters = {t: read_adapter(s["source"], name=t) for t, s in result.sources.items()}
    names = [c.name for c in verify_output(out, result.updates, model, adapters=adapters) if c.passed]
    assert names == ["weights", "reload", "difference", "identity"]
    assert all(c.passed for c in verify_folder(out, base_model=str(workshop / "base")))


def test_a_changed_weight_fails_the_checks(merged, workshop, tmp_path):
    result, model, out, _ = merged
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text((out / "adapter_config.json").read_text())
    tensors = load_file(out / "adapter_model.safetensors")
    key = next(k for k in tensors if k.endswith("v_proj.lora_B.weight"))
    save_file({**tensors, key: tensors[key] * 1.01}, bad / "adapter_model.safetensors", {"format": "pt"})
    failed = [c.name for c in verify_output(bad, result.updates, model) if not c.passed]
    assert failed == ["weights", "reload"]


def test_one_adapter_with_coefficient_one_gives_itself_back(workshop, tmp_path):
    for k in range(3):
        model = _base(workshop)
        result = merge_adapters(
            model, {"it": workshop / f"a{k}"}, method="task_arithmetic", parameters={"scaling": 1.0}
        )
        result.save_pretrained(tmp_path / f"o{k}")
        ours = _logits(PeftModel.from_pretrained(_base(workshop), str(tmp_path / f"o{k}")))
        theirs = _logits(PeftModel.from_pretrained(_base(workshop), str(workshop / f"a{k}")))
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_max_rank_keeps_the_best_directions_and_says_how_much(merged, workshop, tmp_path):
    result, model, _, _ = merged
    report = result.save_pretrained(tmp_path / "small", max_rank=5, dtype=torch.bfloat16)
    energies = {m: (u.truncate(5)[0].energy, u.energy) for m, u in result.updates.items()}
    expected = sum(e[0] for e in energies.values()) / sum(e[1] for e in energies.values())
    assert report.rank == 5 and report.total_kept_energy == pytest.approx(expected)
    assert all(c.passed for c in verify_output(tmp_path / "small", result.updates, model))


def test_weights_set_each_task(workshop):
    result = merge_adapters(
        None,
        {"one": workshop / "a0", "two": workshop / "a1"},
        method="task_arithmetic",
        weights={"one": -0.5},
    )
    v_proj = "model.layers.0.self_attn.v_proj"
    assert result.coefficients[v_proj].tolist() == [-0.5, 0.3]
    parts = [read_adapter(workshop / f"a{k}").canonical()[v_proj].dense() for k in range(2)]
    torch.testing.assert_close(result.updates[v_proj].dense(), -0.5 * parts[0] + 0.3 * parts[1])


def test_the_uniform_average_is_one_over_the_number_of_adapters(workshop):
    result = merge_adapters(None, {"one": workshop / "a0", "two": workshop / "a1"}, method="uniform")
    assert set(result.coefficients["model.layers.0.self_attn.q_proj"].tolist()) == {0.5}


def test_an_interrupted_merge_keeps_what_it_has(workshop):
    def stop(record):
        if record.step == 3:
            raise KeyboardInterrupt

    result, _ = run_recipe(load_recipe(workshop / "recipe.yaml"), on_step=stop)
    assert result.interrupted and len(result.history) == 3 and result.updates


def test_merged_layers_give_the_same_as_the_written_update(merged, workshop):
    result, model, _, _ = merged
    before = _logits(model)
    install(model, {"merged": result.updates}, granularity="task", init=1.0)
    inside = _logits(model)
    remove(model)
    assert torch.equal(_logits(model), before) and not torch.equal(inside, before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base_model": "other"}, MergeError, "has no module 'model.layers.0.self_attn"),
        ({"base_model": "wide"}, AdapterError, "model.layers.0.self_attn"),
        ({"base_model": "nowhere"}, MergeError, "base model .*nowhere.* cannot be read"),
        ({"parameters": {"scope": {"filter": "w_proj"}}}, ValueError, "no adapted module ends in 'w_proj'"),
        ({"parameters": {"scope": {"layers": "7-9"}}}, ValueError, "has blocks 0 to 3"),
        ({"parameters": {"scope": {"filter": "up_proj"}}}, MergeError, "'one' adapts none of the 1 target"),
        ({"parameters": {"learning_rate": 1e30}}, MergeError, "is not a number"),
    ],
)
def test_bad_input_is_refused_by_name(workshop, other_bases, change, error, message):
    content = load_recipe(workshop / "recipe.yaml").model_dump(mode="json", exclude_none=True)
    with pytest.raises(error, match=message):
        run_recipe(make_recipe({**content, **change}, where="here", folder=other_bases))


@pytest.fixture(scope="module")
def other_bases(tmp_path_factory):
    """other/: another architecture; wide/: the same one, wider."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("bases")
    bert = BertConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertModel(bert).save_pretrained(folder / "other")
    wide = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=63
    )
    LlamaForCausalLM(wide).save_pretrained(folder / "wide")
    return folder


def test_an_adapter_without_data_is_named_before_the_model_is_loaded(workshop):
    content = load_recipe(workshop / "recipe.yaml").model_dump(mode="json", exclude_none=True)
    del content["adapters"][1]["data"]
    with pytest.raises(MergeError, match="adapter 'two' has no data"):
        check_inputs(make_recipe({**content, "base_model": "nowhere"}, where="here"))


def test_data_that_a_method_does_not_use_are_refused_in_python(workshop):
    data = {"one": [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}]}
    with pytest.raises(MergeError, match="uses no data"):
        merge_adapters(None, {"one": workshop / "a0"}, data=data, method="uniform")


def test_nothing_to_merge():
    with pytest.raises(MergeError, match="no adapter"):
        merge_adapters(None, {}, method="uniform")


def test_a_method_without_one_model_is_refused_before_the_model_is_loaded(workshop):
    adapters = [{"name": "one", "path": str(workshop / "a0")}]
    recipe = make_recipe(
        {"base_model": "nowhere", "merge_method": "reversible", "adapters": adapters}, where="here"
    )
    with pytest.raises(MergeError, match=r"no merged LoRA .* rebuild\(task\)"):
        check_inputs(recipe)
    result = merge_adapters(None, {"one": workshop / "a0", "two": workshop / "a0"}, method="reversible")
    assert set(result.rebuild("one")) == set(read_adapter(workshop / "a0").modules)


def test_the_merge_in_python_records_seed_and_weights_for_verify(workshop, tmp_path):
    adapters = {"one": workshop / "a0", "two": workshop / "a1"}
    result = merge_adapters(
        _base(workshop),
        adapters,
        method="dare",
        parameters={"max_rank": 6},
        weights={"two": -0.5},
        seed=3,
        base_name=str(workshop / "base"),
    )
    result.save_pretrained(tmp_path / "out")
    assert all(c.passed for c in verify_folder(tmp_path / "out", base_model=str(workshop / "base")))
    again = load_recipe(tmp_path / "out" / "nsc_fast" / "config.resolved.yaml")
    assert (again.seed, again.adapters[1].parameters.weight, again.merge_method) == (3, -0.5, "dare")


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory, workshop):
    """base/ and two adapters of a classifier; the head of "grade" gives one number."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("classifiers")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=63,
        num_labels=3,
        pad_token_id=1,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(workshop / "base").save_pretrained(folder / "base")
    for name, labels in (("topic", 3), ("tone", 3), ("grade", 1)):
        model = LlamaForSequenceClassification.from_pretrained(
            folder / "base", num_labels=labels, ignore_mismatched_sizes=True
        )
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(folder / name)
    return folder


class TestEntropy:
    """AdaMerging asks for predictions; a regression head has none."""

    def recipe(self, classifiers, workshop, *tasks, **changes):
        data = {"path": str(workshop / "d0.jsonl"), "num_samples": 8}
        content = {
            "base_model": "base",
            "merge_method": "adamerging",
            "modules_to_save": "keep-separate",
            "adapters": [{"name": t, "path": t, "data": data} for t in tasks],
            "parameters": {"steps": 2},
        }
        return make_recipe({**content, **changes}, where="here", folder=classifiers)

    def test_every_task_is_judged_by_its_own_head(self, classifiers, workshop, monkeypatch):
        from nsc_fast.methods import adamerging

        seen = []
        real = adamerging.EntropyObjective
        monkeypatch.setattr(
            adamerging,
            "EntropyObjective",
            type(
                "Seen", (real,), {"__post_init__": lambda s: (seen.append(s.heads), real.__post_init__(s))[0]}
            ),
        )
        result, _ = run_recipe(self.recipe(classifiers, workshop, "topic", "tone"))
        assert set(seen[0]) == {"topic", "tone"} and set(result.heads) == {"topic", "tone"}
        assert result.measure == "prediction entropy" and len(result.history) == 2

    def test_a_regression_head_is_refused_by_name_before_the_model_is_loaded(self, classifiers, workshop):
        recipe = self.recipe(classifiers, workshop, "topic", "grade", base_model="nowhere")
        with pytest.raises(MergeError, match="head of task 'grade' .* not defined for regression"):
            check_inputs(recipe)
        base = AutoModelForCausalLM.from_pretrained(workshop / "base")
        read = {t: read_adapter(classifiers / t, modules_to_save="keep-separate") for t in ("topic", "grade")}
        with pytest.raises(MergeError, match="head of task 'grade'"):
            merge_adapters(base, read, {"topic": [], "grade": []}, method="adamerging")

    def test_a_model_of_tokens_is_refused_before_the_data_are_read(self, workshop, monkeypatch):
        from nsc_fast import merge

        monkeypatch.setattr(merge, "read_data", lambda *_: pytest.fail("the data were read"))
        content = load_recipe(workshop / "recipe.yaml").model_dump(mode="json", exclude_none=True)
        with pytest.raises(MergeError, match="predicts tokens, not classes"):
            run_recipe(make_recipe({**content, "merge_method": "adamerging", "parameters": {}}, where="here"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"path": "d0.jsonl", "max_length": 10**6}}, "data.max_length is 1000000, and the base"),
        ({"base": {"vocab_size": 20}}, "token .* is beyond the base model's vocabulary of 20"),
        ({"base": {"hidden_size": 64}}, r"does not fit the base's \(32, 64\)"),
    ],
    ids=["too long", "another tokenizer", "another shape"],
)
def test_what_is_wrong_is_found_before_the_weights_load(workshop, tmp_path, monkeypatch, change, message):
    from nsc_fast import merge

    monkeypatch.setattr(merge, "load_base", lambda *_, **__: pytest.fail("the weights were loaded"))
    base = shutil.copytree(workshop / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **change.get("base", {})}))
    data = change.get("data", {"path": "d0.jsonl"})
    data = {**data, "path": str(workshop / data["path"])}
    adapters = [{"name": f"t{k}", "path": str(workshop / f"a{k}"), "data": data} for k in range(2)]
    with pytest.raises((MergeError, AdapterError), match=message):
        run_recipe(make_recipe({"base_model": str(base), "adapters": adapters}, where="here"))


def test_a_vera_adapter_merges_with_lora_and_verifies(workshop, tmp_path):
    from peft import VeraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        _base(workshop), VeraConfig(r=6, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "vera_lambda" in name:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "vera")
    adapters = [{"name": "v", "path": str(tmp_path / "vera")}, {"name": "l", "path": str(workshop / "a0")}]
    recipe = make_recipe(
        {"base_model": str(workshop / "base"), "merge_method": "knots_ties", "adapters": adapters},
        where="here",
    )
    result, base = run_recipe(recipe)
    result.save_pretrained(tmp_path / "out")
    # The identity check compares with what PEFT's own VeRA layers do.
    read = {"v": read_adapter(tmp_path / "vera", name="v")}
    checks = verify_output(tmp_path / "out", result.updates, base, adapters=read)
    assert [c.name for c in checks if c.passed] == ["weights", "reload", "difference", "identity"]
    assert all(c.passed for c in verify_folder(tmp_path / "out", base_model=str(workshop / "base")))
