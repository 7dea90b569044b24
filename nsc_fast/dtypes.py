"""In which dtype sums are formed."""

from __future__ import annotations

import torch

__all__ = ["compute_dtype"]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for all others: bfloat16 and float16 lose what a sum adds up to."""
    return torch.float64 if dtype == torch.float64 else torch.float32
