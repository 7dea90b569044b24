"""A merged layer, forward and backward, against the frozen layer alone and the other ways to merge."""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from nsc_fast.factors import canonical, stack
from nsc_fast.layers import MergedLinear
from nsc_fast.siblings import share

from .peers import EagerLayer, GramRatio, MaterialisedLayer, forward_backward, taken

# (tokens, d_in, d_out, tasks, rank)
SHAPES = {
    "smoke": {"small": (128, 96, 64, 3, 4)},
    "cpu": {
        "d2048-K6-r16": (2048, 2048, 2048, 6, 16),
        "d4096-K6-r16": (1024, 4096, 4096, 6, 16),
        "d4096-K20-r16": (1024, 4096, 4096, 20, 16),
    },
    "full": {
        "llama-3-8b-q_proj-K6-r16": (8192, 4096, 4096, 6, 16),
        "llama-3-8b-k_proj-K6-r16": (8192, 4096, 1024, 6, 16),
        "llama-3-8b-up_proj-K6-r16": (8192, 4096, 14336, 6, 16),
        "llama-3-8b-q_proj-K20-r16": (8192, 4096, 4096, 20, 16),
    },
}
GOALS = {"d2048-K6-r16": 1.12, "d4096-K6-r16": 1.07}


def test_layer_forward_backward(compare, device, size, name) -> None:
    n, d_in, d_out, tasks, rank = SHAPES[size][name]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    base = nn.Linear(d_in, d_out, device=device, dtype=dtype).requires_grad_(False)
    downs = [torch.randn(rank, d_in) / d_in**0.5 for _ in range(tasks)]
    ups = [torch.randn(d_out, rank) * 0.02 for _ in range(tasks)]
    start = torch.full((tasks,), 0.4, device=device)
    on = [[f.to(device, dtype) for f in side] for side in (downs, ups)]
    coefficients = nn.Parameter(start.clone())
    stacked = stack([(str(k), canonical(a, b)) for k, (a, b) in enumerate(zip(downs, ups, strict=True))])
    ours = MergedLinear(base, stacked, lambda: coefficients)
    eager = EagerLayer(base, *on, start.to(dtype)).to(device)
    materialised = MaterialisedLayer(base, *on, start.to(dtype))
    peft = _peft(base, *on, device, dtype)
    z = torch.randn(n, d_in, device=device, dtype=dtype, requires_grad=True)
    g = torch.randn(n, d_out, device=device, dtype=dtype)

    got = *forward_backward(ours, z, g)(), coefficients
    _same(*got, *forward_backward(eager, z, g)(), eager.coefficients, z)
    limit = 1 + 1.5 * tasks * rank * (d_in + d_out) / (d_in * d_out)
    goal = min(GOALS.get(name, limit), limit)
    compare(
        forward_backward(ours, z, g),
        {
            "frozen base layer": forward_backward(base, z, g),
            "eager concatenated adapters": forward_backward(eager, z, g),
            "W_merge under autograd": forward_backward(materialised, z, g),
            "torch.compile of the eager form": forward_backward(torch.compile(eager, dynamic=False), z, g),
            "PEFT, adapters active together": forward_backward(peft, z, g),
        },
        case=f"N={n} {d_in}x{d_out} K={tasks} r={rank} {str(dtype)[6:]} (flop limit {limit:.2f})",
        goals={
            "frozen base layer": f">= {1 / goal:.3f} (at most {goal:.2f} times it)",
            "eager concatenated adapters": ">= 1",
            "W_merge under autograd": ">= 1.5",
        },
    )


def test_layer_siblings(compare, device, size) -> None:
    """Queries, keys and values: the three layers computed together against each for itself."""
    n, d, d_kv, tasks, rank = {
        "smoke": (128, 64, 32, 3, 4),
        "cpu": (768, 512, 512, 6, 16),
        "full": (8192, 4096, 1024, 6, 16),
    }[size]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    apart, together = (nn.ModuleList() for _ in range(2))
    coefficients = nn.Parameter(torch.full((tasks,), 0.4, device=device))
    for width in (d, d_kv, d_kv):
        base = nn.Linear(d, width, bias=False, device=device, dtype=dtype)
        named = [
            (str(k), canonical(torch.randn(rank, d) / d**0.5, torch.randn(width, rank) * 0.02))
            for k in range(tasks)
        ]
        for layers in (apart, together):
            layers.append(MergedLinear(base, stack(named), lambda: coefficients))
    z = torch.randn(n, d, device=device, dtype=dtype, requires_grad=True)
    (_,) = share(together, lambda: [layer(z) for layer in together])
    gs = [torch.randn(n, width, device=device, dtype=dtype) for width in (d, d_kv, d_kv)]

    def both(layers):
        def run() -> Tensor:
            torch.autograd.backward([layer(z) for layer in layers], gs)
            return taken(z)

        return run

    expected = both(apart)()
    assert (both(together)() - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 5e-2)
    compare(
        both(together),
        {"each layer for itself": both(apart)},
        case=f"N={n} d={d}, {d_kv} K={tasks} r={rank} {str(dtype)[6:]}",
        goals={"each layer for itself": ">= 1"},
    )


