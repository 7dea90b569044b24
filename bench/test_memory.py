"""Memory kept for the backward pass by one merged layer, in bytes a token: counted, not timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nsc_fast.factors import canonical, stack
from nsc_fast.ops import merged_linear

from .peers import EagerLayer, GramRatio, MaterialisedLayer

SHAPES = {  # tokens, width, tasks, rank
    "smoke": (120, 64, 3, 4),
    "cpu": (1020, 1024, 6, 16),
    "full": (8190, 4096, 6, 16),
}


def test_memory_kept(record, device, size) -> None:
    n, d, tasks, rank = SHAPES[size]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    base = nn.Linear(d, d, device=device, dtype=dtype).requires_grad_(False)
    downs = [(torch.randn(rank, d) / d**0.5).to(device, dtype) for _ in range(tasks)]
    ups = [(torch.randn(d, rank) * 0.02).to(device, dtype) for _ in range(tasks)]
    start = torch.full((tasks,), 0.4, device=device)
    stacked = stack([(str(k), canonical(a, b)) for k, (a, b) in enumerate(zip(downs, ups, strict=True))])
    factors = [f.to(device, torch.float32) for f in (stacked.basis, stacked.columns)]
    segment, coefficients = stacked.segment.to(device), nn.Parameter(start.clone())
    task = torch.arange(tasks, dtype=torch.int32, device=device).repeat_interleave(n // tasks)
    z = torch.randn(n, d, device=device, dtype=dtype, requires_grad=True)
    eager = EagerLayer(base, downs, ups, start.to(dtype)).to(device)
    formed = MaterialisedLayer(base, downs, ups, start.to(dtype))
    grams = [GramRatio(a) for a in downs]
    fixed = {t.data_ptr() for t in (base.weight, base.bias, *factors, segment, task, *downs, *ups)}
    fixed |= {t.data_ptr() for t in (eager.down, eager.up, eager.index, *[g.gram_inverse for g in grams])}

    def layer(own: Tensor | None) -> Callable[[], object]:
        return lambda: merged_linear(
            z, base.weight, base.bias, *factors, segment, coefficients, num_tasks=tasks, task=own
        )

    def hooked() -> object:
        parts = zip(grams, z.split(n // tasks), strict=True)
        return eager(z), torch.cat([gram(part) for gram, part in parts])

    total = {
        "ours": _kept(layer(None), z, fixed),
        "ours, target module": _kept(layer(task), z, fixed),
        "eager concatenated adapters": _kept(lambda: eager(z), z, fixed),
        "eager with ratio hooks": _kept(hooked, z, fixed),
        "W_merge under autograd": _kept(lambda: formed(z), z, fixed),
    }
    case = f"N={n} {d}x{d} K={tasks} r={rank} {str(dtype)[6:]}, z itself not counted"
    for name, kept in total.items():
        record(case, name, kept / n, "bytes a token")
    columns = tasks * rank * (4 if device.type == "cpu" else dtype.itemsize)
    assert total["ours"] <= 1.05 * n * columns
    assert total["ours, target module"] <= 1.05 * n * (columns + 8)


def _kept(run: Callable[[], object], z: Tensor, fixed: set[int]) -> int:
    """Bytes that autograd keeps, without weights and without z, which its producer keeps anyway."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in fixed and storage.data_ptr() != z.untyped_storage().data_ptr():
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep = run()
    del keep
    return sum(size for size in storages.values())
