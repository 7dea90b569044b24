"""A merged layer over a 4-bit base, forward and backward, against the 4-bit layer alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nsc_fast.factors import canonical, stack
from nsc_fast.layers import MergedLinear

from .peers import forward_backward

# (tokens, width, tasks, rank). The width of Llama's attention on a CPU as well: in a layer narrower than 2880
# the low-rank path alone takes more operations than a tenth of the base's.
SHAPES = {
    "smoke": {"small": (64, 128, 3, 4)},
    "cpu": {"llama-3-8b-q_proj-K6-r16": (512, 4096, 6, 16)},
    "full": {
        "llama-3-8b-q_proj-K6-r16": (8192, 4096, 6, 16),
        "llama-3-8b-q_proj-K20-r16": (8192, 4096, 20, 16),
    },
}
GOAL = 1.1


def test_quantised_layer(compare, device, size, name) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="needs nsc-fast[quantised]")
    n, d, tasks, rank = SHAPES[size][name]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    base = bnb.nn.Linear4bit(d, d, bias=False, compute_dtype=dtype, quant_type="nf4")
    base.load_state_dict(nn.Linear(d, d, bias=False).state_dict())
    base = base.to(device).requires_grad_(False)
    downs = [torch.randn(rank, d) / d**0.5 for _ in range(tasks)]
    ups = [torch.randn(d, rank) * 0.02 for _ in range(tasks)]
    stacked = stack([(str(k), canonical(a, b)) for k, (a, b) in enumerate(zip(downs, ups, strict=True))])
    coefficients = nn.Parameter(torch.full((tasks,), 0.4, device=device))
    ours = MergedLinear(base, stacked, lambda: coefficients)
    z = torch.randn(n, d, device=device, dtype=dtype, requires_grad=True)
    g = torch.randn(n, d, device=device, dtype=dtype)

    weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).to(dtype)
    for a, b in zip(downs, ups, strict=True):
        weight = weight + 0.4 * (b.to(weight) @ a.to(weight))
    y, dz = forward_backward(ours, z, g)()
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for got, expected in ((y, z.detach() @ weight.t()), (dz, g @ weight)):
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()
    limit = 1 + 1.5 * tasks * rank * 2 / d
    compare(
        forward_backward(ours, z, g),
        {"4-bit layer alone": forward_backward(base, z, g)},
        case=f"N={n} {d}x{d} nf4 K={tasks} r={rank} {str(dtype)[6:]} (flop limit {limit:.2f})",
        goals={"4-bit layer alone": f">= {1 / GOAL:.3f} (at most {GOAL:.2f} times it)"},
    )
