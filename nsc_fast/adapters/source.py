"""Finds an adapter's two files in a folder or on the hub; reads the config and the weights' headers."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from nsc_fast.adapters.model import AdapterError, Problem
from nsc_fast.adapters.tensors import TensorHeader

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "AdapterFiles",
    "beside_others",
    "digest_of",
    "is_hub_id",
    "locate",
    "read_config",
    "read_headers",
]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LFS = b"version https://git-lfs"
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CONVERT = (
    "load it with PEFT where you trust it and save it with "
    "model.save_pretrained(folder, safe_serialization=True)"
)


@dataclass(frozen=True)
class AdapterFiles:
    """The two files of an adapter, and what to call it."""

    name: str
    source: str
    config: Path
    weights: Path


def locate(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    offline: bool | None = None,
) -> AdapterFiles:
    """Finds config and weights: an existing folder, or else a hub id.

    Args:
        path: folder, or ``owner/name`` on the hub. A ``Path`` is never taken for a hub id.
        name: default: the last part of subfolder or path.
        revision: of the hub repository.
        subfolder: inside the folder or repository.
        offline: ``True`` uses the hub's local cache only; ``None`` leaves it to ``HF_HUB_OFFLINE``.

    Raises:
        AdapterError: missing folder or file, a pickle instead of safetensors, hub out of reach.
    """
    source = os.fspath(path)
    folder = Path(source).expanduser()
    name = name or Path(subfolder or folder.resolve()).name
    if folder.is_dir():
        return _local(folder / subfolder if subfolder else folder, name)
    if folder.is_file():
        raise _refused(name, f"path {source!r}", "is a file", "give the folder that holds it")
    if isinstance(path, Path) or not is_hub_id(source):
        raise _refused(name, f"folder {source!r}", "does not exist", "check the path")
    if beside_others(source):
        # Most likely a slip of the pen: no waiting for the hub.
        offline = True
    files = [_download(source, file, name, revision, subfolder, offline) for file in (CONFIG, WEIGHTS)]
    return AdapterFiles(name, source if not subfolder else f"{source}/{subfolder}", *files)


def is_hub_id(name: str) -> bool:
    """Whether a name can be ``owner/name`` on the hub."""
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(".")


def beside_others(path: str) -> bool:
    """Whether what may be a hub id looks like a path that does not exist, because its first part does."""
    where = Path(path)
    return not where.exists() and len(where.parts) > 1 and where.parent.is_dir()


def _refused(name: str, subject: str, reason: str, way_out: str) -> AdapterError:
    return AdapterError(f"adapter {name!r}", Problem(subject, reason, way_out))


def _local(folder: Path, name: str) -> AdapterFiles:
    config, weights = folder / CONFIG, folder / WEIGHTS
    if not config.is_file():
        raise _refused(name, f"file {CONFIG!r}", f"is not in {str(folder)!r}", _hint(folder))
    if not weights.is_file():
        if (folder / PICKLE).is_file():
            raise _refused(
                name,
                f"file {PICKLE!r}",
                "is a pickle, which can run code when it is opened",
                _CONVERT,
            )
        raise _refused(
            name,
            f"file {WEIGHTS!r}",
            f"is not in {str(folder)!r}",
            "copy or save the complete adapter",
        )
    return AdapterFiles(name, str(folder), config, weights)


def _hint(folder: Path) -> str:
    if not folder.is_dir():
        return "check the subfolder, which does not exist"
    nested = sorted(child.parent.name for child in folder.glob(f"*/{CONFIG}"))
    if nested:
        return f"choose one of its adapters with subfolder={' or '.join(map(repr, nested))}"
    if (folder / "config.json").is_file():
        return "this looks like a full model; give the folder that PEFT's save_pretrained wrote"
    return "give the folder that PEFT's save_pretrained wrote"


def _download(
    repo: str,
    file: str,
    name: str,
    revision: str | None,
    subfolder: str | None,
    offline: bool | None,
) -> Path:
    subject = f"file {file!r} of {repo!r}"
    try:
        return Path(
            hf_hub_download(
                repo,
                file,
                revision=revision,
                subfolder=subfolder,
                local_files_only=bool(offline),
            )
        )
    except LocalEntryNotFoundError as error:
        raise _refused(
            name,
            subject,
            "does not exist: there is no such folder, and it is not in the hub's local cache",
            "check the path, go online without HF_HUB_OFFLINE, or, if it is an id on the hub, fetch it with "
            f"'hf download {repo}'",
        ) from error
    except EntryNotFoundError as error:
        way_out = "check subfolder and revision"
        if file == WEIGHTS:
            way_out += f"; if the repository holds {PICKLE} only: {_CONVERT}"
        raise _refused(name, subject, "is not in the repository", way_out) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise _refused(
            name,
            subject,
            f"cannot be fetched: {reason}",
            "check the folder or hub id, the revision and, if it is private, 'hf auth login'",
        ) from error


def _check_not_pointer(path: Path, name: str) -> None:
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise _refused(
                name,
                f"file {path.name!r}",
                "is a git-lfs pointer, not the file itself",
                "run 'git lfs pull' in the repository",
            )


def read_config(files: AdapterFiles) -> dict[str, Any]:
    """The config as it stands in the file.

    Raises:
        AdapterError: not valid JSON, or not an object.
    """
    _check_not_pointer(files.config, files.name)
    way_out = "get or save the file again"
    try:
        config = json.loads(files.config.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and UTF-8 errors
        raise _refused(files.name, f"file {CONFIG!r}", f"is not valid JSON: {error}", way_out) from error
    if not isinstance(config, dict):
        raise _refused(files.name, f"file {CONFIG!r}", "does not hold an object", way_out)
    return config


def read_headers(files: AdapterFiles) -> dict[str, TensorHeader]:
    """Shape and dtype of every tensor; no weight is read.

    Raises:
        AdapterError: truncated or corrupt file, or a git-lfs pointer.
    """
    _check_not_pointer(files.weights, files.name)
    try:
        return safetensors_headers(files.weights)
    except SafetensorError as error:
        raise _refused(
            files.name,
            f"file {files.weights.name!r}",
            f"is truncated or not safetensors: {error}",
            "download or save it again",
        ) from error


def safetensors_headers(path: Path) -> dict[str, TensorHeader]:
    """Shape and dtype (by its torch name where there is one) of every tensor of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        headers = {}
        for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            tensor = file.get_slice(key)
            dtype = tensor.get_dtype()
            headers[key] = TensorHeader(tuple(tensor.get_shape()), _TORCH_NAMES.get(dtype, dtype))
    return headers


def digest_of(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
