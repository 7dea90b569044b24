"""Whether float32 products may run in tf32. One rule for the whole package: what the user allowed torch."""

from __future__ import annotations

import torch

__all__ = ["tf32_allowed"]


def tf32_allowed() -> bool:
    """Whether torch's own products on an NVIDIA device may round float32 to tf32, by whichever of torch's
    settings the user said so."""
    matmul = torch.backends.cuda.matmul
    try:
        # The resolved state. The older getters raise once the setting was made in the newer way.
        return matmul.fp32_precision == "tf32"
    except AttributeError:  # before torch 2.9
        return matmul.allow_tf32
