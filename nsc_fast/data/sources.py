"""Where rows come from: each source passes over its records once and opens single ones."""

from __future__ import annotations

import csv
import gzip
import json
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MergeError

__all__ = ["CsvFile", "Files", "Indexed", "Items", "JsonFile", "LineFile", "Many", "Source", "as_row"]

Row = Mapping[str, Any]


class Source(ABC):
    """Rows of one task.

    Attributes:
        task: name, for messages.
        name: what messages call the source.
        unit: what a record is called.
        folder: relative paths in the rows are taken from here.
        images: whether the records are image files.
    """

    unit = "row"
    images = False

    def __init__(self, task: str, name: str, folder: Path | None = None) -> None:
        self.task, self.name, self.folder = task, name, folder

    def columns(self) -> tuple[str, ...] | None:
        """Columns, where they are known without opening a row."""
        return None

    @abstractmethod
    def records(self, columns: Sequence[str] | None = None) -> Iterator[tuple[Any, Any]]:
        """One pass: (number, record as it stands). Given ``columns``, others need not be read."""

    @abstractmethod
    def parse(self, number: Any, raw: Any) -> Row:
        """The row of a record."""

    def place(self, number: Any) -> str:
        """Where a record stands."""
        return f"{self.name}, {self.unit} {number}"

    def error(self, number: Any, reason: str) -> MergeError:
        """An error that names task, file and line."""
        return MergeError(f"task {self.task!r}: {self.place(number)}: {reason}")


