"""Differentiable operations: registered with torch.library, with a hand-written backward."""

from .merged_linear import Sibling, low_rank_update, merged_linear, merged_siblings
from .null_space_ratio import null_space_ratio

__all__ = ["Sibling", "low_rank_update", "merged_linear", "merged_siblings", "null_space_ratio"]
