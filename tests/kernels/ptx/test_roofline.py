"""The shipped choices are bound by memory where they are meant to be."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))

import roofline  # noqa: E402


@pytest.mark.parametrize("gpu", roofline.GPUS)
@pytest.mark.parametrize("kernel", roofline.KERNELS)
@pytest.mark.parametrize("rank", [16, 96, 128])
def test_device_memory_binds(rank, kernel, gpu):
    """d = 4096, N = 16k, bfloat16: no other resource needs more than 1 / 0.9 of the time of the bytes."""
    found = roofline.bound(kernel, gpu, 16384, 4096, rank)
    assert found.roof >= 0.9, (found.binds, found.times)
    assert found.fill >= 0.9


def test_what_binds_otherwise():
    """The comparison can tell: larger ranks are not bound by device memory, few tokens leave units idle."""
    assert roofline.bound("project", "H100", 16384, 4096, 256).roof < 0.9
    assert roofline.bound("project", "H100", 1024, 4096, 96).fill < 0.1
