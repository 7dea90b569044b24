"""How ``merge`` runs: alone or among the processes of a launcher, with checkpoints or without."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .cli_tables import console
from .errors import RecipeError

if TYPE_CHECKING:
    from .checkpoint import Checkpoints
    from .processes import Processes
    from .recipe import Recipe

__all__ = [
    "INTERRUPTED",
    "check_impl",
    "check_out",
    "checkpoints_of",
    "device_of",
    "tell_resume",
    "together",
]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as of a shell."""


def device_of(name: str, *, there: bool = True) -> str:
    """The device that ``--device`` names; of "auto" the accelerator, or the CPU.

    Args:
        there: whether torch must be able to use it. Memory can be planned without.

    Raises:
        RecipeError: it is none, or torch cannot use it.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return "cpu" if accelerator is None else accelerator.type
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"--device {name!r} is none; write auto, cpu, cuda, xpu or mps") from error
    count = 0 if accelerator is None else torch.accelerator.device_count()
    found = accelerator is not None and device.type == accelerator.type and (device.index or 0) < count
    if there and device.type != "cpu" and not found:
        has = "none" if accelerator is None else f"{count} of type {accelerator.type}"
        raise RecipeError(f"--device {name}: torch cannot use it here (accelerators: {has}); use auto or cpu")
    return name


def check_impl(impl: str, device: str) -> None:
    """Whether ``--impl`` can run on the device, before anything is loaded.

    Raises:
        RecipeError: it is none, or the kernels cannot run there.
    """
    import torch

    from .ops import dispatch

    if impl == "auto":
        return
    try:
        dispatch.resolve(impl, torch.device(device), torch.float32, 1)
    except (ValueError, RuntimeError) as error:
        raise RecipeError(f"--impl {impl}: {error}") from error


def check_out(
    out: Path,
    kind: Literal["lora", "full"],
    overwrite: bool,
    checkpoints: Checkpoints | None = None,
    *,
    recipe: Recipe | None = None,
) -> bool:
    """Whether the output can be written, and if so whether it replaces what is there.

    A run that goes on from a checkpoint replaces what it wrote when it was interrupted; whether the run is
    the same one is compared when the checkpoint is read.

    Args:
        kind: of the recipe's output.
        checkpoints: of this run.
        recipe: what it reads must not be what is replaced.

    Raises:
        RecipeError: there is an output, and no word to replace it; it holds something that the recipe reads;
            or nothing can be written there.
        AdapterError: what is there is no output.
    """
    from .adapters.write import check_replaceable

    whole = out.resolve()
    parent = next((folder for folder in whole.parents if folder.exists()), whole)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RecipeError(f"the output {out} cannot be written into {parent}; choose another folder")
    if not out.exists():
        return overwrite
    for name, path in () if recipe is None else _read_from(recipe):
        # A hub id is no path here.
        if path.exists() and whole in (path, *path.parents):
            raise RecipeError(f"the output {out} holds the {name}, which would be lost; choose another one")
    goes_on = checkpoints is not None and checkpoints.resume and bool(checkpoints.files())
    if not overwrite and not (goes_on and _interrupted(out)):
        raise RecipeError(f"the output {out} exists; choose another folder or add --overwrite")
    marker = "config.json" if kind == "full" else "adapter_config.json"
    check_replaceable(f"output {str(out)!r}", out, True, marker=marker)
    return True


def _read_from(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """What a recipe reads on this machine, and where that is."""
    for spec in recipe.adapters:
        yield f"adapter {spec.name!r}", Path(spec.path).expanduser().resolve()
        if spec.data is not None:
            yield f"data of {spec.name!r}", Path(spec.data.path).expanduser().resolve()
    if recipe.base_model is not None:
        yield "base model", Path(recipe.base_model.path).expanduser().resolve()


def _interrupted(out: Path) -> bool:
    """Whether ``out`` is what an interrupted run wrote."""
    try:
        told = json.loads((out / "nsc_fast" / "merge.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and told.get("interrupted") is True


def tell_resume(checkpoints: Checkpoints | None, *, alone: bool) -> None:
    """How an interrupted run goes on: the command, or under a launcher what to add to it."""
    if checkpoints is None or not checkpoints.files():
        console.print(
            "interrupted before a checkpoint was written (--checkpoint-every): the same command with "
            "--overwrite starts again",
            highlight=False,
        )
        return
    program = Path(sys.argv[0]).name
    start = ["python", "-m", "nsc_fast"] if program == "__main__.py" else [program]
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--no-resume")]
    command = shlex.join([*start, *arguments, "--resume"]) if alone else "the same command with --resume"
    console.print(f"to go on: {command}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def together() -> Iterator[Processes | None]:
    """The processes that a launcher started with this one; None if it is alone.

    Only the first talks, and one that fails; an error ends all of them.
    """
    from .processes import ProcessError, launched

    processes = launched()
    if processes is None:
        yield None
        return
    console.quiet = processes.rank > 0
    try:
        with processes.guarded():
            yield processes
    except ProcessError:
        raise
    except Exception:
        console.quiet = False
        raise


def checkpoints_of(
    out: Path, every: int, folder: Path | None, resume: bool, overwrite: bool, first: bool
) -> Checkpoints | None:
    """The checkpoints that the options ask for.

    Args:
        out: output folder; by default they lie beside it.
        every: steps between two, 0 for none.
        folder: where they lie.
        resume: go on from the last one.
        overwrite: without ``resume``: delete those of an earlier run.
        first: whether this process reads and writes them.

    Raises:
        RecipeError: options that contradict each other.
        MergeError: there are some of an earlier run.
    """
    from .checkpoint import Checkpoints

    if every < 0:
        raise RecipeError(f"--checkpoint-every {every}: give a number of steps, or 0 for none")
    if every == 0:
        if resume or folder is not None:
            raise RecipeError("--checkpoint-every 0 writes none: leave --resume and --checkpoints out")
        return None
    if out.name in ("", ".."):
        # The folder in which we are has a name of its own.
        out = out.resolve()
    found = Checkpoints(
        folder or out.with_name(f"{out.name}.partial"),
        every,
        resume=resume,
        restart=overwrite,
        on_notice=lambda notice: console.print(f"note: {notice}", markup=False, highlight=False),
    )
    if first:
        # Before anything is loaded.
        found.check()
    return found
