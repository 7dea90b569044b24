"""Compile tests: Triton's compiler runs, no kernel does. Run this folder in a process of its own: with
TRITON_INTERPRET=1 nothing compiles.
"""

import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

_REASON = None
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    _REASON = "this process interprets kernels; run the folder by itself"
elif importlib.util.find_spec("triton") is None:
    _REASON = "triton is not installed"
collect_ignore_glob = ["test_*.py"] if _REASON else []


def pytest_report_header(config):
    return f"tests/kernels/compiled skipped: {_REASON}" if _REASON else None
