"""Tests that execute the kernels' compiled PTX on the CPU. They need the PTX executor of gpu_lab beside the
project (or NSC_FAST_GPU_LAB), and a process that compiles: run this folder by itself.
"""

import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
GPU_LAB = Path(os.environ.get("NSC_FAST_GPU_LAB", HERE.parents[2] / "../shared/tools/gpu_lab")).resolve()
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "compiled"), str(GPU_LAB)]

_REASON = None
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    _REASON = "this process interprets kernels; run the folder by itself"
elif importlib.util.find_spec("triton") is None:
    _REASON = "triton is not installed"
elif not (GPU_LAB / "ptxsim.py").exists():
    _REASON = f"{GPU_LAB} is absent (set NSC_FAST_GPU_LAB to the folder with ptxsim.py)"
collect_ignore_glob = ["test_*.py"] if _REASON else []


def pytest_report_header(config):
    return f"tests/kernels/ptx skipped: {_REASON}" if _REASON else None
