"""The ratio and its gradient against numbers that the original implementation produced."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nsc_fast import NSCLoss, reference
from nsc_fast.factors import row_basis
from nsc_fast.ops import null_space_ratio

FILE = Path(__file__).resolve().parents[2] / "shared" / "golden" / "nsc_ratio.npz"

pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="the golden numbers are not beside the checkout")


@pytest.fixture(scope="module")
def numbers():
    with np.load(FILE) as file:
        return {name: torch.from_numpy(np.array(file[name])) for name in file.files}


def test_loss_and_gradient_where_the_original_is_defined(numbers):
    z = numbers["a/x"].clone().requires_grad_()
    loss = NSCLoss({"t": {"m": numbers["a/A"]}})(z, task="t")
    loss.backward()
    assert abs(loss.item() - numbers["a/scaling1/loss"].item()) <= 1e-6
    expected = numbers["a/scaling1/grad_x"]
    assert (z.grad - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("case", ["a", "b"])
def test_ratios_of_the_dense_projector(numbers, case):
    """Case b has nearly dependent rows, where a cached float32 Gram inverse no longer holds."""
    expected = numbers[f"{case}/dense_ratio"]
    omega = null_space_ratio(numbers[f"{case}/x"].double(), row_basis(numbers[f"{case}/A"])[0])
    real = numbers[f"{case}/x"].abs().sum(-1) > 0
    assert (omega - expected)[real].abs().max() <= 1e-4
    assert (omega[~real] == 1).all()


def test_the_scale_of_an_adapter_does_not_change_its_ratio(numbers):
    """The original mixes a scaled A with the inverse of the unscaled one: another number, or none (b)."""
    assert numbers["b/scaling2/loss"].isnan()
    once = NSCLoss({"t": {"m": numbers["b/A"]}})(numbers["b/x"], task="t")
    twice = NSCLoss({"t": {"m": 2 * numbers["b/A"]}})(numbers["b/x"], task="t")
    assert torch.isfinite(once) and abs(once - twice) <= 1e-6


def test_a_full_row_space_has_a_value_and_no_gradient(numbers):
    """Case c: A spans everything, and the original is not a number."""
    assert numbers["c/scaling1/loss"].isnan()
    z = numbers["c/x"].clone().requires_grad_()
    omega = null_space_ratio(z, row_basis(numbers["c/A"])[0])
    omega.sum().backward()
    real = z.detach().abs().sum(-1) > 0
    assert torch.allclose(omega[real], torch.tensor(reference.CLAMP).sqrt())
    assert (z.grad == 0).all()
