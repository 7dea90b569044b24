"""Which launch choice a step takes: the plain functions of ``launch`` decide, unless ``tune`` was asked and
found a faster neighbour on this device.

What was found lasts as long as the process. ``save`` writes it to a file, and a process that finds the file's
name in NSC_FAST_TUNED reads it before its first launch. Nothing is ever timed unasked.
"""

import json
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import triton

from .launch import Launch, expand_choice, project_choice, rank_bin

VARIABLE = "NSC_FAST_TUNED"
STEPS = (
    "project",
    "low_rank_input",
    "coefficient_grads",
    "input_gradient",
    "low_rank_output",
    "ratio_backward",
)


@dataclass(frozen=True)
class Case:
    """What a choice depends on. rank: the bin; dtype: as in ``str(torch.bfloat16)``, without "torch."."""

    step: str
    rank: int
    dtype: str
    target: str
    aligned: bool = True
    precision: str = "ieee"

    def plain(self) -> Launch:
        """The choice of the plain functions."""
        dtype = getattr(torch, self.dtype)
        how = {"aligned": self.aligned, "precision": self.precision}
        if self.step in ("project", "low_rank_input", "coefficient_grads"):
            return project_choice(self.rank, dtype, self.target, ratio=self.step == "project", **how)
        return expand_choice(self.rank, dtype, self.target, step=self.step, **how)


_found: dict[Case, Launch] = {}


def choose(
    step: str, rank: int, dtype: torch.dtype, target: str, *, aligned: bool = True, precision: str = "ieee"
) -> Launch:
    """The choice for one launch."""
    _read_once(os.environ.get(VARIABLE, ""))
    case = Case(step, rank_bin(rank), str(dtype).removeprefix("torch."), target, aligned, precision)
    return _found.get(case) or case.plain()


def remember(case: Case, choice: Launch) -> None:
    """Every later launch of ``case`` in this process takes ``choice``."""
    _found[case] = choice


def forget() -> None:
    """Back to the plain functions."""
    _found.clear()


def save(path: str | os.PathLike[str]) -> None:
    """Writes what was found to ``path``, whole or not at all."""
    path = Path(path)
    choices = [{**asdict(case), "launch": asdict(choice)} for case, choice in _found.items()]
    text = json.dumps({"triton": triton.__version__, "choices": choices}, indent=1)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=path.name, suffix=".part", delete=False
    ) as file:
        try:
            file.write(text + "\n")
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def load(path: str | os.PathLike[str]) -> int:
    """Takes over the choices in a file that ``save`` wrote, and returns how many. What was found with another
    version of Triton, or beside a plain choice that has changed since, is left out with a warning.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        version = content["triton"]
        found = {_case(entry): Launch(**entry["launch"]) for entry in content["choices"]}
        usable = {case: choice for case, choice in found.items() if is_neighbour(choice, case.plain())}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold launch choices as tuned.save writes them ({error}); "
            f"write it anew, or remove {VARIABLE} from the environment"
        ) from error
    if version != triton.__version__:
        reason = f"they were found with Triton {version}, this is {triton.__version__}"
        usable = {}
    else:
        reason = "the plain choices have changed since"
    if len(usable) < len(found):
        left = len(found) - len(usable)
        warnings.warn(f"{left} launch choices in {path} are not used: {reason}; tune again", stacklevel=2)
    _found.update(usable)
    return len(usable)


def _case(entry: dict[str, object]) -> Case:
    case = Case(**{key: value for key, value in entry.items() if key != "launch"})
    if case.step not in STEPS:
        raise ValueError(f"no step is called {case.step!r}")
    return case


def is_neighbour(choice: Launch, plain: Launch) -> bool:
    """May ``choice`` stand in for ``plain``? What decides how a program is built must be the same. The form
    of the norm, for one: on some targets only one is safe (see ``launch``)."""
    sizes = (choice.block_n, choice.block_d, choice.num_warps, choice.num_stages)
    if not all(isinstance(size, int) for size in sizes):
        return False
    powers = all(16 <= size <= 256 and size & (size - 1) == 0 for size in sizes[:2])
    same = ("block_r", "parts", "tiles", "prefetch")
    return (
        powers
        and choice.num_warps in (4, 8)
        and 1 <= choice.num_stages <= 5
        and choice.maxnreg in (None, plain.maxnreg)
        and all(getattr(choice, name) == getattr(plain, name) for name in same)
    )


@cache
def _read_once(path: str) -> None:
    if path:
        load(path)
