"""The base model as the adapters know it: the Auto class whose module paths fit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .adapters.source import beside_others
from .errors import MergeError
from .quantised import INSTALL, check_installed, keep_differentiable, quantisation_config, quantised_by
from .recipe import BaseSpec

__all__ = ["Skeleton", "base_skeleton", "load_base", "load_tokenizer"]

# PEFT's task type -> transformers' Auto class. The plain model comes last: it fits adapters of the backbone.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_FALLBACKS = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModelForSemanticSegmentation",
    "AutoModelForObjectDetection",
    "AutoModelForDepthEstimation",
    "AutoModelForAudioClassification",
)


def load_base(
    spec: BaseSpec,
    modules: Iterable[str],
    *,
    task_type: str | None,
    device: str | torch.device = "cpu",
    skeleton: Skeleton | None = None,
) -> nn.Module:
    """Loads the base model in the class whose module paths hold all adapted modules.

    transformers reads the files tensor by tensor into the model's own memory: besides the model there is one
    tensor at a time, in any dtype.

    Args:
        spec, modules, task_type: as of :func:`base_skeleton`.
        device: of the whole model, unless ``spec`` has a device map. A base that is going to be sharded
            stays on the CPU.
        skeleton: of :func:`base_skeleton` with the same arguments, where it is there already.

    Raises:
        MergeError: as of :func:`base_skeleton`, or a package that quantisation needs is not installed, or a
            base that is going to be sharded is stored quantised.
    """
    check_installed(spec)
    if skeleton is None:
        skeleton = base_skeleton(spec, modules, task_type=task_type)
    packed = quantised_by(skeleton.model.config.to_dict())
    if spec.shard and packed is not None:
        raise MergeError(
            f"base model {spec.path!r} is stored quantised ({packed}) and cannot be sharded: name the base "
            "that is not quantised, or leave --shard-base (base_model.shard) out"
        )
    options = _options(spec)
    options["dtype"] = spec.dtype if spec.dtype == "auto" else getattr(torch, spec.dtype)
    if spec.quantised:
        options["quantization_config"] = quantisation_config(spec)
    if spec.device_map is not None:
        options["device_map"] = spec.device_map
    elif spec.quantised or (torch.device(device).type != "cpu" and not spec.shard):
        # Tensor by tensor to where it is used: the model is never whole in the host's memory.
        options["device_map"] = {"": str(device)}
    try:
        model = skeleton.auto.from_pretrained(spec.path, **options)
    except ImportError as error:
        raise MergeError(
            f"base model {spec.path!r} cannot be loaded: {' '.join(str(error).split())}; for quantised "
            f"bases: {INSTALL}"
        ) from error
    keep_differentiable(model)
    return model.eval()


class Skeleton(NamedTuple):
    """A model without its weights, on the meta device, and the class that loads it."""

    auto: Any
    model: nn.Module


def _options(spec: BaseSpec) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    for key in ("revision", "subfolder"):
        if getattr(spec, key) is not None:
            options[key] = getattr(spec, key)
    return options


def base_skeleton(spec: BaseSpec, modules: Iterable[str], *, task_type: str | None) -> Skeleton:
    """The base model from its config alone, in the class whose module paths hold all adapted modules.

    Args:
        spec: where it is.
        modules: paths that the adapters adapt.
        task_type: of the adapters, the first guess for the class.

    Raises:
        MergeError: the config cannot be read, or no class has the modules; says which are missing.
    """
    import transformers

    options = _options(spec)
    if spec.path.startswith((".", "~", "/")) and not Path(spec.path).expanduser().exists():
        raise MergeError(f"base model {spec.path!r} cannot be read: there is no such folder; check the path")
    # Most likely a slip of the pen: no waiting for the hub.
    offline = {"local_files_only": True} if beside_others(spec.path) else {}
    try:
        config = transformers.AutoConfig.from_pretrained(spec.path, **options, **offline)
    except (OSError, ValueError) as error:
        if offline:
            raise MergeError(
                f"base model {spec.path!r} cannot be read: there is no such folder, and it is not in the "
                "hub's local cache; check the path, or, if it is an id on the hub, fetch it with "
                f"'hf download {spec.path}'"
            ) from error
        raise MergeError(f"base model {spec.path!r} cannot be read: {error}") from error
    wanted = list(modules)
    # Before the guesses, the class that the checkpoint was saved from.
    saved = [name for name in config.architectures or () if hasattr(transformers, name)]
    missing: list[str] = wanted
    tried = []
    for name in dict.fromkeys([_CLASSES.get(task_type or "", "AutoModel"), *saved, *_FALLBACKS]):
        kind = getattr(transformers, name)
        if not _builds(kind, name, config):
            continue
        tried.append(name)
        with torch.device("meta"):
            if name in saved:
                skeleton = kind(config)
            else:
                skeleton = kind.from_config(config, trust_remote_code=spec.trust_remote_code)
        present = {path for path, _ in skeleton.named_modules()}
        lacking = [path for path in wanted if path not in present]
        if not lacking:
            return Skeleton(kind, skeleton.eval())
        missing = min(missing, lacking, key=len)
    if not tried:
        raise MergeError(
            f"base model {spec.path!r} ({config.model_type}) is of no class that transformers can load; load "
            "it yourself and call nsc_fast.merge_adapters(model, ...)"
        )
    raise MergeError(
        f"base model {spec.path!r} ({config.model_type}) has no module {missing[0]!r} "
        f"({len(missing)} of {len(wanted)} adapted modules are missing; tried {', '.join(tried)}); is it the "
        "base of these adapters?"
    )


def _builds(kind: Any, name: str, config: Any) -> bool:
    """Whether an Auto class, or a model class, makes a model of this config."""
    if not name.startswith("Auto"):
        return isinstance(config, kind.config_class)
    # Code that comes with the checkpoint stands in auto_map; its config is in no table.
    return type(config) in kind._model_mapping or name in getattr(config, "auto_map", {})


def load_tokenizer(spec: BaseSpec) -> Any:
    """The base model's tokenizer.

    Raises:
        MergeError: there is none.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            spec.path, revision=spec.revision or "main", trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise MergeError(
            f"base model {spec.path!r} has no tokenizer, which text data needs: {error}"
        ) from error
