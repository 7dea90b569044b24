"""The null-space ratio of a batch of activations: forward, and forward with backward."""

from __future__ import annotations

import torch

from nsc_fast.factors import row_basis
from nsc_fast.ops import null_space_ratio

from .peers import GramRatio, taken

# (tokens, features, rank); ViT-B/16 at batch 8, Llama-3-8B, LLaVA's v_proj with its 576 image tokens.
SHAPES = {
    "smoke": {"small": (256, 128, 16)},
    "cpu": {
        "d4096-r16": (4096, 4096, 16),
        "d4096-r64": (4096, 4096, 64),
        "vit-b-r16": (8 * 197, 768, 16),
        "d1024-r16": (2048, 1024, 16),
    },
    "full": {
        "llama-3-8b-r16": (16384, 4096, 16),
        "llama-3-8b-r64": (16384, 4096, 64),
        "llama-3-8b-ffn-r16": (16384, 14336, 16),
        "llava-v_proj-r16": (8 * 704, 4096, 16),
        "vit-b-r16": (256 * 197, 768, 16),
    },
}


def _setup(size: str, name: str, device: torch.device):
    n, d, r = SHAPES[size][name]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    z = torch.randn(n, d, device=device, dtype=dtype, requires_grad=True)
    down = torch.randn(r, d) / d**0.5
    basis = row_basis(down)[0].to(device, torch.float32)
    return z, basis, GramRatio(down.to(device, dtype)), f"N={n} d={d} r={r} {str(dtype)[6:]}"


def _both(call, z):
    def run():
        call(z).sum().backward()
        return taken(z)

    return run


def test_ratio_forward_backward(compare, record, device, size, name) -> None:
    z, basis, gram, case = _setup(size, name, device)
    ours, theirs = _both(lambda z: null_space_ratio(z, basis), z), _both(gram, z)
    got, expected = ours(), theirs()
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= (1e-4 if z.dtype == torch.float32 else 5e-2) * scale
    copy = z.detach().clone
    rank = basis.shape[0]
    goals = {"eager Gram inverse": ">= 2.5", "copy of z": ">= 0.625" if rank == 16 else ""}
    compiled = _both(torch.compile(gram, dynamic=False), z)
    peers = {"eager Gram inverse": theirs, "torch.compile of it": compiled, "copy of z": copy}
    ratios = compare(ours, peers, case=case, goals=goals if "d=4096" in case else None)
    # At least z is read twice and its gradient written once; a copy reads and writes.
    record(case, "copy of z", 1.5 * ratios["copy of z"], "of the copy's bandwidth")


def test_ratio_forward(compare, record, device, size, name) -> None:
    z, basis, gram, case = _setup(size, name, device)
    z = z.detach()
    torch.testing.assert_close(
        null_space_ratio(z, basis), gram(z).float(), rtol=0, atol=1e-5 if z.dtype == torch.float32 else 2e-2
    )
    peers = {"eager Gram inverse": lambda: gram(z), "copy of z": z.clone}
    ratios = compare(lambda: null_space_ratio(z, basis), peers, case=case)
    record(case, "copy of z", 0.5 * ratios["copy of z"], "of the copy's bandwidth")


def test_ratio_siblings(compare, device, size) -> None:
    """q, k and v read the same z: one pass for the three against one pass for one."""
    n, d, r = {"smoke": (256, 128, 8), "cpu": (4096, 4096, 16), "full": (16384, 4096, 16)}[size]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    z = torch.randn(n, d, device=device, dtype=dtype, requires_grad=True)
    bases = [row_basis(torch.randn(r, d))[0].to(device, torch.float32) for _ in range(3)]
    together = torch.cat(bases)
    three = _both(lambda z: null_space_ratio(z, together, ranks=[r] * 3), z)
    one = _both(lambda z: null_space_ratio(z, bases[0]), z)
    apart = _both(lambda z: sum(null_space_ratio(z, b) for b in bases), z)
    case = f"N={n} d={d} r={r} {str(dtype)[6:]}"
    goals = {"one module alone": ">= 0.71 (at most 1.4 times one)"}
    compare(three, {"one module alone": one, "three calls": apart}, case=case, goals=goals)
