"""Tokenizer, processors and limits of the base model, each loaded when it is first needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import MergeError
from ..loading import load_tokenizer
from ..recipe import BaseSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BaseProcessors", "Limits", "limits_of"]

# These keep the first rows of their position table for padding.
_OFFSET = ("roberta", "camembert", "xlm-roberta", "xlm-roberta-xl", "xmod", "longformer", "mpnet", "esm")


@dataclass(frozen=True)
class Limits:
    """What a model can take; None where nothing says so.

    Attributes:
        positions: tokens of a sequence.
        vocabulary: token ids are below this.
        decoder_start: first token of what a decoder beside an encoder writes.
    """

    positions: int | None = None
    vocabulary: int | None = None
    decoder_start: int | None = None


def limits_of(config: Any) -> Limits:
    """Limits that a transformers configuration states."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and text.model_type in _OFFSET:
        positions -= (text.pad_token_id or 0) + 1
    start = None
    if getattr(config, "is_encoder_decoder", False):
        # T5 starts with its padding token and need not say so.
        named = (getattr(config, key, None) for key in ("decoder_start_token_id", "pad_token_id"))
        start = next((token for token in named if token is not None), None)
    # Some configurations write -1 for "any length".
    positions = positions if positions and positions > 0 else None
    return Limits(positions, getattr(text, "vocab_size", None), start)


@dataclass
class BaseProcessors:
    """What turns rows into the base model's inputs.

    Attributes:
        chat_templates: task -> chat template that its adapter brings; the base's otherwise.
    """

    base: BaseSpec
    chat_templates: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.base)

    @cached_property
    def images(self) -> Any:
        """The image processor."""
        return self._load("AutoImageProcessor")

    @cached_property
    def joint(self) -> Any:
        """The processor of images and texts together."""
        processor = self._load("AutoProcessor")
        if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
            raise MergeError(
                f"base model {self.base.path!r} has no processor for images with texts (it has a "
                f"{type(processor).__name__}); leave text or image out, or pass batches in Python"
            )
        return processor

    @cached_property
    def limits(self) -> Limits:
        import transformers

        return limits_of(transformers.AutoConfig.from_pretrained(self.base.path, **self._options()))

    def _load(self, auto: str) -> Any:
        import transformers

        try:
            return getattr(transformers, auto).from_pretrained(self.base.path, **self._options())
        except (OSError, ValueError, ImportError) as error:
            raise MergeError(
                f"base model {self.base.path!r} has no processor, which image data need "
                f"(preprocessor_config.json): {error}. Copy it from the model that the base comes from, or "
                "pass batches in Python"
            ) from error

    def _options(self) -> dict[str, Any]:
        options = {"revision": self.base.revision, "subfolder": self.base.subfolder}
        given = {key: value for key, value in options.items() if value is not None}
        return {**given, "trust_remote_code": self.base.trust_remote_code}
