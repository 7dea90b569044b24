"""Inputs, comparisons and the access checker for the interpreter tests."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TARGETS = ["sm_80", "sm_90", "gfx942"]  # one target of each way that a program can be written
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24, torch.float64: 0.0}

GPU_LAB = Path(
    os.environ.get("NSC_FAST_GPU_LAB", Path(__file__).resolve().parents[3] / "../shared/tools/gpu_lab")
).resolve()
needs_checker = pytest.mark.skipif(
    not (GPU_LAB / "interp_lab.py").exists(),
    reason=f"no access checker: {GPU_LAB} is absent (set NSC_FAST_GPU_LAB to its folder)",
)


def ids(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def basis(ranks: list[int], d: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Stacked orthonormal rows, (sum(ranks), d); a segment wider than d repeats nothing beyond d rows."""
    g = torch.Generator().manual_seed(seed)
    parts = []
    for r in ranks:
        part = torch.zeros(r, d)
        rows = torch.linalg.qr(torch.randn(d, min(r, d), generator=g))[0].T
        part[: rows.shape[0]] = rows
        parts.append(part)
    return torch.cat(parts).to(dtype)


def segments(ranks: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(ranks), dtype=torch.int32), torch.tensor(ranks))


def close(name, actual, expected, floor: float, unit: float | None = None) -> None:
    """|actual - expected| <= unit |expected| + floor max|expected|, element by element. unit is half an ulp
    or more of the output's dtype, floor what the sums inside may lose."""
    unit = UNIT[actual.dtype] if unit is None else unit
    actual = actual.double()
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} for {tuple(expected.shape)}"
    if not expected.numel():
        return
    allowed = unit * expected.abs() + floor * expected.abs().max() + 1e-30
    error = (actual - expected).abs()
    bad = ~(error <= allowed)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} elements off, first at {at}: "
            f"got {actual[at].item()!r}, expected {expected[at].item()!r}, allowed {allowed[at].item():.3g}"
        )


@contextmanager
def checked(shuffle: int | None = None):
    """Every access inside is checked against its tensor; the programs run in a shuffled order if asked."""
    sys.path.insert(0, str(GPU_LAB))
    import interp_lab

    with interp_lab.Checker(shuffle=shuffle) as checker:
        yield checker
    races = checker.report()["races"]
    assert not races, races
