"""Makes the report of an existing output folder again."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from ..errors import MergeError
from .card import renewed
from .page import page
from .record import read_record

__all__ = ["write_report"]

REPORT = Path("nsc_fast") / "report.html"


def write_report(out: str | os.PathLike[str]) -> list[Path]:
    """Writes ``nsc_fast/report.html`` and the marked part of ``README.md`` from what the folder holds.

    A model card without the marks is somebody's own, and left alone.

    Returns:
        The files that were written.

    Raises:
        MergeError: no output of a merge, a damaged file, or a folder that cannot be written.
    """
    folder = Path(out)
    if not folder.is_dir():
        raise MergeError(f"there is no folder {str(folder)!r}; report needs a folder that `merge` wrote")
    record = read_record(folder)
    written = {folder / REPORT: page(record)}
    readme = folder / "README.md"
    try:
        text = renewed(readme.read_text(encoding="utf-8"), record) if readme.is_file() else None
        if text is not None:
            written[readme] = text
        for path, content in written.items():
            _replace(path, content)
    except (OSError, UnicodeDecodeError) as error:
        raise MergeError(f"the report in {folder} cannot be written: {error}") from error
    return list(written)


def _replace(path: Path, content: str) -> None:
    """The file is the old one or the new one at any time."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(content, encoding="utf-8", newline="\n")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
