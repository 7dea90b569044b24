"""Checkpoints of an optimisation: there is always a whole one, and from it the run goes on bit by bit.

A checkpoint holds everything that changes while the loop runs: coefficients, optimizer, schedule, early
stopping, history, where every stream of batches stands, and the states of the random number generators. It is
written beside its final name, flushed to the disk and renamed, and carries a digest of itself; the last two
are kept. A process that is killed while it writes therefore leaves the one before.

The same bits as an undisturbed run come from the same machine and software. What else they depend on (method,
parameters, adapters, base model, data, number of processes) is in the checkpoint and compared.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import re
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .errors import MergeError

__all__ = [
    "Checkpoints",
    "Recorder",
    "Stateful",
    "differences",
    "digest",
    "random_state",
    "set_random_state",
]

_NAME = re.compile(r"step-(\d+)\.ckpt$")
_TEMPORARY = re.compile(r"\.step-\d+\.ckpt\.[0-9a-f]{8}$")
_MAGIC = b"nsc_fast checkpoint 1\n"
_KEPT = 2
# Parameters that may differ when a run goes on: they decide how the steps are computed, not what they are.
_FREE = {"batching", "checkpointing", "offload", "micro_batch", "packing", "log_coefficients_every"}


@runtime_checkable
class Stateful(Protocol):
    """What has a state that changes while the loop runs: tensors and plain values."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Group(Protocol):
    """The processes of a run, of which the first reads and writes for all (``nsc_fast.processes``)."""

    rank: int

    def gather(self, value: Any) -> list[Any]: ...


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


@dataclass(frozen=True)
class Checkpoints:
    """Where the checkpoints of a run lie, and how often one is written.

    Attributes:
        folder: made when the optimisation starts; nothing else should lie in it.
        every: steps between two; one is written after the last step in any case.
        resume: go on from the last one, or from the start where there is none.
        restart: delete those of an earlier run. With neither, finding some is an error.
        facts: what the run depends on beside what the loop knows, compared when it goes on.
        on_notice: is told what the user should know. Default: a warning.
    """

    folder: str | os.PathLike[str]
    every: int = 25
    resume: bool = False
    restart: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    on_notice: Callable[[str], None] = _warn

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"checkpoints every {self.every} steps: at least every 1")

    @property
    def path(self) -> Path:
        return Path(self.folder)

    def files(self) -> list[Path]:
        """The checkpoints that are there, the last one first."""
        found = [p for p in self.path.iterdir() if _NAME.match(p.name)] if self.path.is_dir() else []
        return sorted(found, key=_step_of, reverse=True)

    def with_facts(self, **facts: Any) -> Checkpoints:
        """The same, with more to compare."""
        return replace(self, facts={**self.facts, **facts})

    def check(self) -> None:
        """Whether a run may begin with what is there.

        Raises:
            MergeError: checkpoints of an earlier run, and no word on what to do with them.
        """
        found = self.files()
        if found and not (self.resume or self.restart):
            raise MergeError(
                f"{self.path} holds checkpoints of an earlier run, the last after step {_step_of(found[0])}; "
                "resume (--resume) to go on from there, or delete the folder to start again"
            )

    def clear(self) -> None:
        """Deletes the checkpoints, what a killed process left of one, and the folder if it is empty then."""
        try:
            for file in list(self.path.iterdir()) if self.path.is_dir() else ():
                if _NAME.match(file.name) or _TEMPORARY.match(file.name):
                    file.unlink(missing_ok=True)
            if self.path.is_dir() and not any(self.path.iterdir()):
                self.path.rmdir()
        except OSError as error:
            self.on_notice(f"the checkpoints in {self.path} could not be deleted: {error}")


def _step_of(file: Path) -> int:
    return int(_NAME.match(file.name)[1])


