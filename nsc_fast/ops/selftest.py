"""Numeric self-test of the kernels on a device, against the oracle in float64.

``impl="auto"`` asks :func:`passed` before it takes the kernels: one that does not compile, does not launch,
writes nothing or writes something else is never used. A device is tested once per process, and once more if
the user allows tf32 later, which changes what float32 runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .. import reference
from ..factors import canonical, stack
from .precision import tf32_allowed

__all__ = ["Finding", "passed", "run"]

_log = logging.getLogger(__name__)

# Largest error allowed, relative to the largest value: a few times what plain torch loses in the dtype.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# float32 where products may run in tf32, which has the precision of float16.
TF32_TOLERANCE = TOLERANCES[torch.float16]
_SHAPE = {"tokens": 75, "d_in": 136, "d_out": 88, "ranks": (16, 5, 24)}


@dataclass(frozen=True)
class Finding:
    """Result for one operation in one dtype: the largest relative error, or why it could not run."""

    operation: str
    dtype: torch.dtype
    error: float | None
    limit: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.limit


def passed(device: torch.device) -> bool:
    """Whether the kernels may be trusted on ``device``; where not, the reason is logged, once."""
    return _passed(device.type, device.index, tf32_allowed())


@cache
def _passed(device_type: str, index: int | None, tf32: bool) -> bool:
    failures = [finding for finding in _run(device_type, index, "triton", tf32) if not finding.passed]
    for finding in failures:
        _log.warning(
            "Triton kernel for %s in %s failed its self-test on %s (%s): plain torch is used",
            finding.operation,
            finding.dtype,
            device_type if index is None else f"{device_type}:{index}",
            finding.reason or f"relative error {finding.error:.1e}",
        )
    return not failures


def run(device_type: str, index: int | None = None, impl: str = "triton") -> tuple[Finding, ...]:
    """All findings for a device; every kernel runs forward and backward on a ragged shape."""
    # torch's setting speaks of CUDA devices; interpreted kernels act as if they ran on one.
    on_cuda = device_type == "cuda" or impl == "triton"
    return _run(device_type, index, impl, on_cuda and tf32_allowed())


@cache
def _run(device_type: str, index: int | None, impl: str, tf32: bool) -> tuple[Finding, ...]:
    device = torch.device(device_type, index) if index is not None else torch.device(device_type)
    limits = TOLERANCES | ({torch.float32: TF32_TOLERANCE} if tf32 else {})

    def findings() -> tuple[Finding, ...]:
        return tuple(
            _finding(operation, check, dtype, device, impl, limit)
            for dtype, limit in limits.items()
            for operation, check in (("null_space_ratio", _ratio), ("merged_linear", _merged))
        )

    # The first question may come from anywhere: without gradients, under autocast, inside a checkpoint. In
    # torch all of these belong to the thread that asks.
    with ThreadPoolExecutor(1) as undisturbed:
        return undisturbed.submit(findings).result()


def _finding(
    operation: str, check: Callable, dtype: torch.dtype, device: torch.device, impl: str, limit: float
) -> Finding:
    try:
        pairs = check(dtype, device, impl)
    # Compilers and drivers raise anything at all; what they raised is the finding.
    except Exception as error:  # noqa: BLE001
        return Finding(operation, dtype, None, limit, f"{type(error).__name__}: {error}")
    worst = 0.0
    for name, (got, expected) in pairs.items():
        got = got.detach().to("cpu", torch.float64)
        error = float((got - expected).abs().max() / expected.abs().max())
        if error != error:
            return Finding(operation, dtype, float("inf"), limit, f"{name} holds NaN")
        worst = max(worst, error)
    return Finding(operation, dtype, worst, limit)


def _problem(dtype: torch.dtype) -> dict[str, Tensor | list[Tensor]]:
    """Inputs rounded to ``dtype``, held in float64, so that only the operation's own error is seen."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, d_in, d_out, ranks = _SHAPE.values()
    return {
        "z": draw(n, d_in).to(dtype).double(),
        "g": draw(n, d_out).to(dtype).double(),
        "weight": (draw(d_out, d_in) / d_in**0.5).to(dtype).double(),
        "bias": draw(d_out).to(dtype).double(),
        "downs": [draw(r, d_in) for r in ranks],
        "ups": [draw(d_out, r) / d_in**0.5 for r in ranks],
        "coefficients": torch.tensor([0.4, -0.2, 0.7], dtype=torch.float64),
        "slope": draw(n, len(ranks)),
        "task": (torch.arange(n) % (len(ranks) + 1) - 1).to(torch.int32),
    }


def _ratio(dtype: torch.dtype, device: torch.device, impl: str) -> dict[str, tuple[Tensor, Tensor]]:
    from .null_space_ratio import null_space_ratio

    p = _problem(dtype)
    z = p["z"].clone().requires_grad_()
    omega = torch.stack([reference.null_space_ratio(z, a) for a in p["downs"]], dim=1)
    (dz,) = torch.autograd.grad((omega * p["slope"]).sum(), z)
    basis = torch.cat([canonical(a, b).basis for a, b in zip(p["downs"], p["ups"], strict=True)])
    mine = p["z"].to(device, dtype).requires_grad_()
    got = null_space_ratio(mine, basis.to(device, torch.float32), ranks=_SHAPE["ranks"], impl=impl)
    (got_dz,) = torch.autograd.grad((got * p["slope"].to(got)).sum(), mine)
    return {"omega": (got, omega.detach()), "dz": (got_dz, dz)}


def _merged(dtype: torch.dtype, device: torch.device, impl: str) -> dict[str, tuple[Tensor, Tensor]]:
    from .merged_linear import merged_linear

    p = _problem(dtype)
    z, c = p["z"].clone().requires_grad_(), p["coefficients"].clone().requires_grad_()
    y = reference.merged_linear(z, p["weight"], p["bias"], p["downs"], p["ups"], [1.0] * 3, c)
    omega = torch.stack([reference.null_space_ratio(z, a) for a in p["downs"]], dim=1)
    own = p["task"].long().clamp(min=0)[:, None]
    omega = torch.where(p["task"] < 0, 1.0, omega.gather(1, own).squeeze(1))
    slope = p["slope"][:, 0]
    dz, dc = torch.autograd.grad((y * p["g"]).sum() + (omega * slope).sum(), (z, c))
    stacked = stack(
        [(str(k), canonical(a, b)) for k, (a, b) in enumerate(zip(p["downs"], p["ups"], strict=True))]
    )
    mine = p["z"].to(device, dtype).requires_grad_()
    coefficients = p["coefficients"].to(device, torch.float32).requires_grad_()
    got, got_omega, _ = merged_linear(
        mine,
        p["weight"].to(device, dtype),
        p["bias"].to(device, dtype),
        stacked.basis.to(device, torch.float32),
        stacked.columns.to(device, torch.float32),
        stacked.segment.to(device),
        coefficients,
        num_tasks=3,
        task=p["task"].to(device),
        impl=impl,
    )
    total = (got * p["g"].to(got)).sum() + (got_omega * slope.to(got_omega)).sum()
    got_dz, got_dc = torch.autograd.grad(total, (mine, coefficients))
    return {
        "y": (got, y.detach()),
        "omega": (got_omega, omega.detach()),
        "dz": (got_dz, dz),
        "dcoefficients": (got_dc, dc),
    }
