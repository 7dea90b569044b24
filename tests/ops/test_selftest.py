"""The self-test of the kernels, here of plain torch: its verdict must not depend on who asks first."""

from contextlib import nullcontext

import pytest
import torch

from nsc_fast.ops import selftest


def refuse(tensor):
    raise AssertionError("a tensor of the self-test was kept for the caller's backward pass")


@pytest.mark.parametrize(
    "circumstances",
    [
        nullcontext,
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
        lambda: torch.autograd.graph.saved_tensors_hooks(refuse, refuse),
    ],
    ids=["none", "no_grad", "inference_mode", "autocast", "default device", "checkpoint"],
)
def test_passes_wherever_it_is_asked_first(circumstances):
    selftest._run.cache_clear()
    try:
        with circumstances():
            findings = selftest.run("cpu", None, "torch")
        assert len(findings) == 2 * len(selftest.TOLERANCES)
        assert all(finding.passed for finding in findings), findings
    finally:
        selftest._run.cache_clear()
