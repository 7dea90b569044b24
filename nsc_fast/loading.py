"""The base model as the adapters know it: the Auto class whose module paths fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .errors import MergeError
from .recipe import BaseSpec

__all__ = ["load_base", "load_tokenizer"]

# PEFT's task type -> transformers' Auto class. The plain model comes last: it fits adapters of the backbone.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_FALLBACKS = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageClassification")


def load_base(
    spec: BaseSpec, modules: Iterable[str], *, task_type: str | None, device: str | torch.device = "cpu"
) -> nn.Module:
    """Loads the base model in the class whose module paths hold all adapted modules.

    Args:
        spec: where it is.
        modules: paths that the adapters adapt.
        task_type: of the adapters, the first guess for the class.

    Raises:
        MergeError: the model cannot be loaded, or no class has the modules; says which are missing.
    """
    import transformers

    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    for key in ("revision", "subfolder"):
        if getattr(spec, key) is not None:
            options[key] = getattr(spec, key)
    try:
        config = transformers.AutoConfig.from_pretrained(spec.path, **options)
    except (OSError, ValueError) as error:
        raise MergeError(f"base model {spec.path!r} cannot be read: {error}") from error
    wanted = list(modules)
    first = _CLASSES.get(task_type or "")
    missing: list[str] = wanted
    for name in dict.fromkeys([first, *_FALLBACKS] if first else _FALLBACKS):
        auto = getattr(transformers, name)
        if type(config) not in auto._model_mapping:
            continue
        with torch.device("meta"):
            skeleton = auto.from_config(config, trust_remote_code=spec.trust_remote_code)
        present = {path for path, _ in skeleton.named_modules()}
        lacking = [path for path in wanted if path not in present]
        if not lacking:
            dtype = spec.dtype if spec.dtype == "auto" else getattr(torch, spec.dtype)
            model = auto.from_pretrained(spec.path, dtype=dtype, **options)
            return model.to(device).eval()
        missing = min(missing, lacking, key=len)
    raise MergeError(
        f"base model {spec.path!r} ({config.model_type}) has no module {missing[0]!r} "
        f"({len(missing)} of {len(wanted)} adapted modules are missing); is it the base of these adapters?"
    )


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
