"""Which source a path is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MergeError
from ..recipe import DataSpec
from .sources import CsvFile, Files, Indexed, Items, JsonFile, LineFile, Many, Source
from .tables import ParquetFile, hub_dataset, saved_dataset

__all__ = ["open_rows", "open_source"]

_KINDS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "table",
    ".tsv": "table",
    ".txt": "text",
    ".parquet": "parquet",
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"), "image"),
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def open_source(task: str, spec: DataSpec) -> Source:
    """The source that a recipe names: a file, a folder, or a hub id.

    Raises:
        MergeError: nothing there, or a kind of file that cannot be read.
    """
    path = Path(spec.path)
    if path.is_dir():
        return _folder(task, path, spec)
    if path.is_file():
        return _file(task, path, _kind(path), bool(spec.documents))
    if _HUB_ID.fullmatch(spec.path) and _kind(path) is None and not path.parent.exists():
        return hub_dataset(task, spec)
    raise MergeError(f"task {task!r}: there is no data file {spec.path!r}")


def open_rows(task: str, rows: Iterable[Any]) -> Source:
    """The source of rows that a program has: a sequence, a dataset, or anything that can be iterated.

    Raises:
        MergeError: a mapping of splits or tasks instead of rows.
    """
    if isinstance(rows, Mapping):
        raise MergeError(f"task {task!r}: the rows are a mapping of {', '.join(map(str, rows))}; choose one")
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        return Indexed(task, "the rows", rows)
    return Items(task, "the rows", rows)


def _kind(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return _KINDS.get(Path(name).suffix)


def _file(task: str, path: Path, kind: str | None, documents: bool) -> Source:
    if kind == "text":
        if documents:
            return Files(task, path.parent, [path], images=False)
        return LineFile(task, path, as_json=False)
    if kind == "image":
        return Files(task, path.parent, [path], images=True)
    if kind == "table":
        return CsvFile(task, path)
    if kind == "parquet":
        return ParquetFile(task, path)
    if kind == "json" and _whole(path):
        return JsonFile(task, path)
    if kind is None and path.suffix.lower() != ".gz" and not _begins_with(path, b"{"):
        raise MergeError(
            f"task {task!r}: {path.name}: unknown kind of file; known are {', '.join(_KINDS)} and .gz of them"
        )
    return LineFile(task, path, as_json=True)


def _whole(path: Path) -> bool:
    """Whether a .json file is one value, rather than one value a line."""
    if path.suffix.lower() == ".gz" or _begins_with(path, b"["):
        return True
    with path.open("rb") as file:
        first, second = file.readline().strip(), file.readline()
    return not (second and first.startswith(b"{") and first.endswith(b"}"))


def _begins_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(start)


def _folder(task: str, folder: Path, spec: DataSpec) -> Source:
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return saved_dataset(task, folder, spec.split)
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and not hidden and (kind := _kind(file)) is not None:
            files.setdefault(kind, []).append(file)
    if spec.format == "image" and "image" in files:
        files = {"image": files["image"]}
    if len(files) != 1:
        held = ", ".join(f"{len(own)} {kind}" for kind, own in files.items()) or "no data file"
        raise MergeError(
            f"task {task!r}: the folder {str(folder)!r} holds {held}; give a file, a folder of one kind, or "
            "format: image"
        )
    ((kind, own),) = files.items()
    return _many(task, folder, kind, own, spec)


def _many(task: str, folder: Path, kind: str, files: Sequence[Path], spec: DataSpec) -> Source:
    if kind == "image" or (kind == "text" and spec.documents is not False):
        return Files(task, folder, files, images=kind == "image")
    return Many(task, folder, [_file(task, file, kind, False) for file in files])
