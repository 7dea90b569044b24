"""The verdict on every field of PEFT's LoraConfig, and the scale of a module.

A field that changes the update and that we do not reproduce is refused by name. So is a field
that nobody has looked at yet, unless it is null, false or empty: PEFT drops such fields with a
warning, and the update comes out wrong. A test compares this table with the installed PEFT.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from packaging.version import InvalidVersion, Version

from nsc_fast.adapters.model import Problem

__all__ = ["FIELDS", "Rule", "config_notices", "config_problems", "rank_of", "scaling_of"]

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """The verdict on one field.

    Attributes:
        verdict: ``support`` it is reproduced exactly; ``refuse`` it may not be set; ``check`` it
            is compared with something else (tensors, other adapters); ``inert`` it does nothing
            in a finished adapter.
        effect: what a value that is not allowed does, or is.
        allowed: whether a value passes.
        way_out: what to do about a value that does not pass.
        notice: told when the field is set and passes.
    """

    verdict: Literal["support", "refuse", "check", "inert"]
    effect: str
    allowed: Callable[[Any], bool] = lambda value: True
    way_out: str = "correct adapter_config.json, or save the adapter again with PEFT"
    notice: str = ""


def _unset(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _null_or_false(value: Any) -> bool:
    """For options that PEFT switches on by an empty list or dict as well."""
    return value is None or value is False


def _flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_regex(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return True


def _names(value: Any) -> bool:
    """Names as a list, or one regular expression as a string."""
    if isinstance(value, str):
        return _is_regex(value)
    return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _pattern(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def allowed(value: Any) -> bool:
        if value is None:
            return True
        return isinstance(value, dict) and all(
            _is_regex(_anchored(key)) and valid(v) for key, v in value.items()
        )

    return allowed


def _anchored(key: str) -> str:
    """PEFT's rule for a key of rank_pattern and alpha_pattern: the path, or its end at a dot."""
    return rf"(.*\.)?({key})$"


def _layer_names(value: Any) -> bool:
    return _names(value) and all(map(_is_regex, value if isinstance(value, list) else []))


def _layers(value: Any) -> bool:
    return value is None or all(
        isinstance(v, int) and not isinstance(v, bool)
        for v in (value if isinstance(value, list) else [value])
    )


_BASE_UNTOUCHED = ("gaussian", "orthogonal", "eva", "mica")


def _init_leaves_base(value: Any) -> bool:
    return value is None or isinstance(value, bool) or value in _BASE_UNTOUCHED


_FOLD = (
    "merge this adapter into its base with PEFT, or train a plain LoRA; "
    "it cannot be expressed as a sum of scaled B A"
)

