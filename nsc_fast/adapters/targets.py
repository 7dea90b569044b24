"""Which modules a config selects, and which plain suffixes select given modules of a base model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from nsc_fast.adapters.model import AdapterError, Problem

__all__ = ["Shapes", "choose_targets", "selected_by", "suffixes_of", "target_problems"]

# (d_out, d_in) of every linear module of a base; None for a module that is not linear.
Shapes = Mapping[str, "tuple[int, int] | None"]


def suffixes_of(name: str) -> list[str]:
    """Every end of a path at a dot, shortest first, the path itself last.

    An entry of a ``target_modules`` list selects a module exactly when it is one of these.
    """
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def selected_by(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would adapt a module of that path for this config.

    ``target_modules`` of null or ``all-linear`` depend on the base's architecture and select
    anything here.
    """
    excluded = config.get("exclude_modules")
    if excluded and _matches_any(excluded, module):
        return False
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return True
    if not _matches_any(targets, module):
        return False
    return isinstance(targets, str) or module in targets or _layer_selected(config, module)


def _matches_any(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(suffix in names for suffix in suffixes_of(module))


def _layer_selected(config: Mapping[str, Any], module: str) -> bool:
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns = config.get("layers_pattern") or r"[^.]*"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # Lazy, so that the layer is the first numbered part: "layers.1.experts.0" is in layer 1.
    start = r".*?\." if not config.get("layers_pattern") else r"(?:^|.*?\.)"
    for pattern in patterns:
        found = re.match(rf"{start}{pattern}\.(?P<layer>\d+)\.", module)
        if found:
            return int(found["layer"]) in (wanted if isinstance(wanted, list) else [wanted])
    return False


def target_problems(config: Mapping[str, Any], modules: Collection[str]) -> list[Problem]:
    """Differences between the modules that the file holds and those that the config names.

    The tensors are the truth; a difference means that config and weights do not belong together
    or that a part of the file is missing.
    """
    problems = [
        Problem(
            f"module {module!r}",
            "the file holds factors for it, but target_modules, exclude_modules and "
            "layers_to_transform do not select it",
            "use the adapter_config.json that belongs to these weights",
        )
        for module in modules
        if not selected_by(config, module)
    ]
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear" or not modules:
        return problems
    patterns = [targets] if isinstance(targets, str) else targets
    for pattern in patterns:
        names = pattern if isinstance(targets, str) else [pattern]
        if not any(_matches_any(names, module) for module in modules):
            problems.append(
                Problem(
                    f"target_modules entry {pattern!r}",
                    "the file holds no factors for it",
                    "get the complete weights, or remove the entry from adapter_config.json if "
                    "the base has no such module",
                )
            )
    return problems


def choose_targets(adapted: Collection[str], base: Shapes) -> list[str]:
    """Plain suffixes for ``target_modules``: the adapted modules and as little else as possible.

    Servers understand plain suffixes only, not regular expressions. A suffix without a layer
    number is preferred, even where it selects further layers of the same kind (they get zero
    factors). It may not select another kind of module (the vision tower's ``q_proj`` beside the
    language model's; in BERT ``attention.output.dense`` beside ``output.dense``) as long as a
    longer one can avoid that, and never a module that is not linear: PEFT could not load it.

    Args:
        adapted: module paths, each a linear module of ``base``.
        base: all modules of the base.

    Returns:
        Sorted suffixes.

    Raises:
        AdapterError: a module cannot be told apart from one that is not linear.
    """
    selected: dict[str, list[str]] = {}
    for name in base:
        for suffix in suffixes_of(name):
            selected.setdefault(suffix, []).append(name)
    kinds = {_kind(name) for name in adapted}
    known = frozenset(adapted)

    def cost(suffix: str) -> tuple[int, bool, int, int]:
        extra = [name for name in selected[suffix] if name not in known]
        foreign = sum(_kind(name) not in kinds for name in extra)
        numbered = _numbered(suffix)
        # Without a number all layers of the adapted kinds are selected in any case.
        return foreign, numbered, len(extra) if numbered else 0, suffix.count(".")

    chosen: set[str] = set()
    for name in adapted:
        linear = [s for s in suffixes_of(name) if all(base[n] is not None for n in selected[s])]
        if not linear:
            raise AdapterError(
                "output",
                Problem(
                    f"module {name!r}",
                    "no suffix of its path avoids modules that are not linear",
                    "leave this module out of the merge",
                ),
            )
        chosen.add(min(linear, key=cost))
    return sorted(_without_redundant(chosen, selected))


def _kind(name: str) -> str:
    """The path without its layer numbers: modules of one kind repeat from layer to layer."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _numbered(suffix: str) -> bool:
    return any(part.isdigit() for part in suffix.split("."))


def _without_redundant(chosen: Iterable[str], selected: Mapping[str, list[str]]) -> set[str]:
    """Drops suffixes whose modules others select already, longest first."""
    kept = set(chosen)
    for suffix in sorted(kept, key=lambda s: (-s.count("."), s)):
        others = {name for other in kept - {suffix} for name in selected[other]}
        if others.issuperset(selected[suffix]):
            kept.remove(suffix)
    return kept
