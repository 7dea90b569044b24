"""Parquet files and ``datasets``, through the optional extra ``data``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import MergeError
from ..recipe import DataSpec
from .sources import Indexed, Row, Source

__all__ = ["ParquetFile", "hub_dataset", "optional", "saved_dataset"]


def optional(task: str, module: str, what: str) -> Any:
    """A module of the extra ``data``.

    Raises:
        MergeError: it is not installed; names the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MergeError(
            f"task {task!r}: {what} needs {module.partition('.')[0]}, which cannot be imported ({error}); "
            "pip install 'nsc-fast[data]'"
        ) from error


class ParquetFile(Source):
    """Rows of a Parquet file; only the columns that are asked for are read."""

    def __init__(self, task: str, path: Path) -> None:
        super().__init__(task, path.name, path.parent)
        self._arrow = optional(task, "pyarrow", "a Parquet file")
        parquet = optional(task, "pyarrow.parquet", "a Parquet file")
        try:
            self._file = parquet.ParquetFile(path)
        except (OSError, self._arrow.ArrowException) as error:
            raise MergeError(f"task {task!r}: {path.name}: not a readable Parquet file: {error}") from error

    def columns(self) -> tuple[str, ...]:
        return tuple(self._file.schema_arrow.names)

    def records(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Any]]:
        number = 0
        try:
            for batch in self._file.iter_batches(columns=None if columns is None else list(columns)):
                for index in range(batch.num_rows):
                    number += 1
                    yield number, (batch, index)
        except (OSError, self._arrow.ArrowException) as error:
            raise self.error(number + 1, f"cannot be read: {error}; copy or save the file again") from error

    def parse(self, number: int, raw: Any) -> Row:
        batch, index = raw
        return {name: batch.column(name)[index].as_py() for name in batch.schema.names}


def saved_dataset(task: str, folder: Path, split: str | None) -> Source:
    """A folder that ``Dataset.save_to_disk`` wrote."""
    datasets = optional(task, "datasets", "a folder that datasets saved")
    return _one_split(task, folder.name, datasets.load_from_disk(str(folder)), split)


def hub_dataset(task: str, spec: DataSpec) -> Source:
    """A dataset of the hub, or one that ``datasets`` has in its cache.

    Raises:
        MergeError: unknown id, subset or split, or the hub is out of reach.
    """
    datasets = optional(task, "datasets", f"the hub dataset {spec.path!r}")
    try:
        found = datasets.load_dataset(spec.path, name=spec.subset, revision=spec.revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise MergeError(
            f"task {task!r}: dataset {spec.path!r} cannot be loaded: {reason}; check the id, data.subset and "
            "data.revision, or give the path of a file"
        ) from error
    return _one_split(task, spec.path, found, spec.split)


def _one_split(task: str, name: str, found: Any, split: str | None) -> Source:
    if not isinstance(found, dict):
        if split is not None:
            raise MergeError(f"task {task!r}: {name} has no splits; leave data.split out")
        return Indexed(task, name, found)
    chosen = split or ("train" if len(found) > 1 else next(iter(found)))
    if chosen not in found:
        raise MergeError(f"task {task!r}: {name} has no split {chosen!r}; set data.split to {_either(found)}")
    return Indexed(task, f"{name} ({chosen})", found[chosen])


def _either(names: Any) -> str:
    return " or ".join(map(repr, names))
