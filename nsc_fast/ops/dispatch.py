"""Which implementation runs: the Triton kernels or plain torch.

``impl="auto"`` takes the kernels where Triton can launch on the tensor's device and their numeric
self-test has passed there, and plain torch everywhere else. A kernel that compiles but computes something
else has been seen in the field, so no device is trusted before its self-test.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import Literal, get_args

import torch

from . import torch_steps

__all__ = ["Impl", "obstacle", "resolve", "steps"]

# What one program of the kernels keeps in registers; above it torch's products are as good.
MAX_RANK = 512

Impl = Literal["auto", "triton", "torch"]


def resolve(impl: str, device: torch.device, dtype: torch.dtype, rank: int) -> str:
    """``"triton"`` or ``"torch"`` for tensors of ``dtype`` on ``device`` and stacked rank ``rank``.

    Raises:
        ValueError: ``impl`` is none of "auto", "triton", "torch".
        RuntimeError: "triton" was asked for and cannot run here.
    """
    # Under torch.compile the rank may be symbolic; the branch makes it a constant of the graph, which
    # assume_constant_result wants.
    if rank > MAX_RANK:
        return _resolve(impl, device, dtype, MAX_RANK + 1)
    return _resolve(impl, device, dtype, MAX_RANK)


def _resolve(impl: str, device: torch.device, dtype: torch.dtype, rank: int) -> str:
    if impl not in get_args(Impl):
        raise ValueError(f"impl={impl!r}: choose one of {', '.join(map(repr, get_args(Impl)))}")
    if impl == "torch" or (impl == "auto" and device.type == "cpu"):
        return "torch"
    hindrance = obstacle(device, dtype, rank)
    if impl == "triton":
        if hindrance is None:
            return "triton"
        raise RuntimeError(f'impl="triton" cannot run: {hindrance}; use impl="auto" or impl="torch"')
    if hindrance is not None:
        return "torch"
    from . import selftest

    return "triton" if selftest.passed(device) else "torch"


# Under torch.compile the answer is a constant of the graph. This is all that the decorator
# torch.compiler.assume_constant_result does, but the decorator imports the compiler, and Triton with it.
_resolve._dynamo_marked_constant = True


def steps(impl: str) -> ModuleType:
    """The module whose functions do the fused steps for a resolved ``impl``."""
    if impl == "torch":
        return torch_steps
    from . import triton_steps

    return triton_steps


def obstacle(device: torch.device, dtype: torch.dtype, rank: int = 1) -> str | None:
    """Why the kernels cannot run for these tensors, or None."""
    if dtype == torch.float64:
        return "the kernels take float32, bfloat16 and float16, not float64"
    if rank > MAX_RANK:
        return f"the kernels take a stacked rank of at most {MAX_RANK}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are on the CPU (TRITON_INTERPRET=1 in the environment interprets the kernels)"
    return None
