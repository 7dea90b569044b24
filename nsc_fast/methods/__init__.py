"""Merging methods: one small file each, all from the same canonical factors to the same MergeResult.

A new method is one file with a :class:`Method` and one line in ``_MODULES``.
"""

from __future__ import annotations

import difflib
from importlib import import_module

from ..errors import RecipeError
from .base import MergeInputs, Method

__all__ = ["MergeInputs", "Method", "get", "names"]

# Name -> module that defines METHOD. Loaded on use.
_MODULES = {
    "nsc": "nsc",
    "anchored": "anchored",
    "closed_form": "closed_form",
    "auto": "auto",
    "adamerging": "adamerging",
    "task_arithmetic": "task_arithmetic",
    "uniform": "uniform",
    "ties": "ties",
    "dare": "dare",
    "dare_ties": "dare_ties",
    "knots_ties": "knots_ties",
    "knots_dare_ties": "knots_dare_ties",
    "core_space": "core_space",
    "tsv": "tsv",
    "iso_c": "iso_c",
    "iso_cts": "iso_cts",
    "robust_merge": "robust_merge",
    "lego": "lego",
    "lore": "lore",
    "linear": "linear",
    "reversible": "reversible",
}


def names() -> tuple[str, ...]:
    """Names of all methods."""
    return tuple(_MODULES)


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        RecipeError: there is none; names the nearest.
    """
    if name not in _MODULES:
        near = difflib.get_close_matches(name, _MODULES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(_MODULES)}"
        raise RecipeError(f"unknown merge method {name!r}; {hint}")
    return import_module(f"{__name__}.{_MODULES[name]}").METHOD
