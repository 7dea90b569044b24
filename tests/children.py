"""Processes of their own: forked from a server that has imported torch and computed nothing yet."""

import multiprocessing
import os
import pickle
import socket
import sys
import traceback

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "nsc_fast.driver"])


def start(work, *arguments, variables=None):
    """A process that runs ``work(*arguments)``, a function of a test module, with environment variables."""
    child = _CONTEXT.Process(target=_run, args=(work, arguments, variables or {}), daemon=True)
    child.start()
    return child


def _run(work, arguments, variables):
    import torch

    os.environ.update(variables)
    torch.set_num_threads(1)
    work(*arguments)


def launch(work, folder, *, size=2, timeout=150):
    """``work(folder)`` in several processes, as a launcher starts them; exit codes and errors.

    Raises:
        AssertionError: one has not ended in time; all are killed.
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [
        start(_told, work, folder, rank, variables={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]
    for child in children:
        child.join(timeout)
    late = [rank for rank, child in enumerate(children) if child.is_alive()]
    for child in children:
        child.kill()
        child.join()
    files = [folder / f"error{rank}" for rank in range(size)]
    errors = [file.read_text() if file.exists() else "" for file in files]
    assert not late, f"processes {late} have not ended: {errors}"
    return [child.exitcode for child in children], errors


def results_of_two(work, folder):
    """What ``work(folder)`` has left in ``result0`` and ``result1``, in two processes that end well."""
    codes, errors = launch(work, folder)
    assert codes == [0, 0], errors
    return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(2)]


def _told(work, folder, rank):
    try:
        work(folder)
    except Exception as error:
        (folder / f"error{rank}").write_text(f"{type(error).__name__}: {error}")
        traceback.print_exc()
        sys.exit(1)
