"""Writes a merged update as a PEFT adapter folder that PEFT, vLLM and llama.cpp read alike.

PEFT honours rank and alpha patterns, vLLM ignores them, llama.cpp divides one alpha by each
tensor's own rank. Uniform rank with ``lora_alpha = r`` and the scale inside the factors means the
same to all three.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from nsc_fast.adapters.model import PREFIX, AdapterError, Problem
from nsc_fast.adapters.source import CONFIG, WEIGHTS
from nsc_fast.adapters.targets import Shapes, choose_targets, suffixes_of
from nsc_fast.factors import LowRankUpdate

__all__ = ["WriteReport", "check_replaceable", "replacing", "write_lora"]

# PEFT adds a head to modules_to_save for these, and cannot load a file that has none.
_TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class WriteReport:
    """What was written.

    Attributes:
        path: the folder.
        rank: uniform rank of all modules.
        kept_energy: share of the squared Frobenius norm that the truncation kept, by module path.
        total_kept_energy: the same over all modules together.
        parameters: number of values in the factors, zero padding included.
        target_modules: as in the config.
        zero_modules: modules that the suffixes select and no update touches; they got zero factors.
        notices: what the user should know.
    """

    path: Path
    rank: int
    kept_energy: dict[str, float]
    total_kept_energy: float
    parameters: int
    target_modules: tuple[str, ...]
    zero_modules: tuple[str, ...]
    notices: tuple[str, ...]


def write_lora(
    out: str | os.PathLike[str],
    updates: Mapping[str, LowRankUpdate],
    *,
    base_model: str | None,
    base_shapes: Shapes | None = None,
    task_type: str | None = None,
    revision: str | None = None,
    max_rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    whole: Mapping[str, Mapping[str, Tensor]] | None = None,
    extra_files: Mapping[str, bytes | str] | None = None,
    overwrite: bool = False,
) -> WriteReport:
    """Writes the folder in one step: it is complete, or it is not there.

    Args:
        out: the folder. A path that exists and is not an empty folder is refused.
        updates: canonical factors by module path in the base model.
        base_model: id of the base for the config; null there if it has none.
        base_shapes: ``module_shapes(base)`` or ``folder_shapes(...)``. With them
            ``target_modules`` is a list of plain suffixes; without, of full paths, since nobody
            knows what a suffix would select.
        task_type: PEFT's task type. Left out of the config where PEFT would then ask for a head.
        revision: of the base, for the config.
        max_rank: truncates each module to its largest singular values.
        dtype: of the factors in the file.
        whole: module path -> name below it -> tensor, of modules that replace the base's
            (``modules_to_save``).
        extra_files: text or bytes by relative path, for example ``README.md``.
        overwrite: replaces an adapter folder, at the last moment.

    Returns:
        The report. Without ``max_rank`` nothing is lost: only directions whose singular value is
        zero to float64 rounding are left out.

    Raises:
        AdapterError: nothing to write, an update that does not fit ``base_shapes`` or is not
            finite (also after the cast), an output that may not be replaced, an extra file
            outside the folder.
    """
    out = Path(out)
    where = f"output {str(out)!r}"
    _check_arguments(where, max_rank, dtype)
    _check_updates(where, updates, base_shapes)
    extra = _checked_extra(where, extra_files or {})
    check_replaceable(where, out, overwrite)
    whole = whole or {}
    if base_shapes is not None and whole:
        # PEFT must not look for factors in there.
        inside = tuple(f"{module}." for module in whole)
        base_shapes = {m: None if f"{m}.".startswith(inside) else s for m, s in base_shapes.items()}
    targets = sorted(updates) if base_shapes is None else choose_targets(updates, base_shapes)
    untouched = _untouched(updates, targets, base_shapes or {})

    kept: dict[str, tuple[float, float]] = {}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for path, update in updates.items():
        rank = numerical_rank(update)
        part, share = update.truncate(max(1, min(rank, max_rank or rank)))
        factors[path] = part.balanced()
        kept[path] = share, update.energy
    rank = max(1, *(down.shape[0] for down, _ in factors.values()))
    for path in untouched:
        d_out, d_in = base_shapes[path]
        factors[path] = torch.zeros(0, d_in), torch.zeros(d_out, 0)
    tensors = _padded(where, factors, rank, dtype)
    for path, own in whole.items():
        for name, tensor in own.items():
            cast = tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor.cpu()
            tensors[f"{PREFIX}{path}.{name}"] = _finite(where, path, name, cast)
    notices = []
    if task_type in _TASKS_WITH_HEAD:
        notices.append(f"task_type {task_type} left out of the config: PEFT would ask for a head")
        task_type = None
    config = _config(rank, targets, base_model, revision, task_type)
    config["modules_to_save"] = sorted(whole) or None

    with replacing(where, out, overwrite) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
        for relative, content in extra.items():
            file = folder / relative
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.encode() if isinstance(content, str) else content)
    total = sum(energy for _, energy in kept.values())
    return WriteReport(
        path=out,
        rank=rank,
        kept_energy={path: share for path, (share, _) in kept.items()},
        total_kept_energy=sum(s * e for s, e in kept.values()) / total if total > 0 else 1.0,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        target_modules=tuple(targets),
        zero_modules=tuple(untouched),
        notices=tuple(notices),
    )


def _check_arguments(where: str, max_rank: int | None, dtype: torch.dtype) -> None:
    if max_rank is not None and max_rank < 1:
        raise AdapterError(
            where,
            Problem(f"max_rank = {max_rank}", "is below 1", "give 1 or more, or leave it out"),
        )
    if dtype not in _DTYPES:
        names = ", ".join(map(str, _DTYPES))
        raise AdapterError(
            where, Problem(f"dtype = {dtype}", "is not for LoRA factors", f"choose one of {names}")
        )


def _check_updates(where: str, updates: Mapping[str, LowRankUpdate], shapes: Shapes | None) -> None:
    if not updates:
        raise AdapterError(
            where, Problem("updates", "there is no module to write", "merge at least one adapter")
        )
    problems = []
    for path, update in updates.items():
        base = update.shape if shapes is None else shapes.get(path, "missing module")
        if base != update.shape:
            problems.append(
                Problem(
                    f"module {path!r}",
                    f"update {update.shape} does not fit the base's {base}",
                    "write it for the base model that was merged",
                )
            )
        elif not (torch.isfinite(update.columns).all() and torch.isfinite(update.basis).all()):
            problems.append(
                Problem(
                    f"module {path!r}",
                    "the update holds NaN or infinite values",
                    "check the coefficients and the history of the loss",
                )
            )
    if problems:
        raise AdapterError(where, *problems)


def numerical_rank(update: LowRankUpdate) -> int:
    """Number of singular values that float64 can tell from zero."""
    s = update.singular_values
    if s.numel() == 0:
        return 0
    return int((s > s.max() * max(update.shape) * torch.finfo(torch.float64).eps).sum())


def _untouched(updates: Mapping[str, LowRankUpdate], targets: list[str], shapes: Shapes) -> list[str]:
    selecting = frozenset(targets)
    return sorted(
        name for name in shapes if name not in updates and not selecting.isdisjoint(suffixes_of(name))
    )


def _padded(
    where: str, factors: Mapping[str, tuple[Tensor, Tensor]], rank: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    tensors = {}
    for path in sorted(factors):
        down, up = factors[path]
        missing = rank - down.shape[0]
        for side, factor in (("A", pad(down, (0, 0, 0, missing))), ("B", pad(up, (0, missing)))):
            cast = _finite(where, path, f"lora_{side}", factor.to("cpu", dtype))
            tensors[f"{PREFIX}{path}.lora_{side}.weight"] = cast
    return tensors


def _finite(where: str, path: str, name: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        reason = f"{name} does not fit into the range of {tensor.dtype}"
        raise AdapterError(where, Problem(f"module {path!r}", reason, "write bfloat16 or float32"))
    return tensor.contiguous()


def _config(
    rank: int, targets: list[str], base_model: str | None, revision: str | None, task_type: str | None
) -> dict[str, Any]:
    config = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_model or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": revision,
        "target_modules": targets,
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }
    # Only where PEFT is installed: the field says whose format this is.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        config["peft_version"] = importlib.metadata.version("peft")
    return config


def _checked_extra(where: str, files: Mapping[str, bytes | str]) -> dict[str, bytes | str]:
    for name in files:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name:
            reason, way_out = "is outside the output folder", "give a relative path with '/'"
        elif str(path) in (CONFIG, WEIGHTS):
            reason, way_out = "is written by write_lora itself", "leave it out"
        else:
            continue
        raise AdapterError(where, Problem(f"extra file {name!r}", reason, way_out))
    return {str(PurePosixPath(name)): content for name, content in files.items()}


def check_replaceable(where: str, out: Path, overwrite: bool, *, marker: str = CONFIG) -> None:
    """Whether ``out`` may be written: absent, empty, or to be overwritten and with ``marker`` in it.

    Raises:
        AdapterError: it may not.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise AdapterError(where, Problem("path", "exists and is not a folder", "choose another one"))
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise AdapterError(
            where,
            Problem("folder", "exists and is not empty", "choose another one, or --overwrite"),
        )
    if not (out / marker).is_file():
        raise AdapterError(
            where,
            Problem(
                "folder",
                f"is not replaced, because it is not what is written here (no {marker})",
                "choose another one, or empty it yourself",
            ),
        )


@contextlib.contextmanager
def replacing(where: str, out: Path, overwrite: bool, *, marker: str = CONFIG) -> Iterator[Path]:
    """A temporary sibling of ``out``: becomes ``out`` when the block ends well, else vanishes."""
    out = out.resolve()  # so that a link to a folder stays a link
    new_parents = [p for p in out.parents if not p.exists()]
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise AdapterError(
                where, Problem("folder", f"cannot be made: {error.strerror}", "choose another one")
            ) from error
        yield temporary
        check_replaceable(where, out, overwrite, marker=marker)  # somebody may have written there meanwhile
        _swap(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in new_parents:
            # Not empty any more: somebody else uses it.
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _swap(new: Path, out: Path) -> None:
    if not out.exists():
        new.rename(out)
        return
    old = out.with_name(f"{new.name}.old")
    out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old)
