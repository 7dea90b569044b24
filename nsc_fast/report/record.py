"""What a merge recorded about itself, read back and checked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from ..errors import MergeError

__all__ = ["Coefficients", "Pairs", "Record", "Signal", "Spectrum", "Step", "Summary", "read_record"]

Number = float | None
"""None, or NaN, where there is no value."""


class _Part(BaseModel):
    # Keys of later versions are no damage.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Source(_Part):
    """Where an adapter came from."""

    source: str
    digest: str


class Summary(_Part):
    """``nsc_fast/merge.json``."""

    method: str
    tasks: list[str]
    base_model: str | None = None
    parameters: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    notices: list[str] = []
    interrupted: bool = False
    modules: int
    measure: str = "null-space ratio"


class Step(_Part):
    """A line of ``nsc_fast/metrics.jsonl``."""

    step: int
    loss: float
    ratios: dict[str, float]
    learning_rate: float


class Coefficients(_Part):
    """Of one module: a value per task, or per singular direction of all tasks."""

    tasks: list[str]
    values: list[float]


class Spectrum(_Part):
    """Of the merged update at one module.

    Attributes:
        shape: ``(d_out, d_in)``.
        energy: squared Frobenius norm before truncation.
        kept: share of it in the written adapter.
        values: singular values before truncation, descending.
    """

    shape: tuple[int, int]
    energy: float
    kept: float
    values: list[float]


class Pairs(_Part):
    """Interference at one module; pairs in the order (0, 1), (0, 2), ..., (1, 2), ...

    Attributes:
        tasks: adapters of the module.
        ranks: theirs.
        rows, columns, cosine: see :mod:`nsc_fast.interference`.
    """

    tasks: list[str]
    ranks: list[int]
    rows: list[Number]
    columns: list[Number]
    cosine: list[Number]

    @model_validator(mode="after")
    def _complete(self) -> Pairs:
        k = len(self.tasks)
        if len(self.ranks) != k or {len(self.rows), len(self.columns), len(self.cosine)} != {
            k * (k - 1) // 2
        }:
            raise ValueError(f"{k} tasks do not fit the number of ranks or pairs")
        return self


class Output(_Part):
    """The written adapter."""

    rank: int
    max_rank: int | None = None
    dtype: str


class FullModel(_Part):
    """``nsc_fast/apply.json``: the full model that holds the merged update.

    Attributes:
        total_rounding: ``||stored - (W + dW)|| / ||dW||`` over all modules.
        size: bytes of the weights.
        files: of the weights.
    """

    total_rounding: float
    size: int
    files: list[str]


class Signal(_Part):
    """Null-space ratios on each task's own unlabeled data; any part may be missing.

    Attributes:
        random, base, alone, initial, final: mean over the task's target modules: expected for a random
            subspace, of the base model, with its adapter alone, at the first and at the last coefficients.
        strength: ``(1 - alone^2) / (1 - random^2)``; 1 is no signal.
        modules: module -> task -> kind -> ratio.
        sees: task j -> adapter k -> share of the energy of j's activations inside the row space of k.
        tokens: measured.
    """

    random: dict[str, Number] | None = None
    base: dict[str, Number] | None = None
    alone: dict[str, Number] | None = None
    initial: dict[str, Number] | None = None
    final: dict[str, Number] | None = None
    strength: dict[str, Number] | None = None
    modules: dict[str, dict[str, dict[str, Number]]] | None = None
    sees: dict[str, dict[str, Number]] | None = None
    tokens: dict[str, int | None] | None = None


class Measurements(_Part):
    """``nsc_fast/measurements.json``."""

    output: Output | None = None
    spectrum: dict[str, Spectrum] = {}
    interference: dict[str, Pairs] = {}
    signal: Signal | None = None


class Record(_Part):
    """All of it. What an older version did not record is empty."""

    summary: Summary
    environment: dict[str, str] = {}
    recipe: dict[str, Any] = {}
    history: list[Step] = []
    coefficients: dict[str, Coefficients] = {}
    measurements: Measurements = Measurements()
    full: FullModel | None = None

    @property
    def tasks(self) -> list[str]:
        return self.summary.tasks

    def coefficient_table(self) -> dict[str, dict[str, float]]:
        """Module -> task -> coefficient; its mean over the singular directions where they have their own."""
        table = {}
        # In the order of the model; the file is sorted by name.
        for module in [*self.measurements.spectrum, *self.coefficients]:
            own = self.coefficients.get(module)
            if own is None or module in table:
                continue
            values = own.values
            if len(values) != len(own.tasks):
                pairs = self.measurements.interference.get(module)
                # A task of rank 0 holds one place.
                ranks = [max(rank, 1) for rank in pairs.ranks] if pairs else []
                if sum(ranks) != len(values) or len(ranks) != len(own.tasks):
                    continue
                ends = [sum(ranks[: k + 1]) for k in range(len(ranks))]
                values = [sum(values[e - r : e]) / r for e, r in zip(ends, ranks, strict=True)]
            table[module] = dict(zip(own.tasks, values, strict=True))
        return table


def read_record(source: str | os.PathLike[str] | Mapping[str, bytes | str]) -> Record:
    """Reads what a merge left behind.

    Args:
        source: the output folder, or the contents of its files by relative path.

    Raises:
        MergeError: a folder that no merge wrote, or a file that is damaged; names the file.
    """
    read = _from_files(source) if isinstance(source, Mapping) else _from_folder(Path(source))
    text = read("merge.json")
    if text is None:
        raise MergeError(f"{source}: no nsc_fast/merge.json; report needs a folder that `merge` wrote")
    parts: dict[str, Any] = {"summary": _checked("merge.json", text, json.loads, Summary)}
    for key, file, parse, kind in (
        ("environment", "environment.json", json.loads, dict[str, str]),
        ("recipe", "config.resolved.yaml", yaml.safe_load, dict[str, Any]),
        ("history", "metrics.jsonl", _lines, list[Step]),
        ("coefficients", "coefficients.json", json.loads, dict[str, Coefficients]),
        ("measurements", "measurements.json", json.loads, Measurements),
        ("full", "apply.json", json.loads, FullModel),
    ):
        if (text := read(file)) is not None:
            parts[key] = _checked(file, text, parse, kind)
    return Record(**parts)


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def _checked(file: str, text: bytes | str, parse: Callable[[str], Any], kind: Any) -> Any:
    way_out = "restore it from a copy, or merge again"
    try:
        content = parse(text.decode() if isinstance(text, bytes) else text)
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise MergeError(f"nsc_fast/{file} is damaged: {where}: {first['msg']}; {way_out}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise MergeError(f"nsc_fast/{file} is damaged: {error}; {way_out}") from error


def _from_files(files: Mapping[str, bytes | str]) -> Callable[[str], bytes | str | None]:
    return lambda name: files.get(f"nsc_fast/{name}")


def _from_folder(folder: Path) -> Callable[[str], bytes | None]:
    def read(name: str) -> bytes | None:
        file = folder / "nsc_fast" / name
        try:
            return file.read_bytes() if file.is_file() else None
        except OSError as error:
            raise MergeError(f"{file} cannot be read: {error}") from error

    return read
