"""A random Llama of a given shape, for the benchmarks that need one without a head."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["random_llama"]


def random_llama(
    hidden: int,
    wide: int,
    heads: int,
    of_keys: int,
    blocks: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Frozen, with 60 words; ``wide``: width of the feed-forward part, ``of_keys``: heads of the keys."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=wide,
        num_attention_heads=heads,
        num_key_value_heads=of_keys,
        num_hidden_layers=blocks,
        vocab_size=60,
    )
    with torch.device(device):
        return LlamaModel(config).to(dtype).eval().requires_grad_(False)