def as_row(value: Any) -> Row:
    """A row from what people write: an object, a text, a pair of texts, or the messages of a chat.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, Mapping):
        return value
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list | tuple) and value:
        if all(isinstance(part, Mapping) and ("role" in part or "from" in part) for part in value):
            return {"messages": list(value)}
        if len(value) == 2 and all(isinstance(part, str) for part in value):
            return {"text": value[0], "text_pair": value[1]}
    raise TypeError(
        f"a row is an object with columns, a text, a pair of texts or a list of messages, not {value!r:.60}"
    )


class LineFile(Source):
    """Lines of a text file; with ``as_json``, each is a JSON value. Blank lines are passed over."""

    unit = "line"

    def __init__(self, task: str, path: Path, *, as_json: bool) -> None:
        super().__init__(task, path.name, path.parent)
        self._path, self._json = path, as_json

    def records(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, bytes]]:
        number = 0
        try:
            with _open(self._path) as lines:
                for number, line in enumerate(lines, 1):  # noqa: B007  (for the message below)
                    if not line.isspace():
                        yield number, line
        except (OSError, EOFError, zlib.error) as error:
            raise self.error(number + 1, f"cannot be read: {error}; copy or save the file again") from error

    def parse(self, number: int, raw: bytes) -> Row:
        text = decoded(self, number, raw)
        if not self._json:
            return {"text": text.rstrip("\r\n")}
        try:
            return as_row(json.loads(text))
        except ValueError as error:
            hint = "; is it a git-lfs pointer?" if text.startswith("version https://git-lfs") else ""
            raise self.error(number, f"not JSON: {error}{hint}") from error
        except TypeError as error:
            raise self.error(number, str(error)) from error


class Indexed(Source):
    """Anything with a length and items by index: lists, map-style datasets. Only drawn items are opened."""

    def __init__(self, task: str, name: str, rows: Sequence[Any], folder: Path | None = None) -> None:
        super().__init__(task, name, folder)
        self._rows = rows

    def columns(self) -> tuple[str, ...] | None:
        names = getattr(self._rows, "column_names", None)
        return tuple(names) if isinstance(names, list | tuple) else None

    def records(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Any]]:
        rows = self._rows
        if columns is not None and hasattr(rows, "select_columns"):
            rows = rows.select_columns(list(columns))
        return ((index + 1, (rows, index)) for index in range(len(rows)))

    def parse(self, number: int, raw: Any) -> Row:
        rows, index = raw
        try:
            return as_row(rows[index])
        except TypeError as error:
            raise self.error(number, str(error)) from error
        except (KeyError, IndexError) as error:
            raise self.error(number, f"cannot be read ({error!r}); give a list of rows") from error


class Items(Source):
    """Anything that can be iterated once: generators, streams."""

    def __init__(self, task: str, name: str, rows: Iterable[Any]) -> None:
        super().__init__(task, name)
        self._rows = rows

    def records(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Any]]:
        return enumerate(self._rows, 1)

    def parse(self, number: int, raw: Any) -> Row:
        try:
            return as_row(raw)
        except TypeError as error:
            raise self.error(number, str(error)) from error


class JsonFile(Indexed):
    """A JSON file that holds a list of rows, an object with such a list in it, or one row."""

    unit = "item"

    def __init__(self, task: str, path: Path) -> None:
        try:
            with _open(path) as file:
                content = json.loads(file.read().decode("utf-8-sig"))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise MergeError(f"task {task!r}: {path.name}: not a readable JSON file: {error}") from error
        if isinstance(content, dict):
            lists = [value for value in content.values() if _is_table(value)]
            content = lists[0] if len(lists) == 1 else [content]
        if not isinstance(content, list):
            raise MergeError(
                f"task {task!r}: {path.name}: holds no list of rows; write a list of objects, or one object "
                "a line (.jsonl)"
            )
        super().__init__(task, path.name, content, path.parent)


class CsvFile(Source):
    """A table whose first row names the columns; separated by commas, semicolons or tabs."""

    unit = "line"

    def __init__(self, task: str, path: Path) -> None:
        super().__init__(task, path.name, path.parent)
        self._path = path
        self._header: tuple[str, ...] = ()
        next(self.records(), None)
        if len(set(self._header)) < len(self._header):
            twice = next(name for name in self._header if self._header.count(name) > 1)
            raise self.error(1, f"two columns are named {twice!r}; rename one")

    def columns(self) -> tuple[str, ...]:
        return self._header

    def records(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, list[str]]]:
        limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        reader = None
        try:
            with _open(self._path) as binary:
                lines = (line.decode("utf-8-sig" if n == 0 else "utf-8") for n, line in enumerate(binary))
                first = next(lines, "")
                reader = csv.reader(_chain(first, lines), delimiter=_separator(first), strict=True)
                self._header = tuple(next(reader, ()))
                for row in reader:
                    if row:
                        yield reader.line_num, row
        except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
            line = 1 if reader is None else reader.line_num + isinstance(error, UnicodeDecodeError)
            way_out = "save it as UTF-8 with standard quotes, or as JSON lines"
            raise self.error(line, f"cannot be read: {error}; {way_out}") from error
        finally:
            csv.field_size_limit(limit)

    def parse(self, number: int, raw: list[str]) -> Row:
        if len(raw) != len(self._header):
            raise self.error(
                number,
                f"{len(raw)} fields where the first line has {len(self._header)}; check separators and "
                "quotes",
            )
        return dict(zip(self._header, raw, strict=True))


class Files(Source):
    """A row a file: texts, or images (opened when they are needed)."""

    unit = "file"

    def __init__(self, task: str, folder: Path, files: Sequence[Path], *, images: bool) -> None:
        super().__init__(task, folder.name, folder)
        self._files, self.images = files, images

    def columns(self) -> tuple[str, ...]:
        return ("image",) if self.images else ("text",)

    def records(self, columns: Sequence[str] | None = None) -> Iterator[tuple[str, Path]]:
        return ((file.relative_to(self.folder).as_posix(), file) for file in self._files)

    def parse(self, number: str, raw: Path) -> Row:
        if self.images:
            return {"image": str(raw)}
        try:
            with _open(raw) as file:
                return {"text": decoded(self, number, file.read())}
        except (OSError, EOFError, zlib.error) as error:
            raise self.error(number, f"cannot be read: {error}") from error


class Many(Source):
    """Several sources, one after the other; a number is (which source, number there)."""

    def __init__(self, task: str, folder: Path, parts: Sequence[Source]) -> None:
        super().__init__(task, folder.name, folder)
        self._parts = parts

    def columns(self) -> tuple[str, ...] | None:
        return self._parts[0].columns()

    def records(self, columns: Sequence[str] | None = None) -> Iterator[tuple[Any, Any]]:
        for k, part in enumerate(self._parts):
            for number, raw in part.records(columns):
                yield (k, number), raw

    def parse(self, number: Any, raw: Any) -> Row:
        return self._parts[number[0]].parse(number[1], raw)

    def place(self, number: Any) -> str:
        return self._parts[number[0]].place(number[1])


def decoded(source: Source, number: Any, raw: bytes) -> str:
    """UTF-8, with or without byte order mark.

    Raises:
        MergeError: other bytes; says which and where.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise source.error(
            number,
            f"byte {raw[error.start]:#04x} at position {error.start} is not UTF-8; convert the file, for "
            "instance with 'iconv -f ISO-8859-1 -t UTF-8'",
        ) from error


def _is_table(value: Any) -> bool:
    """Whether it is a list of rows, rather than a value of one row, such as the messages of a chat."""
    return (
        isinstance(value, list)
        and all(isinstance(v, dict) and "role" not in v for v in value)
        and value != []
    )


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _separator(header: str) -> str:
    return max(",\t;", key=header.count)