class Recorder:
    """Writes the checkpoints of one run and reads the last one.

    Args:
        checkpoints: where and how often.
        parts: name -> what has a state.
        facts: what the run depends on, those of ``checkpoints`` among it; plain values and digests, nested.
        processes: of the run, if there are many.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        parts: Mapping[str, Stateful],
        facts: Mapping[str, Any],
        processes: Group | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        self._parts = parts
        self._facts = dict(facts)
        self._processes = processes
        self._writes = processes is None or processes.rank == 0
        self._last: int | None = None

    def begin(self) -> tuple[list[dict[str, Any]], bool]:
        """Puts everything back to where the last checkpoint was made, if the run is to go on.

        Returns:
            The history until then, and whether the optimisation had ended.

        Raises:
            MergeError: the folder cannot be written to, no checkpoint in it can be read, it is one of another
                run (names what differs), or the data come in another order than they did.
        """
        state = self._prepare() if self._writes else None
        if self._processes is not None:
            state = self._processes.gather(state)[0]
        if state is None:
            return [], False
        wrong, free = differences(state["facts"], self._facts)
        if wrong:
            raise MergeError(
                f"the checkpoint in {self._checkpoints.path} is one of another run: {'; '.join(wrong)}. Put "
                "back what has changed, or start again without the checkpoints"
            )
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        set_random_state(state["random"])
        self._last = len(state["history"])
        if self._writes:
            told = f"; not bit by bit as before: {'; '.join(free)}" if free else ""
            self._checkpoints.on_notice(f"going on after step {self._last}{told}")
        return state["history"], state["ended"]

    def step(self, history: Sequence[Any], ended: bool) -> None:
        """After a step: writes a checkpoint if it is time for one.

        Args:
            history: dataclasses of plain values, one of every step.
            ended: whether it was the last step.

        A disk that is full or gone is reported and does not end the run: the last checkpoint stays.
        """
        step = len(history)
        if not self._writes or not (ended or step % self._checkpoints.every == 0):
            return
        state = {
            "facts": self._facts,
            "history": [asdict(record) for record in history],
            "ended": ended,
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
            "random": random_state(),
        }
        try:
            _write(self._checkpoints.path / f"step-{step:08d}.ckpt", state)
        except OSError as error:
            last = "there is none yet" if self._last is None else f"the last one is of step {self._last}"
            self._checkpoints.on_notice(
                f"no checkpoint of step {step} could be written to {self._checkpoints.path}: "
                f"{error.strerror or error}; {last}. The run goes on"
            )
            return
        self._last = step
        try:
            for old in self._checkpoints.files()[_KEPT:]:
                old.unlink(missing_ok=True)
        except OSError as error:
            self._checkpoints.on_notice(f"an old checkpoint could not be deleted: {error}")

    def close(self) -> None:
        """Takes the folder away if nothing was written and nothing was there."""
        if self._writes and self._last is None:
            _without_errors(self._remove_if_empty)

    def _remove_if_empty(self) -> None:
        folder = self._checkpoints.path
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def _prepare(self) -> dict[str, Any] | None:
        """The folder, writable; the last checkpoint's content if the run is to go on from it."""
        checkpoints = self._checkpoints
        checkpoints.check()
        if checkpoints.restart and not checkpoints.resume:
            checkpoints.clear()
        try:
            checkpoints.path.mkdir(parents=True, exist_ok=True)
            for left in checkpoints.path.iterdir():
                if _TEMPORARY.match(left.name):
                    left.unlink()
            probe = checkpoints.path / f".step-0.ckpt.{secrets.token_hex(4)}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise MergeError(
                f"checkpoints cannot be written to {checkpoints.path}: {error.strerror or error}; choose "
                "another folder (--checkpoints)"
            ) from error
        return self._latest() if checkpoints.resume else None

    def _latest(self) -> dict[str, Any] | None:
        files = self._checkpoints.files()
        for file in files:
            try:
                return _read(file)
            except (OSError, ValueError) as error:
                self._checkpoints.on_notice(f"{file} cannot be read ({error}): trying the one before")
        if files:
            raise MergeError(
                f"none of the checkpoints in {self._checkpoints.path} can be read; delete the folder to "
                "start again"
            )
        return None


def _write(file: Path, state: dict[str, Any]) -> None:
    """Whole under its name, or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as out:
            out.write(_MAGIC + hashlib.sha256(content).digest())
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except BaseException:
        _without_errors(temporary.unlink)
        raise
    if os.name == "posix":
        # The new name, too, must survive a power failure.
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            # Some network file systems know no such thing.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(folder)


def _without_errors(remove: Callable[[], None]) -> None:
    """Where the disk is gone, so is what should be removed: the error that led here is the one to report."""
    with suppress(OSError):
        remove()


def _read(file: Path) -> dict[str, Any]:
    """Raises ValueError for what is no whole checkpoint."""
    content = file.read_bytes()
    start = len(_MAGIC) + 32
    whole = hashlib.sha256(content[start:]).digest() == content[start - 32 : start]
    if not content.startswith(_MAGIC) or not whole:
        raise ValueError("damaged, or no checkpoint of this version")
    return torch.load(io.BytesIO(content[start:]), map_location="cpu", weights_only=True)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between two runs' facts, in words: what must not, and what may."""
    before, after = dict(_flat(then)), dict(_flat(now))
    wrong, free = [], []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name, "absent"), after.get(name, "absent")
        if old == new:
            continue
        hidden = any(isinstance(v, str) and v.startswith("sha256:") for v in (old, new))
        told = f"{name} is not the same" if hidden else f"{name} is {new!r} and was {old!r}"
        kind, _, key = name.partition(".")
        (free if kind == "parameters" and key in _FREE else wrong).append(told)
    return wrong, free


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def digest(content: Iterable[tuple[str, Any]]) -> str:
    """``"sha256:..."`` of named tensors (shape, dtype and bits) and plain values."""
    out = hashlib.sha256()
    for name, value in content:
        out.update(repr(name).encode())
        if isinstance(value, Tensor):
            out.update(repr((tuple(value.shape), value.dtype)).encode())
            out.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            out.update(repr(value).encode())
    return f"sha256:{out.hexdigest()}"


def random_state() -> dict[str, Any]:
    """States of the global random number generators that data may be drawn with."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Back to what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
