"""The command line's options as a recipe."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from . import methods
from .cli_tables import console
from .errors import RecipeError
from .recipe import Recipe, make_recipe, read_content

__all__ = ["recipe_of"]


def recipe_of(
    file: Path | None,
    adapters: list[str] | None = None,
    data: list[str] | None = None,
    text: str | None = None,
    *,
    method: str | None = None,
    settings: list[str] | None = None,
    seed: int | None = None,
    modules_to_save: str | None = None,
    base: Mapping[str, Any] | None = None,
    output: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe from a file with flags over it, or from flags alone.

    Args:
        file: the recipe's.
        adapters, data, text: in place of a file.
        method, settings, seed, modules_to_save: over ``merge_method``, ``parameters``, ``seed`` and
            ``modules_to_save``. Parameters of the file's method that another one does not have are left out,
            with a notice.
        base, output: over single fields of ``base_model`` and ``output``; None and False: not given.

    Raises:
        RecipeError: as of :func:`nsc_fast.recipe.make_recipe`, or flags that contradict each other.
    """
    if file is not None:
        if adapters or data:
            raise RecipeError("give a recipe or --adapter/--data flags, not both")
        content = read_content(file)
    else:
        content = {"adapters": _flag_adapters(adapters or [], data or [], text)}
    if method is not None:
        content["parameters"] = _shared(content, method)
        content["merge_method"] = method
    if seed is not None:
        content["seed"] = seed
    if modules_to_save is not None:
        content["modules_to_save"] = modules_to_save
    for setting in settings or []:
        content["parameters"] = _with(content.get("parameters"), setting)
    if given := _given(base):
        content["base_model"] = _base_of(content.get("base_model"), given)
    if given := _given(output):
        content["output"] = {**(content.get("output") or {}), **given}
    return make_recipe(content, where=str(file or "flags"), folder=file.parent if file else None)


def _with(parameters: Any, setting: str) -> dict[str, Any]:
    """Parameters with one ``KEY=VALUE`` of ``--set`` over them; dots lead into a mapping."""
    key, equals, text = setting.partition("=")
    if not equals:
        raise RecipeError(f"--set {setting!r}: write KEY=VALUE")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {setting!r}: the value is not readable: {error}") from error
    changed = copy.deepcopy(parameters)
    if changed is None:
        changed = {}
    target, path = changed, "parameters"
    *outer, last = key.split(".")
    for part in [*outer, None]:
        if not isinstance(target, dict):
            raise RecipeError(f"--set {setting!r}: {path} is {target!r}, which has no keys")
        if part is not None:
            if target.get(part) is None:
                target[part] = {}
            target, path = target[part], f"{path}.{part}"
    target[last] = value
    return changed


def _shared(content: dict[str, Any], method: str) -> Any:
    """The file's parameters, without those that its own method has and ``method`` does not."""
    own, given = content.get("merge_method", "nsc"), content.get("parameters")
    if not isinstance(given, dict) or not isinstance(own, str) or own == method:
        return given
    lost = set(methods.get(own).parameters.model_fields) - set(methods.get(method).parameters.model_fields)
    left = [key for key in given if key in lost]
    if left:
        console.print(
            f"note: --method {method}: the recipe's parameters {', '.join(left)} are those of {own!r} and "
            "left out",
            markup=False,
            highlight=False,
        )
    return {key: value for key, value in given.items() if key not in lost}


def _given(options: Mapping[str, Any] | None) -> dict[str, Any]:
    # Not by equality: 0 is a number that somebody gave.
    return {key: value for key, value in (options or {}).items() if value is not None and value is not False}


def _base_of(base: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The recipe's base model with flags over it; another path leaves no revision of the old one."""
    own = {"path": base} if isinstance(base, str) else dict(base or {})
    if "path" in given:
        own = {key: value for key, value in own.items() if key not in ("revision", "subfolder")}
    elif "path" not in own:
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in given).replace("--shard", "--shard-base")
        raise RecipeError(f"{flags}: name the base model, too, with --base-model or in the recipe")
    if isinstance(text := given.get("device_map"), str) and text.lstrip().startswith("{"):
        try:
            given = {**given, "device_map": yaml.safe_load(text)}
        except yaml.YAMLError as error:
            raise RecipeError(f"--device-map {text!r} is not readable: {error}") from error
    return {**own, **given}


def _flag_adapters(adapters: list[str], data: list[str], text: str | None) -> list[dict[str, Any]]:
    if not adapters:
        raise RecipeError("nothing to merge: give a recipe, or --adapter NAME=PATH for every adapter")
    columns = text.split(",") if text is not None and "," in text else text
    files = {}
    for item in data:
        name, equals, path = item.partition("=")
        if not equals:
            raise RecipeError(f"--data {item!r}: write NAME=PATH")
        files[name] = path
    out = []
    for item in adapters:
        name, equals, path = item.partition("=")
        if not equals:
            name, path = Path(item).name, item
        spec: dict[str, Any] = {"name": name, "path": path}
        if name in files:
            spec["data"] = {"path": files.pop(name), **({} if columns is None else {"text": columns})}
        out.append(spec)
    if files:
        raise RecipeError(f"--data names {next(iter(files))!r}, which is no adapter")
    return out
