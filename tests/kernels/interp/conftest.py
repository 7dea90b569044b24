"""Interpreter tests. Triton reads TRITON_INTERPRET when it is first imported, so this file sets it in its
first lines. A process that has imported Triton for compiling skips these tests: run this folder by itself.
"""

import os
import sys

_LATE = "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
if not _LATE:
    os.environ["TRITON_INTERPRET"] = "1"

import importlib.util  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))

_NO_TRITON = importlib.util.find_spec("triton") is None
collect_ignore_glob = ["test_*.py"] if _NO_TRITON or _LATE else []


def pytest_report_header(config):
    if _LATE:
        return "tests/kernels/interp skipped: triton was imported for compiling; run the folder by itself"
    if _NO_TRITON:
        return "tests/kernels/interp skipped: triton is not installed"


if not collect_ignore_glob:
    import bf16_repair

    bf16_repair.install()


@pytest.fixture(autouse=True)
def _seed_and_poison(monkeypatch):
    """Fixed inputs, and torch.empty gives NaN: a value that a kernel never writes shows at once."""
    import torch

    torch.manual_seed(0)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
