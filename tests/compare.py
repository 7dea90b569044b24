"""How results are judged: against float64, and by what plain torch loses in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def error(actual: Tensor, truth: Tensor) -> float:
    """Largest error, relative to the largest true value."""
    assert actual.shape == truth.shape, f"{tuple(actual.shape)} instead of {tuple(truth.shape)}"
    if truth.numel() == 0:
        return 0.0
    actual, truth = actual.detach(), truth.detach()
    size = float(truth.abs().max()) or 1.0
    return float((actual.double() - truth).abs().max()) / size


def assert_same(name: str, actual: Tensor, truth: Tensor, roundings: float = 1e4) -> None:
    """Equal in float64, up to the rounding of sums and of the textbook formula's Gram inverse."""
    assert actual.dtype == torch.float64, f"{name} is {actual.dtype}"
    e = error(actual, truth)
    assert e <= roundings * ROUNDOFF[torch.float64], f"{name}: relative error {e:.2e}"


def assert_no_worse(name: str, actual: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Our error is at most plain torch's in the same dtype, plus 2 roundings to the dtype of the result."""
    ours, theirs = error(actual, truth), error(plain, truth)
    allowed = theirs + 2 * ROUNDOFF[actual.dtype]
    assert ours <= allowed, f"{name}: relative error {ours:.2e}, plain torch {theirs:.2e}"
