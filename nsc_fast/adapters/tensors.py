"""What each tensor of an adapter is, which two make a pair of factors, and what is wrong.

Works on headers, so that ``inspect`` and the preflight need no weights; files and live models
share it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from nsc_fast.adapters.fields import config_notices, config_problems, rank_of, scaling_of
from nsc_fast.adapters.model import PREFIX, Adapter, AdapterError, LoraFactors, Problem
from nsc_fast.adapters.targets import target_problems

__all__ = ["Examination", "ModulesToSave", "TensorHeader", "assemble", "examine"]

ModulesToSave = Literal["error", "drop", "keep-separate", "merge-dense"]
POLICIES = ("error", "drop", "keep-separate", "merge-dense")

_FLOATING = ("float64", "float32", "bfloat16", "float16")
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_RUN_TIME_ONLY = re.compile(r".+\.lora_(velora|monteclora)_\w+(\..+)?")
# PEFT saves the base's own embedding beside the adapter when it is targeted or was resized.
_BASE_EMBEDDING = re.compile(
    r"(.+\.)?(embed_tokens|lm_head|wte|word_embeddings|shared)(\.base_layer)?\.weight"
)
# PEFT trains the head as well for these; older versions did not write that into the config.
_IMPLICIT_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_TIED_NAMES = (
    "embed_tokens",
    "lm_head",
    "wte",
    "word_embeddings",
    "shared",
    "embed_in",
    "embed_out",
)
_POLICY = "say it in the recipe or in Python, or with merge --modules-to-save"
_AGAIN = "save the adapter again with PEFT's model.save_pretrained(folder)"

# Keys that are not ours to merge, the most specific first: pattern, what it is, way out.
_REFUSED = (
    (
        r".+\.lora_magnitude_vector(\..+)?",
        "a DoRA magnitude, so the update is not additive",
        "merge this adapter into its base with PEFT, or train a plain LoRA",
    ),
    (
        r".+\.lora_embedding_[AB](\..+)?",
        "LoRA on an embedding is not supported",
        "train without embeddings in target_modules",
    ),
    (
        r".+\.lora_[AB]\.bias",
        "a bias of a LoRA factor is not merged",
        "train with lora_bias=False",
    ),
    (
        r".+\.lora_diag(\..+)?",
        "a KaSA diagonal, which belongs to a truncated base weight",
        "merge this adapter into its base with PEFT, or train a plain LoRA",
    ),
    (
        r".+trainable_tokens_delta(\..+)?",
        "rows of the embedding are replaced, not added",
        "train without trainable_token_indices",
    ),
    (
        r".+\.lora_[AB]\.[^.]+\.weight",
        "the key carries an adapter name, as a state_dict does and an adapter file does not",
        _AGAIN,
    ),
    (
        r"(.+\.)?bias",
        "a bias of the base was trained as well and would be replaced, not added",
        'train with bias="none"',
    ),
)


@dataclass(frozen=True)
class TensorHeader:
    """Shape and dtype (by its torch name) of a tensor that is not loaded."""

    shape: tuple[int, ...]
    dtype: str


@dataclass
class Examination:
    """What config and headers say about an adapter.

    Attributes:
        pairs: module path -> keys of A and B, complete and fitting pairs only.
        heads: path in the base model -> key, for ``modules_to_save``.
        problems: everything that stops a merge.
        notices: what the user should know although it does not.
    """

    pairs: dict[str, tuple[str, str]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def examine(
    config: Mapping[str, Any],
    headers: Mapping[str, TensorHeader],
    modules_to_save: ModulesToSave = "error",
) -> Examination:
    """Judges config and tensors, alone and against each other. Collects problems, raises none."""
    if modules_to_save not in POLICIES:
        raise ValueError(f"modules_to_save is one of {POLICIES}, not {modules_to_save!r}")
    config_wrong = config_problems(config)
    found = Examination(problems=config_wrong[:], notices=config_notices(config))
    sides: dict[str, dict[str, str]] = {}
    run_time_only = 0
    for key in sorted(headers):
        path = key.removeprefix(PREFIX)
        if path == key:
            found.problems.append(_tensor(key, f"unknown tensor: no {PREFIX!r} in front", _AGAIN))
        elif factor := _FACTOR.fullmatch(path):
            sides.setdefault(factor["module"], {})[factor["side"]] = key
        elif _is_head(path, config):
            found.heads[path] = key
        elif _RUN_TIME_ONLY.fullmatch(path):
            run_time_only += 1
        elif _BASE_EMBEDDING.fullmatch(path) and modules_to_save == "drop":
            found.notices.append(f"tensor {key!r}, the base's embedding, dropped, as asked")
        elif _BASE_EMBEDDING.fullmatch(path):
            found.problems.append(
                _tensor(
                    key,
                    "the file carries the base's embedding, which would be replaced, not added",
                    "if it was neither trained nor resized, leave it out with modules_to_save=drop "
                    f"({_POLICY}), or save the adapter again with save_embedding_layers=False",
                )
            )
        else:
            found.problems.append(_refusal(key, path))
    if run_time_only:
        found.notices.append(f"{run_time_only} tensors of MonteCLoRA or VeLoRA are left out")
    for module, keys in sides.items():
        wrong = _pair_problems(module, keys, headers, None if config_wrong else config)
        found.problems += wrong
        if not wrong:
            found.pairs[module] = keys["A"], keys["B"]
    if not sides and not found.problems:
        found.problems.append(
            Problem("weights", "hold no LoRA factors, so there is nothing to merge", _AGAIN)
        )
    if not config_wrong:
        found.problems += target_problems(config, sides)
        found.problems += _tying_problems(config, sides)
    _judge_heads(config, found, modules_to_save)
    return found


def _tensor(key: str, reason: str, way_out: str) -> Problem:
    return Problem(f"tensor {key!r}", reason, way_out)


def _refusal(key: str, path: str) -> Problem:
    for pattern, reason, way_out in _REFUSED:
        if re.fullmatch(pattern, path):
            return _tensor(key, reason, way_out)
    return _tensor(
        key,
        "unknown tensor: neither a LoRA factor nor listed in modules_to_save",
        "remove it from the file, or list its module in modules_to_save in adapter_config.json",
    )


def _is_head(path: str, config: Mapping[str, Any]) -> bool:
    names = [*_listed_heads(config), *_IMPLICIT_HEADS.get(str(config.get("task_type")), ())]
    parts = path.split(".")
    modules = [".".join(parts[:i]) for i in range(1, len(parts))]
    # PEFT compares without a dot boundary here.
    return any(module.endswith(name) for module in modules for name in names)


def _listed_heads(config: Mapping[str, Any]) -> list[str]:
    listed = config.get("modules_to_save")
    # Anything else than a list is a problem that the verdict table reports.
    return [str(name) for name in listed] if isinstance(listed, list) else []


def _pair_problems(
    module: str,
    keys: Mapping[str, str],
    headers: Mapping[str, TensorHeader],
    config: Mapping[str, Any] | None,
) -> list[Problem]:
    for side, other in (("A", "B"), ("B", "A")):
        if side not in keys:
            return [_tensor(keys[other], f"lora_{other} without lora_{side}", _AGAIN)]
    for key in (keys["A"], keys["B"]):
        shape, dtype = headers[key].shape, headers[key].dtype
        if len(shape) < 2 or 0 in shape:
            return [
                _tensor(
                    key,
                    f"shape {shape} is a leftover of sharded training (ZeRO-3, FSDP), not a factor",
                    "gather the parameters before model.save_pretrained(folder)",
                )
            ]
        if len(shape) > 2:
            return [
                _tensor(
                    key,
                    f"shape {shape} belongs to a convolution, which is not supported",
                    "train without convolutions in target_modules",
                )
            ]
        if dtype not in _FLOATING:
            return [
                _tensor(
                    key,
                    f"dtype {dtype} is not one of {', '.join(_FLOATING)}",
                    "save the adapter in one of these",
                )
            ]
    a, b = headers[keys["A"]].shape, headers[keys["B"]].shape
    if a[0] != b[1]:
        return [
            Problem(
                f"module {module!r}",
                f"lora_A {a} and lora_B {b} do not fit: expected (r, d_in) and (d_out, r)",
                _AGAIN,
            )
        ]
    if config is not None and rank_of(config, module) != a[0]:
        return [
            Problem(
                f"module {module!r}",
                f"r = {rank_of(config, module)} in the config (rank_pattern resolved), "
                f"{a[0]} in the file, so its scale is not known",
                "use the adapter_config.json that belongs to these weights",
            )
        ]
    return []


def _tying_problems(config: Mapping[str, Any], modules: Mapping[str, Any]) -> list[Problem]:
    if not config.get("ensure_weight_tying"):
        return []
    return [
        Problem(
            "ensure_weight_tying = true",
            f"ties the adapter of {module!r} to that of another module",
            "train with ensure_weight_tying=False",
        )
        for module in modules
        if module.rpartition(".")[2] in _TIED_NAMES
    ]


def _judge_heads(config: Mapping[str, Any], found: Examination, policy: ModulesToSave) -> None:
    listed = _listed_heads(config)
    if not listed and not found.heads:
        return
    names = listed or sorted({path.rpartition(".")[0] for path in found.heads})
    subject = f"modules_to_save = {', '.join(names)}"
    if policy == "error":
        found.problems.append(
            Problem(
                subject,
                "whole modules were trained as well and are replaced, not added",
                f"choose modules_to_save ({_POLICY}): keep-separate keeps them beside the merge, one per "
                "adapter; drop leaves them out; merge-dense merges their differences to the base (not of "
                "heads)",
            )
        )
    elif policy in ("keep-separate", "merge-dense") and not found.heads:
        found.problems.append(
            Problem(
                subject,
                "the file holds no tensor of these modules",
                f"get the complete weights, or leave them out with modules_to_save=drop ({_POLICY})",
            )
        )
    elif policy == "drop" and found.heads:
        found.notices.append(f"{subject}: {len(found.heads)} tensors dropped, as asked")


def assemble(
    name: str,
    source: str,
    config: Mapping[str, Any],
    headers: Mapping[str, TensorHeader],
    load: Callable[[str], Tensor],
    *,
    digest: str,
    modules_to_save: ModulesToSave = "error",
    scalings: Mapping[str, float] | None = None,
) -> Adapter:
    """An adapter from its parts.

    Args:
        name: for messages and reports.
        source: where it comes from.
        config: LoraConfig as a dict.
        headers: of every tensor, by its key in an adapter file.
        load: gives the tensor of a key.
        digest: sha256 of the weights.
        modules_to_save: what to do about heads.
        scalings: by module path, where they are known better than the config says.

    Raises:
        AdapterError: anything in config, headers or values that stops a merge, all at once.
    """
    found = examine(config, headers, modules_to_save)
    if found.problems:
        raise AdapterError(f"adapter {name!r}", *found.problems)
    wanted = {key for pair in found.pairs.values() for key in pair}
    if modules_to_save in ("keep-separate", "merge-dense"):
        wanted |= set(found.heads.values())
    tensors = {key: load(key) for key in sorted(wanted)}
    broken = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise AdapterError(
            f"adapter {name!r}",
            *(
                _tensor(
                    key,
                    "holds NaN or infinite values",
                    "take an earlier checkpoint: the training of this one diverged",
                )
                for key in broken
            ),
        )
    scale = scalings or {}
    factors = {
        module: LoraFactors(tensors[a], tensors[b], scale.get(module, _scaling(config, module)))
        for module, (a, b) in found.pairs.items()
    }
    whole = {path: tensors[key] for path, key in found.heads.items() if key in tensors}
    return Adapter(
        name=name,
        source=source,
        base_model=config.get("base_model_name_or_path") or None,
        task_type=config.get("task_type"),
        modules=factors,
        config=dict(config),
        heads=whole if modules_to_save == "keep-separate" else {},
        dense=whole if modules_to_save == "merge-dense" else {},
        notices=tuple(found.notices),
        digest=digest,
        dtype="+".join(sorted({headers[k].dtype for pair in found.pairs.values() for k in pair})),
    )


def _scaling(config: Mapping[str, Any], module: str) -> float:
    return float(scaling_of(config, module))
