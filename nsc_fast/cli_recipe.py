"""The command line's options as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .errors import RecipeError
from .recipe import Recipe, make_recipe, read_content

__all__ = ["recipe_of"]


def recipe_of(
    file: Path | None,
    base_model: str | None = None,
    adapters: list[str] | None = None,
    data: list[str] | None = None,
    text: str | None = None,
    method: str | None = None,
    settings: list[str] | None = None,
    max_rank: int | None = None,
    out_dtype: str | None = None,
    seed: int | None = None,
) -> Recipe:
    """The recipe from a file with flags over it, or from flags alone."""
    if file is not None:
        if adapters or data:
            raise RecipeError("give a recipe or --adapter/--data flags, not both")
        content = read_content(file)
    else:
        content = {"adapters": _flag_adapters(adapters or [], data or [], text)}
    if base_model is not None:
        content["base_model"] = base_model
    if method is not None:
        content["merge_method"] = method
    if seed is not None:
        content["seed"] = seed
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise RecipeError(f"--set {setting!r}: write KEY=VALUE")
        target = content.setdefault("parameters", {})
        *outer, last = key.split(".")
        for part in outer:
            target = target.setdefault(part, {})
        target[last] = yaml.safe_load(value)
    for key, value in (("max_rank", max_rank), ("dtype", out_dtype)):
        if value is not None:
            content.setdefault("output", {})[key] = value
    return make_recipe(content, where=str(file or "flags"), folder=file.parent if file else None)


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
