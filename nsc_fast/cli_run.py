"""How ``merge`` runs: alone or among the processes of a launcher, with checkpoints or without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .cli_tables import console
from .errors import RecipeError

if TYPE_CHECKING:
    from .checkpoint import Checkpoints
    from .processes import Processes

__all__ = ["checkpoints_of", "device_of", "together"]


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
