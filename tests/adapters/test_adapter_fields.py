"""The verdict table: complete for the installed PEFT, every refusal by name, scales as PEFT's."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsc_fast.adapters.fields import FIELDS, config_notices, config_problems, rank_of, scaling_of
from nsc_fast.adapters.targets import selected_by, target_problems

peft = pytest.importorskip("peft")

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def test_every_field_of_the_installed_peft_has_a_verdict():
    unknown = {field.name for field in dataclasses.fields(peft.LoraConfig)} - set(FIELDS)
    assert not unknown, f"fields without a verdict in nsc_fast/adapters/fields.py: {sorted(unknown)}"


def test_the_default_config_of_peft_passes():
    config = peft.LoraConfig().to_dict()
    config["peft_type"] = "LORA"
    assert config_problems(config) == []
    assert config_notices(config) == []


@pytest.mark.parametrize(
    ("field", "value", "way_out"),
    [
        ("peft_type", "LOHA", "save_as_lora"),
        ("peft_type", None, "save_as_lora"),
        ("r", 0, "adapter_config.json"),
        ("r", True, "adapter_config.json"),
        ("r", "8", "adapter_config.json"),
        ("lora_alpha", math.inf, "adapter_config.json"),
        ("lora_alpha", "16", "adapter_config.json"),
        ("use_rslora", "false", "adapter_config.json"),
        ("rank_pattern", {"q(": 4}, "adapter_config.json"),
        ("rank_pattern", {"q": 0}, "adapter_config.json"),
        ("alpha_pattern", {"q": None}, "adapter_config.json"),
        ("alpha_pattern", ["q"], "adapter_config.json"),
        ("fan_in_fan_out", 1, "adapter_config.json"),
        ("target_modules", "q(", "adapter_config.json"),
        ("target_modules", [1], "adapter_config.json"),
        ("exclude_modules", {"q": 1}, "adapter_config.json"),
        ("layers_to_transform", ["1"], "adapter_config.json"),
        ("layers_pattern", ["h("], "adapter_config.json"),
        ("target_parameters", ["experts.w"], "target_modules"),
        ("bias", "all", 'bias="none"'),
        ("bias", "lora_only", 'bias="none"'),
        ("lora_bias", True, "lora_bias=False"),
        ("modules_to_save", "classifier", "adapter_config.json"),
        ("trainable_token_indices", [1, 2], "trainable_token_indices"),
        ("use_dora", True, "plain LoRA"),
        ("alora_invocation_tokens", [1], "plain LoRA"),
        ("alora_invocation_tokens", [], "plain LoRA"),
        ("arrow_config", {}, "routed adapters"),
        ("kasa_config", {}, "plain LoRA"),
        ("use_bdlora", {"nblocks": 2}, "plain LoRA"),
        ("use_qalora", True, "use_qalora=False"),
        ("layer_replication", [[0, 2], [1, 3]], "repeated base"),
        ("init_lora_weights", "pissa", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "pissa_niter_16", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "olora", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "corda", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "lora_ga", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "loftq", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "tomorrow", "path_initial_model_for_weight_conversion"),
        ("megatron_config", {"tp": 2}, "Hugging Face"),
        ("ensure_weight_tying", "yes", "adapter_config.json"),
        ("base_model_name_or_path", 3, "adapter_config.json"),
        ("task_type", 3, "adapter_config.json"),
        ("use_new_thing", True, "update nsc_fast"),
        ("use_new_thing", 0, "update nsc_fast"),
    ],
)
def test_refused_values_name_field_and_way_out(field, value, way_out):
    (problem,) = config_problems(PLAIN | {field: value})
    assert problem.subject.startswith(f"{field} = ")
    assert problem.reason
    assert way_out in problem.way_out


@pytest.mark.parametrize("field", ["peft_type", "r", "lora_alpha"])
def test_a_missing_field_is_named(field):
    config = {key: value for key, value in PLAIN.items() if key != field}
    assert [problem.subject for problem in config_problems(config)] == [field]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "orthogonal"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", "mica"),
        ("init_lora_weights", False),
        ("layer_replication", []),
        ("target_modules", "all-linear"),
        ("layers_to_transform", 3),
        ("loftq_config", {"bits": 4}),
        ("auto_mapping", {"base_model_class": "X"}),
        ("megatron_core", "some.module"),
        ("use_new_thing", None),
        ("use_new_thing", False),
        ("use_new_thing", []),
        ("use_new_thing", ""),
        ("lora_alpha", 0.5),
    ],
)
def test_harmless_values_pass(field, value):
    assert config_problems(PLAIN | {field: value}) == []


def test_all_problems_are_listed():
    problems = config_problems(PLAIN | {"use_dora": True, "bias": "all", "kasa_config": {"beta": 1}})
    assert len(problems) == 3


@pytest.mark.parametrize(
    ("config", "notice"),
    [
        ({"monteclora_config": {"num_samples": 4}}, "monteclora_config"),
        ({"velora_config": {"num_groups": 2}}, "velora_config"),
        ({"peft_version": "999.0.0"}, "999.0.0, newer than"),
        ({"peft_version": "999.0.dev0@1a2b3c"}, "999.0.dev0@1a2b3c, newer than"),
        ({"peft_version": "soon"}, "'soon' is not a version"),
    ],
)
def test_notices(config, notice):
    assert config_problems(PLAIN | config) == []
    (found,) = config_notices(PLAIN | config)
    assert notice in found


def test_an_older_version_is_no_news():
    assert config_notices(PLAIN | {"peft_version": "0.4.0"}) == []


def test_patterns_are_looked_up_independently_and_the_first_match_wins():
    config = PLAIN | {
        "rank_pattern": {"layers.1.q": 4, r".*\.q": 2},
        "alpha_pattern": {"q": 3, r"layers\.1\.q": 100},
    }
    assert rank_of(config, "model.layers.1.q") == 4
    assert scaling_of(config, "model.layers.1.q") == 3 / 4
    assert scaling_of(config, "model.layers.0.q") == 3 / 2
    assert scaling_of(config, "model.layers.0.v") == 16 / 8
    assert scaling_of(config | {"use_rslora": True}, "model.layers.1.q") == 3 / 2
    # A key matches at a dot boundary only.
    assert rank_of(config | {"rank_pattern": {"q": 1}}, "model.layers.0.xq") == 8


PARTS = st.sampled_from(["model", "layers", "h", "0", "1", "12", "q", "xq", "attn.q", "mlp"])
PATHS = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
KEYS = st.one_of(PATHS, st.sampled_from([r".*\.q", r"layers\.[01]\..*", "^q", "(q|mlp)", "attn[.]q", "h+"]))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    path=PATHS,
    ranks=st.dictionaries(KEYS, st.integers(1, 64), max_size=4),
    alphas=st.dictionaries(KEYS, st.integers(1, 64), max_size=4),
    rslora=st.booleans(),
)
def test_patterns_agree_with_peft(path, ranks, alphas, rslora):
    from peft.utils.other import get_pattern_key

    config = PLAIN | {"rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": rslora}
    rank = ranks.get(get_pattern_key(ranks.keys(), path), 8)
    alpha = alphas.get(get_pattern_key(alphas.keys(), path), 16)
    assert rank_of(config, path) == rank
    assert scaling_of(config, path) == (alpha / math.sqrt(rank) if rslora else alpha / rank)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    path=PATHS,
    targets=st.one_of(st.lists(PATHS, min_size=1, max_size=3), KEYS),
    excluded=st.one_of(st.none(), st.lists(PATHS, max_size=2), KEYS),
    layers=st.one_of(st.none(), st.integers(0, 1), st.lists(st.integers(0, 12), max_size=2)),
    pattern=st.sampled_from([None, "layers", ["h", "layers"]]),
)
def test_selection_agrees_with_peft(path, targets, excluded, layers, pattern):
    from peft.tuners.tuners_utils import check_target_module_exists

    if isinstance(targets, str):
        layers = pattern = None
    if layers is None:
        pattern = None
    config = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }
    theirs = check_target_module_exists(peft.LoraConfig(**config), path)
    assert selected_by(config, path) == (bool(theirs) and type(theirs).__name__ != "_ExcludedModule")


def test_targets_are_compared_both_ways():
    config = PLAIN | {"target_modules": ["q", "k"]}
    found = target_problems(config, ["layers.0.q", "layers.0.v"])
    assert [problem.subject for problem in found] == ["module 'layers.0.v'", "target_modules entry 'k'"]
    found = target_problems(PLAIN | {"target_modules": r".*\.k"}, ["layers.0.q"])
    assert [problem.subject for problem in found] == ["module 'layers.0.q'", r"target_modules entry '.*\\.k'"]
    assert not target_problems(PLAIN | {"target_modules": None}, ["layers.0.q"])
    assert not target_problems(PLAIN | {"target_modules": "all-linear"}, ["layers.0.q"])
