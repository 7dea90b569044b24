"""The recipe: what to merge. Frozen, validated before anything is loaded; an unknown key is an error."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from string import Formatter
from typing import Any, Literal

import torch
import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from .errors import MergeError, RecipeError
from .memory import parse_bytes
from .parameters import Strict

__all__ = [
    "AdapterSpec",
    "BaseSpec",
    "DataOptions",
    "DataSpec",
    "OutputSpec",
    "Recipe",
    "load_recipe",
    "make_recipe",
    "parameters_of",
    "read_content",
    "template_columns",
]


class BaseSpec(Strict):
    """The base model: hub id or folder.

    Attributes:
        dtype: of the weights. "auto": as the checkpoint has them.
        trust_remote_code: run code that comes with the checkpoint.
        device_map: where its parts go, as in transformers: "auto", "balanced", ... or module path -> device,
            "cpu" or "disk". Default: all on the device of the merge.
        load_in_4bit, load_in_8bit: quantise the frozen base while it is loaded. The adapters and the merge
            stay in full precision, and a full model is written from the files, which are not quantised.
        quant_method: what quantises; torchao for 8 bits only. Default: bitsandbytes.
        shard: divide its blocks among the processes of a launcher (FSDP2), for a base that does not fit on
            one device. Each process reads it into the host's memory first; in the dtype of its files, the
            processes of a machine share that memory.
    """

    path: str
    revision: str | None = None
    subfolder: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    device_map: str | dict[str, int | str] | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    quant_method: Literal["bitsandbytes", "torchao"] | None = None
    shard: bool = False

    @property
    def quantised(self) -> bool:
        """Whether the base is quantised while it is loaded."""
        return self.load_in_4bit or self.load_in_8bit

    @model_validator(mode="after")
    def _one_width(self) -> BaseSpec:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit: choose one")
        if self.quant_method is not None and not self.quantised:
            raise ValueError("quant_method: say load_in_4bit or load_in_8bit, too")
        if self.load_in_4bit and self.quant_method == "torchao":
            raise ValueError("quant_method torchao is for load_in_8bit; bitsandbytes does 4 bits")
        return self

    @model_validator(mode="after")
    def _placed_once(self) -> BaseSpec:
        if self.shard and self.quantised:
            raise ValueError(
                "shard: quantised weights cannot be sharded; leave load_in_4bit/8bit or shard out"
            )
        if self.shard and self.device_map is not None:
            raise ValueError("shard and device_map both say where the weights are; choose one")
        whole = not isinstance(self.device_map, dict)
        places = {self.device_map} if whole else set(self.device_map.values())
        for place in places:
            _check_place(place, whole=whole)
        if self.quantised and ("disk" in places or ("cpu" in places and len(places) > 1)):
            raise ValueError(
                "device_map: a base that is quantised while it is loaded has no part on 'disk', and on 'cpu' "
                "all parts or none"
            )
        return self


_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def _check_place(place: int | str | None, *, whole: bool) -> None:
    if place is None or isinstance(place, int) or place == "disk" or (whole and place in _MAPS):
        return
    try:
        torch.device(place)
    except RuntimeError as error:
        known = f"{', '.join(_MAPS)}, or " if whole else ""
        raise ValueError(
            f"device_map: {place!r} is no place; write {known}a device such as 'cuda:0'"
        ) from error


class DataOptions(Strict):
    """How rows become model inputs. Only inputs are read; every other column is left alone.

    Attributes:
        format: what a row is. "auto" takes what the other options and the columns tell.
        text: column of the text, or the two of a pair. Default: a well-known name, with a notice.
        template: text with columns in braces, ``"Question: {q}\\nAnswer:"``, instead of ``text``.
        messages: column of a chat's messages. Default: "messages" or "conversations".
        image: column of the images: paths (from the data file's folder), bytes or PIL images. Beside a chat
            (messages, or format "chat") also lists of them, and some rows may have none.
        keep_answer: keep an assistant's message at the end of a chat. It is the label, so by default it is
            left out.
        generation_prompt: end a chat without its answer in what the chat template puts before an answer.
        num_samples: rows drawn with the recipe's seed; all where there are fewer.
        batch_size: rows of a batch.
        max_length: tokens of a row, the rest is cut with a notice. Default: 512, or what the model can take.
    """

    format: Literal["auto", "text", "pair", "chat", "image"] = "auto"
    text: str | tuple[str, str] | None = None
    template: str | None = None
    messages: str | None = None
    image: str | None = None
    keep_answer: bool = False
    generation_prompt: bool = True
    num_samples: int = Field(256, ge=1)
    batch_size: int = Field(16, ge=1)
    max_length: int | None = Field(None, ge=1)

    @field_validator("template")
    @classmethod
    def _columns_only(cls, value: str | None) -> str | None:
        if value is not None:
            template_columns(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> DataOptions:
        if self.template is not None and self.text is not None:
            raise ValueError("give text or template, not both: a template names its columns itself")
        if self.messages is not None and (self.text is not None or self.template is not None):
            raise ValueError("messages make a chat by themselves: leave text and template out")
        fits = {
            "text": ("text", "template"),
            "pair": ("text",),
            "chat": ("messages", "image"),
            "image": ("image", "text", "template"),
        }
        for key in ("text", "template", "messages", "image"):
            if self.format != "auto" and getattr(self, key) is not None and key not in fits[self.format]:
                raise ValueError(f"format {self.format!r} has no {key}")
        if self.format in ("text", "pair") and self.text is not None:
            if isinstance(self.text, str) != (self.format == "text"):
                raise ValueError(f"format {self.format!r} and the number of columns in text do not agree")
        if self.image is not None and isinstance(self.text, tuple):
            raise ValueError("beside an image, text is one column")
        return self


class DataSpec(DataOptions):
    """Unlabeled data of one task, and where they are.

    Attributes:
        path: JSON lines, JSON, CSV, TSV, text or Parquet file, a folder of one kind of them or of images,
            a folder that ``datasets`` saved, or a dataset's hub id.
        documents: of text files: each is one row. Default: in a folder of them; of a single file, a line is.
        subset: configuration of a hub dataset.
        split: of a hub dataset. Default: "train".
        revision: of a hub dataset.
    """

    path: str
    documents: bool | None = None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None


def template_columns(template: str) -> tuple[str, ...]:
    """Columns that a template names, in order.

    Raises:
        ValueError: no column, or more than a name in the braces.
    """
    names = []
    for _, name, form, conversion in Formatter().parse(template):
        if name is None:
            continue
        if not name or form or conversion or any(c in name for c in ".[]"):
            raise ValueError(f"template: write one column's name in the braces, not {{{name}}}; {{{{ for {{")
        names.append(name)
    if not names:
        raise ValueError("template: names no column; write {column}")
    return tuple(dict.fromkeys(names))


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
    """What is written.

    Attributes:
        kind: "lora", or "full": the base model with the merged LoRA in its weights.
        max_rank: truncate; without it the merged LoRA is lossless (sum of the ranks).
        dtype: of the factors, float32 by default; of a full model's weights, "auto" by default: as in the
            base's files.
        shard_size: of a full model: its weight files are no larger, "5GB" by default.
    """

    kind: Literal["lora", "full"] = "lora"
    max_rank: int | None = Field(None, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    shard_size: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _own_default(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("kind") == "full":
            return {"dtype": "auto", **value}
        return value

    @model_validator(mode="after")
    def _of_its_kind(self) -> OutputSpec:
        if self.kind == "lora" and self.dtype == "auto":
            raise ValueError("dtype auto is that of the base's files: for kind full")
        if self.kind == "lora" and self.shard_size is not None:
            raise ValueError("shard_size is for kind full; a LoRA is one file")
        if self.shard_size is not None:
            try:
                parse_bytes(self.shard_size)
            except MergeError as error:
                raise ValueError(f"shard_size: {error}") from error
        return self


class Recipe(Strict):
    """A merge, in the shape that mergekit's users know."""

    base_model: BaseSpec | None = None
    merge_method: str = "nsc"
    adapters: tuple[AdapterSpec, ...] = Field(min_length=1)
    parameters: dict[str, Any] = {}
    output: OutputSpec = OutputSpec()
    modules_to_save: Literal["error", "drop", "keep-separate", "merge-dense"] = "error"
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _empty_is_absent(cls, value: Any) -> Any:
        # In YAML a key with nothing behind it is null.
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value

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
        return parameters_of(self.merge_method, self.parameters)


def parameters_of(method: str, content: Mapping[str, Any]) -> Strict:
    """Parameters of a method, validated; errors as of :meth:`Recipe.method_parameters`."""
    from . import methods

    try:
        return methods.get(method).parameters.model_validate(dict(content))
    except ValidationError as error:
        raise RecipeError(_readable(error, f"parameters of {method!r}")) from error


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
        what = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            what = "unknown key"
        elif problem["type"] == "too_short":
            what = f"give at least {problem['ctx']['min_length']}"
        lines.append(f"{where}: {key}: {what}")
    return "\n".join(lines)
