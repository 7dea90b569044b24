"""The files of a base model as they lie on disk: found, read tensor by tensor, and written the same way.

safetensors writes a file from tensors that are all in memory. Here one tensor at a time is, so the format
(eight bytes of length, a JSON header, the tensors one behind the other) is written by hand and read by the
library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import MergeError
from .recipe import BaseSpec

__all__ = [
    "Entry",
    "Stored",
    "copied_files",
    "locate_base",
    "stored_names",
    "weight_entries",
    "write_weights",
]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# What makes a folder of weights a model: configs, tokenizers, processors, chat templates, remote code.
_BESIDE = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*", "USE_*")
_NOT_BESIDE = ("*.index.json", "adapter_config.json", "*_results.json", "trainer_state.json")
_FOLDERS = ("additional_chat_templates",)


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file.

    Attributes:
        code: its dtype, by the file's own name of it.
        shape: as in the file.
        file: name of the file; empty for a tensor that is in none yet.
    """

    code: str
    shape: tuple[int, ...]
    file: str = ""

    @staticmethod
    def of(tensor: Tensor) -> Entry:
        """Of a tensor in memory."""
        return Entry(_CODES[tensor.dtype], tuple(tensor.shape))

    @property
    def dtype(self) -> torch.dtype:
        """torch's."""
        return _DTYPES[self.code]

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def cast(self, code: str) -> Entry:
        """The same in another dtype."""
        return replace(self, code=code)

    def read(self, folder: Path, key: str) -> Tensor:
        """Its values."""
        with safe_open(folder / self.file, framework="pt") as file:
            return file.get_tensor(key)


def locate_base(base: BaseSpec) -> Path:
    """The folder with the base's files; fetched from the hub, or its cache, where there is none.

    Raises:
        MergeError: it cannot be fetched.
    """
    folder = Path(base.path).expanduser()
    inside = base.subfolder or ""
    if folder.is_dir():
        return folder / inside
    prefix = f"{inside}/" if inside else ""
    wanted = ("model*.safetensors", _INDEX, *_BESIDE, *(f"{name}/*" for name in _FOLDERS))
    try:
        root = snapshot_download(
            base.path, revision=base.revision, allow_patterns=[prefix + pattern for pattern in wanted]
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise MergeError(
            f"the files of base model {base.path!r} cannot be fetched: {' '.join(str(error).split())}; give "
            "the folder of the base with --base-model, or fetch it with 'hf download'"
        ) from error
    return Path(root, inside)


def weight_entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a model's safetensors files, in the order of the files; only headers are read.

    Raises:
        MergeError: no safetensors files, one that is missing or damaged, or a dtype that is not known here.
    """
    if (folder / _INDEX).is_file():
        files = list(dict.fromkeys(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
    elif (folder / _SINGLE).is_file():
        files = [_SINGLE]
    else:
        raise MergeError(
            f"base model {str(folder)!r} has neither {_SINGLE} nor {_INDEX}; load it in transformers where "
            "you trust it, write it with save_pretrained(folder), and apply to that folder"
        )
    out: dict[str, Entry] = {}
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                    header = file.get_slice(key)
                    out[key] = Entry(header.get_dtype(), tuple(header.get_shape()), name)
        except (SafetensorError, OSError) as error:
            raise MergeError(
                f"base model {str(folder)!r}: {name} is missing or damaged ({error}); download it again"
            ) from error
    if unknown := [(key, e.code) for key, e in out.items() if e.code not in _DTYPES]:
        key, code = unknown[0]
        raise MergeError(
            f"base model {str(folder)!r}: {key} is of dtype {code}, which is not supported; apply the LoRA "
            "to a base that is not packed or quantised"
        )
    return out


class Stored(NamedTuple):
    """Where a weight of the model stands in the files, and whether transformers reworks it on the way."""

    key: str
    converted: bool


def stored_names(model: nn.Module, keys: Iterable[str]) -> dict[str, Stored]:
    """Name in the model -> name in the files, as transformers maps them when it loads.

    Args:
        model: of transformers; on the meta device is enough.
        keys: names in the files.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    out: dict[str, Stored] = {}
    for key in keys:
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        out[name] = Stored(key, converter is not None or name in out)
    return out


def copied_files(folder: Path) -> list[str]:
    """Files beside the weights that belong to the model, relative to the folder."""
    found = [
        file.name
        for file in sorted(folder.iterdir())
        if file.is_file()
        and any(fnmatch(file.name, pattern) for pattern in _BESIDE)
        and not any(fnmatch(file.name, pattern) for pattern in _NOT_BESIDE)
    ]
    nested = [str(f.relative_to(folder)) for name in _FOLDERS for f in sorted((folder / name).glob("*"))]
    return found + nested


def write_weights(path: Path, entries: Mapping[str, Entry], value: Callable[[str], Tensor]) -> None:
    """A safetensors file, one tensor in memory at a time.

    Args:
        path: to write.
        entries: name -> dtype and shape.
        value: gives the tensor of a name, of that dtype and shape.
    """
    # The widest dtypes first, so that every tensor is aligned to its own; the library does the same.
    order = sorted(entries, key=lambda key: (-entries[key].dtype.itemsize, key))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in order:
        start, end = end, end + entries[key].size
        header[key] = {
            "dtype": entries[key].code,
            "shape": list(entries[key].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for key in order:
            tensor = value(key)
            assert (tensor.dtype, tuple(tensor.shape)) == (entries[key].dtype, entries[key].shape), key
            file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
