"""Errors that a user can act on."""

__all__ = ["MergeError", "RecipeError"]


class MergeError(RuntimeError):
    """A merge that cannot go on; the message names the task or module and the way out."""


class RecipeError(MergeError):
    """A recipe or option that cannot be read; the message names the key."""