FIELDS: dict[str, Rule] = {
    # The update itself.
    "peft_type": Rule(
        "check",
        "only LORA adapters, and VERA adapters in folders, are merged",
        lambda value: value == "LORA",
        "convert it first with peft.save_as_lora",
    ),
    "r": Rule("support", "the rank must be a whole number of at least 1", _rank),
    "lora_alpha": Rule("support", "the scale's numerator must be a finite number", _number),
    "use_rslora": Rule("support", "must be true or false", _flag),
    "rank_pattern": Rule("support", "must map regular expressions to ranks of at least 1", _pattern(_rank)),
    "alpha_pattern": Rule("support", "must map regular expressions to finite numbers", _pattern(_number)),
    "fan_in_fan_out": Rule("support", "must be true or false", _flag),
    # Which modules: the tensors decide, targets.py compares.
    "target_modules": Rule("check", "must be a list of names, a valid regular expression or null", _names),
    "exclude_modules": Rule("check", "must be a list of names, a valid regular expression or null", _names),
    "layers_to_transform": Rule("check", "must be a layer index, a list of them or null", _layers),
    "layers_pattern": Rule("check", "must be a name, a list of names or null", _layer_names),
    "target_parameters": Rule(
        "refuse",
        "adapts raw parameters (fused experts), whose factors are packed differently",
        _unset,
        "train on target_modules instead, or leave this adapter out",
    ),
    # More than a low-rank update.
    "bias": Rule(
        "refuse",
        "the base's biases were trained as well and are replaced, not added",
        lambda value: value in (None, "none"),
        'train with bias="none"',
    ),
    "lora_bias": Rule(
        "refuse",
        "lora_B has a bias, which is not merged",
        _null_or_false,
        "train with lora_bias=False",
    ),
    "modules_to_save": Rule(
        "check",
        "must be a list of module names or null",
        lambda v: v is None or isinstance(v, list),
    ),
    "trainable_token_indices": Rule(
        "refuse",
        "rows of the embedding are replaced, not added",
        _unset,
        "train without trainable_token_indices",
    ),
    "use_dora": Rule(
        "refuse",
        "DoRA rescales the whole weight, so the update is not additive",
        _null_or_false,
        _FOLD,
    ),
    "alora_invocation_tokens": Rule(
        "refuse",
        "the update acts on the tokens after an invocation only, and merging is impossible",
        _null_or_false,
        "train a plain LoRA",
    ),
    "arrow_config": Rule(
        "refuse",
        "Arrow routes each token to another adapter",
        _null_or_false,
        "merge the routed adapters themselves",
    ),
    "kasa_config": Rule(
        "refuse",
        "KaSA truncates the base weight and inserts a diagonal",
        _null_or_false,
        _FOLD,
    ),
    "use_bdlora": Rule(
        "refuse",
        "block-diagonal factors are stored compactly",
        _null_or_false,
        "write the factors out densely and save them as a plain LoRA",
    ),
    "use_qalora": Rule(
        "refuse", "QALoRA's A sees pooled inputs", _null_or_false, "train with use_qalora=False"
    ),
    "layer_replication": Rule(
        "refuse",
        "the adapter belongs to a base with repeated layers",
        _unset,
        "write the repeated base out as a model of its own and train on that",
    ),
    "init_lora_weights": Rule(
        "refuse",
        "the base weight was changed at initialisation (or the method is unknown), so B A "
        "alone is not the update of the original base",
        _init_leaves_base,
        "save it again with model.save_pretrained(folder, "
        "path_initial_model_for_weight_conversion=...), which PEFT offers for pissa, olora, corda "
        "and lora_ga",
    ),
    "megatron_config": Rule(
        "refuse",
        "Megatron's parallel layers are not supported",
        _null_or_false,
        "convert the adapter to the Hugging Face layout",
    ),
    "ensure_weight_tying": Rule("check", "must be true or false", _flag),
    # Harmless variants.
    "monteclora_config": Rule(
        "support",
        "",
        notice="Monte-Carlo sampling acted in training only; its mean, the plain LoRA, is merged",
    ),
    "velora_config": Rule("support", "", notice="VeLoRA changed the training only; its buffers are left out"),
    # Identity, compared across adapters in check.py.
    "base_model_name_or_path": Rule("check", "must be a string or null", _text),
    "revision": Rule("check", "must be a string or null", _text),
    "task_type": Rule("check", "must be a string or null", _text),
    "peft_version": Rule("check", "must be a string or null", _text),
    # Of no effect on a finished adapter.
    "auto_mapping": Rule("inert", "names a library and a class; never imported"),
    "corda_config": Rule("inert", "belongs to init_lora_weights"),
    "eva_config": Rule("inert", "belongs to init_lora_weights"),
    "inference_mode": Rule("inert", "run time"),
    "loftq_config": Rule("inert", "belongs to init_lora_weights"),
    "lora_dropout": Rule("inert", "training"),
    "lora_ga_config": Rule("inert", "belongs to init_lora_weights"),
    "megatron_core": Rule("inert", "names a module; never imported"),
    "qalora_group_size": Rule("inert", "belongs to use_qalora"),
    "runtime_config": Rule("inert", "run time"),
}

_REQUIRED = ("peft_type", "r", "lora_alpha")


def config_problems(config: Config) -> list[Problem]:
    """Everything in a config that stops a merge, in the order of the config."""
    problems = [
        Problem(field, "is missing from adapter_config.json", FIELDS[field].way_out)
        for field in _REQUIRED
        if field not in config
    ]
    for field, value in config.items():
        rule = FIELDS.get(field)
        if rule is None and not _unset(value):
            problems.append(
                Problem(
                    _assignment(field, value),
                    "no rule for this field is known, and it may change the update",
                    "update nsc_fast, or remove the field from adapter_config.json if you are sure "
                    "that it has no effect on a finished adapter",
                )
            )
        elif rule is not None and not rule.allowed(value):
            problems.append(Problem(_assignment(field, value), rule.effect, rule.way_out))
    return problems


def config_notices(config: Config) -> list[str]:
    """What a user should know about a config that does not stop the merge."""
    notices = [
        f"{field}: {rule.notice}"
        for field, rule in FIELDS.items()
        if rule.notice and not _null_or_false(config.get(field))
    ]
    return notices + _version_notice(config.get("peft_version"))


def _version_notice(written: Any) -> list[str]:
    if not isinstance(written, str):
        return []
    try:
        installed = importlib.metadata.version("peft")
        # Development versions look like 0.17.2.dev0@a1b2c3d.
        newer = Version(written.split("@")[0]) > Version(installed)
    except importlib.metadata.PackageNotFoundError:
        return []
    except InvalidVersion:
        return [f"peft_version {written!r} is not a version number"]
    if not newer:
        return []
    return [f"written by PEFT {written}, newer than the installed {installed}"]


def _assignment(field: str, value: Any, limit: int = 80) -> str:
    text = json.dumps(value, default=str)
    return f"{field} = {text if len(text) <= limit else text[:limit] + '…'}"


def rank_of(config: Config, module: str) -> int:
    """The rank that the config gives to a module, ``rank_pattern`` resolved as PEFT does."""
    return _by_pattern(config.get("rank_pattern"), module, config["r"])


def scaling_of(config: Config, module: str) -> float:
    """The factor in front of ``B A`` of a module.

    Rank and alpha are looked up independently: the first key of each pattern, in the order of the
        file,
    that matches the module's path at a dot boundary.
    """
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    rank = rank_of(config, module)
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    pattern = pattern or {}
    for key, value in pattern.items():
        if re.match(_anchored(key), module):
            return value
    # PEFT looks the path itself up when nothing matched; it may hold characters that a regular
    # expression reads differently.
    return pattern.get(module, default)