def test_layer_with_core(compare, device, size) -> None:
    """A core between the stacked factors, as ``anchored`` and ``auto`` train it, against autograd's."""
    n, d, tasks, rank = {"smoke": (128, 64, 3, 4), "cpu": (2048, 2048, 6, 16), "full": (8192, 4096, 6, 16)}[
        size
    ]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    base = nn.Linear(d, d, device=device, dtype=dtype).requires_grad_(False)
    named = [
        (str(k), canonical(torch.randn(rank, d) / d**0.5, torch.randn(d, rank) * 0.02)) for k in range(tasks)
    ]
    stacked, core = stack(named), nn.Parameter(0.4 * torch.eye(tasks * rank, device=device))
    ours = MergedLinear(base, stacked, lambda: core)
    q, c = (f.to(device, dtype) for f in (stacked.basis, stacked.columns))
    z = torch.randn(n, d, device=device, dtype=dtype, requires_grad=True)
    g = torch.randn(n, d, device=device, dtype=dtype)

    def eager(z: Tensor) -> Tensor:
        return base(z) + ((z @ q.T) @ core.to(dtype).T) @ c.T

    got = *forward_backward(ours, z, g)(), core.grad.clone()
    core.grad = None
    expected = *forward_backward(eager, z, g)(), core.grad
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= (1e-5 if dtype == torch.float32 else 5e-2) * b.abs().max()
    compare(
        forward_backward(ours, z, g),
        {
            "frozen base layer": forward_backward(base, z, g),
            "the same under autograd": forward_backward(eager, z, g),
        },
        case=f"N={n} {d}x{d} R={tasks * rank}, a core, {str(dtype)[6:]}",
        goals={"the same under autograd": ">= 1"},
    )


def test_layer_with_ratio(compare, device, size) -> None:
    """A target module: the ratio inside the layer against hooks around the eager layer."""
    from nsc_fast.ops import merged_linear

    n, d, tasks, rank = {"smoke": (126, 64, 3, 4), "cpu": (2046, 2048, 6, 16), "full": (8190, 4096, 6, 16)}[
        size
    ]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    base = nn.Linear(d, d, device=device, dtype=dtype).requires_grad_(False)
    downs = [torch.randn(rank, d) / d**0.5 for _ in range(tasks)]
    ups = [torch.randn(d, rank) * 0.02 for _ in range(tasks)]
    stacked = stack([(str(k), canonical(a, b)) for k, (a, b) in enumerate(zip(downs, ups, strict=True))])
    factors = [f.to(device, torch.float32) for f in (stacked.basis, stacked.columns)]
    coefficients = nn.Parameter(torch.full((tasks,), 0.4, device=device))
    task = torch.arange(tasks, dtype=torch.int32, device=device).repeat_interleave(n // tasks)
    on = [[f.to(device, dtype) for f in side] for side in (downs, ups)]
    eager = EagerLayer(base, *on, coefficients.detach().to(dtype)).to(device)
    grams = [GramRatio(a) for a in on[0]]
    z = torch.randn(n, d, device=device, dtype=dtype, requires_grad=True)
    g = torch.randn(n, d, device=device, dtype=dtype) / n

    def ours() -> Tensor:
        y, omega, _ = merged_linear(
            z,
            base.weight,
            base.bias,
            *factors,
            stacked.segment.to(device),
            coefficients,
            num_tasks=tasks,
            task=task,
        )
        torch.autograd.backward([y, omega.mean()], [g, None])
        return taken(z)

    def hooked() -> Tensor:
        ratios = torch.cat([gram(part) for gram, part in zip(grams, z.split(n // tasks), strict=True)])
        torch.autograd.backward([eager(z), ratios.mean()], [g, None])
        return taken(z)

    got, expected = ours(), hooked()
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= (1e-4 if dtype == torch.float32 else 5e-2) * scale
    compare(
        ours,
        {"eager concatenated adapters with hooks": hooked},
        case=f"N={n} {d}x{d} K={tasks} r={rank} {str(dtype)[6:]}",
        goals={"eager concatenated adapters with hooks": ">= 1"},
    )


def _same(y, dz, coefficients, other_y, other_dz, other_coefficients, z) -> None:
    tight = z.dtype == torch.float32
    for got, expected in ((y, other_y), (dz, other_dz), (coefficients.grad, other_coefficients.grad)):
        limit = (2e-4 if tight else 5e-2) * expected.abs().max()
        assert (got.to(expected.dtype) - expected).abs().max() <= limit


def _peft(base: nn.Linear, downs, ups, device, dtype) -> nn.Module:
    """PEFT's own LoRA layer with all adapters active, on a twin that shares the base weight."""
    twin = nn.Linear(*base.weight.shape[::-1], device=device, dtype=dtype)
    twin.weight, twin.bias = base.weight, base.bias
    holder = nn.ModuleDict({"layer": twin})
    names = [f"task{k}" for k in range(len(downs))]
    for name, a in zip(names, downs, strict=True):
        inject_adapter_in_model(
            LoraConfig(r=len(a), lora_alpha=len(a), target_modules=["layer"]), holder, name
        )
    layer = holder["layer"]
    for name, a, b in zip(names, downs, ups, strict=True):
        layer.lora_A[name].weight.data.copy_(a)
        layer.lora_B[name].weight.data.copy_(b)
    layer.set_adapter(names)
    return layer.to(device)
