"""What the commands on suites have in common."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from nsc_fast.errors import MergeError

from . import suites
from .tasks import DATA_VARIABLE

__all__ = ["CACHE", "cache_folder", "ended", "parsed"]

CACHE = Path("~/.cache/nsc_fast/quality")


def cache_folder(folder: Path) -> Path:
    """The folder of adapters, resolved.

    Raises:
        MergeError: it stands inside the repository.
    """
    folder = folder.expanduser().resolve()
    repository = Path(__file__).resolve().parents[2]
    if folder.is_relative_to(repository):
        raise MergeError(
            f"the cache {folder} is inside the repository {repository}; adapters of data that may not be "
            "redistributed must not get into it: choose a folder outside with --cache"
        )
    return folder


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Adds what all commands on suites have in common, parses, and sets data folder and threads."""
    parser.add_argument("--suite", required=True, help=", ".join(s.name for s in suites.SUITES))
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"folder of the adapters; default: {CACHE}")
    parser.add_argument("--data", type=Path, help=f"folder of the data files; default: {DATA_VARIABLE}")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    if options.data is not None:
        os.environ[DATA_VARIABLE] = str(options.data)
    torch.set_num_threads(options.threads)
    return options


def ended(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command and ends the process: what the user can put right is told without a traceback."""
    try:
        sys.exit(main())
    except MergeError as error:
        sys.exit(f"error: {error}")
