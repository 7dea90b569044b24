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

__all__ = ["checkpoints_of", "together"]


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
        on_notice=lambda notice: console.print(f"note: {notice}", highlight=False),
    )
    if first:
        # Before anything is loaded.
        found.check()
    return found
