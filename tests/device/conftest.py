"""The tests of this folder run on a device that stands in for a real one, in a process of their own.

Triton's kernels are interpreted there, so that ``impl="auto"`` takes them.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
for folder in ("device", "", "architectures", "kernels/interp"):
    sys.path.insert(0, str(TESTS / folder))

import stand_in  # noqa: E402

_WHY = None
if os.environ.get("TRITON_INTERPRET") != "1":
    # Other tests take the CPU for the only device.
    _WHY = "run it by itself: TRITON_INTERPRET=1 pytest tests/device"
elif not stand_in.available():
    _WHY = "this torch takes no device written in Python"
elif importlib.util.find_spec("triton") is None:
    _WHY = "triton is not installed"
collect_ignore_glob = ["test_*.py"] if _WHY else []


def pytest_report_header(config):
    if _WHY:
        return f"tests/device skipped: {_WHY}"


if _WHY is None:
    import bf16_repair
    import triton.runtime.interpreter as interpreter

    _library = stand_in.install()
    bf16_repair.install()
    _call = interpreter.GridExecutor.__call__
    interpreter.GridExecutor.__call__ = lambda self, *args, **kwargs: _call(
        self,
        *map(stand_in.here, args),
        **{name: stand_in.here(value) for name, value in kwargs.items()},
    )


@pytest.fixture(autouse=True)
def _counted():
    """Every test begins at zero."""
    for counter in (stand_in.RAN, stand_in.WAITS, stand_in.CROSSED):
        counter.clear()
