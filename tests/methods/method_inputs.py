"""Inputs for methods: from plain factors, and from the recorded numbers of the original implementations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from nsc_fast import methods
from nsc_fast.adapters import LoraFactors
from nsc_fast.factors import canonical
from nsc_fast.methods import MergeInputs

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"

# Task -> module -> (A, B, s).
Raw = Mapping[str, Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]]


def inputs_of(raw: Raw, **more) -> MergeInputs:
    return MergeInputs(
        updates={t: {m: canonical(*f) for m, f in own.items()} for t, own in raw.items()},
        factors={t: {m: LoraFactors(*f) for m, f in own.items()} for t, own in raw.items()},
        **more,
    )


def merge(name: str, raw: Raw, parameters: Mapping | None = None, **more):
    method = methods.get(name)
    return method.run(inputs_of(raw, **more), method.parameters(**(parameters or {})))


def dense(name: str, raw: Raw, parameters: Mapping | None = None, **more) -> dict[str, torch.Tensor]:
    return {m: u.dense() for m, u in merge(name, raw, parameters, **more).updates.items()}


def random_raw(
    ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], seed: int = 0, scaling: float = 1.0
) -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor, float]]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        task: {m: (draw(r, i) / i**0.5, 0.3 * draw(o, r), scaling) for m, (o, i) in shapes.items()}
        for task, r in ranks.items()
    }


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def golden(name: str) -> dict[str, torch.Tensor]:
    if not GOLDEN.is_dir():
        pytest.skip("the recorded numbers (shared/golden beside the checkout) are not here")
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key].astype(np.float64)) for key in file.files}


def golden_entries() -> dict[str, dict]:
    """Name -> entry of the manifest; empty where the folder is absent."""
    file = GOLDEN / "manifest.json"
    if not file.is_file():
        return {}
    return {entry["file"].removesuffix(".npz"): entry for entry in json.loads(file.read_text())["outputs"]}


def golden_raw(case: str) -> Raw:
    """The adapters of a recorded case; VeRA's vectors are folded into its shared projections."""
    raw: dict[str, dict] = {}
    data = golden(f"inputs_{case}")
    for key in data:
        task, module, name = key.split("/")
        if name != "A":
            continue
        part = {n: data.get(f"{task}/{module}/{n}") for n in ("A", "B", "lambda_d", "lambda_b")}
        down, up = part["A"], part["B"]
        if part["lambda_d"] is not None:
            down, up = part["lambda_d"][:, None] * down, part["lambda_b"][:, None] * up
        raw.setdefault(task, {})[module] = (down, up, 1.0)
    return raw
