"""Differentiable operations: registered with torch.library, with a hand-written backward."""

from .merged_linear import low_rank_update, merged_linear
from .null_space_ratio import null_space_ratio

__all__ = ["low_rank_update", "merged_linear", "null_space_ratio"]
