"""The recipe: what to merge. Frozen, validated before anything is loaded; an unknown key is an error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from .errors import RecipeError
from .parameters import Strict

__all__ = [
    "AdapterSpec",
    "BaseSpec",
    "DataSpec",
    "OutputSpec",
    "Recipe",
    "load_recipe",
    "make_recipe",
    "read_content",
]


class BaseSpec(Strict):
    """The base model: hub id or folder."""

    path: str
    revision: str | None = None
    subfolder: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False


class DataSpec(Strict):
    """Unlabeled text of one task: a JSONL file, of which only the named columns are read.

    ``text`` is one column, or two for sentence pairs. Rows are drawn with the recipe's seed.
    """

    path: str
    text: str | tuple[str, str] = "text"
    num_samples: int = Field(256, ge=1)
    batch_size: int = Field(16, ge=1)
    max_length: int = Field(512, ge=1)


class Weighting(Strict):
    """Initial value (optimising methods) or fixed value (all others) of a task's coefficient."""

    weight: float | None = None


class AdapterSpec(Strict):
    """One adapter: hub id or folder, with its unlabeled data."""

    name: str = Field(min_length=1)
    path: str
    revision: str | None = None
    subfolder: str | None = None
    data: DataSpec | None = None
    parameters: Weighting = Weighting()


class OutputSpec(Strict):
    """What is written. ``max_rank``: truncate; without it the output is lossless (sum of the ranks)."""

    kind: Literal["lora"] = "lora"
    max_rank: int | None = Field(None, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class Recipe(Strict):
    """A merge, in the shape that mergekit's users know."""

    base_model: BaseSpec | None = None
    merge_method: str = "nsc"
    adapters: tuple[AdapterSpec, ...] = Field(min_length=1)
    parameters: dict[str, Any] = {}
    output: OutputSpec = OutputSpec()
    modules_to_save: Literal["error", "drop", "keep-separate"] = "error"
    seed: int = 0

    @field_validator("base_model", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _distinct(self) -> Recipe:
        names = [adapter.name for adapter in self.adapters]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two adapters are named {twice[0]!r}")
        return self

    def method_parameters(self) -> Strict:
        """The method's parameters, validated.

        Raises:
            RecipeError: unknown method, or parameters that it does not have.
        """
        from . import methods

        try:
            return methods.get(self.merge_method).parameters(**self.parameters)
        except ValidationError as error:
            raise RecipeError(_readable(error, f"parameters of {self.merge_method!r}")) from error


def load_recipe(path: str | os.PathLike[str], **changes: Any) -> Recipe:
    """Reads and validates a YAML recipe.

    Relative paths in it are taken from the recipe's folder where they exist there. ``~`` and environment
    variables are expanded in paths only.

    Args:
        path: the YAML file.
        changes: top-level keys that replace those of the file (command-line flags).

    Raises:
        RecipeError: missing or unreadable file, unknown key, wrong type; names the key.
    """
    file = Path(path)
    return make_recipe({**read_content(file), **changes}, where=str(file), folder=file.parent)


def read_content(file: Path) -> dict[str, Any]:
    """What stands in a recipe's file, not yet validated; errors as of :func:`load_recipe`."""
    if not file.is_file():
        raise RecipeError(f"there is no recipe {str(file)!r}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: not a readable YAML file: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: a recipe is a mapping with 'adapters' in it")
    return content


def make_recipe(content: dict[str, Any], *, where: str, folder: Path | None = None) -> Recipe:
    """Validates the content of a recipe; see :func:`load_recipe`."""
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(_readable(error, where)) from error
    folder = folder or Path.cwd()
    base = recipe.base_model
    if base is not None:
        base = base.model_copy(update={"path": _path(base.path, folder)})
    adapters = []
    for spec in recipe.adapters:
        changes: dict[str, Any] = {"path": _path(spec.path, folder)}
        if spec.data is not None:
            changes["data"] = spec.data.model_copy(update={"path": _path(spec.data.path, folder)})
        adapters.append(spec.model_copy(update=changes))
    recipe = recipe.model_copy(update={"adapters": tuple(adapters), "base_model": base})
    recipe.method_parameters()
    return recipe


def _path(value: str, folder: Path) -> str:
    """Expanded; taken from the recipe's folder if it exists there, otherwise left (a hub id, say)."""
    expanded = Path(os.path.expandvars(value)).expanduser()
    beside = folder / expanded
    return str(beside.resolve()) if beside.exists() else os.path.expandvars(value)


def _readable(error: ValidationError, where: str) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "recipe"
        what = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
        lines.append(f"{where}: {key}: {what}")
    return "\n".join(lines)
