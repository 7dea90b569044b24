"""Memory kept for the backward pass by a merged layer and a model, in bytes a token: counted, not timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from nsc_fast.driver import Driver
from nsc_fast.factors import canonical, stack
from nsc_fast.footprint import FakeMerge
from nsc_fast.layers import install
from nsc_fast.memory import LiveBytes, checkpointed
from nsc_fast.monitor import TokenBatch
from nsc_fast.ops import merged_linear
from nsc_fast.targets import select_targets

from .llama import random_llama
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


LLAMAS = {  # hidden, feed-forward, heads, heads of keys, blocks, tasks, rank, tokens
    "smoke": (256, 896, 4, 1, 4, 6, 4, 128),
    "cpu": (1024, 3584, 16, 4, 4, 6, 16, 512),
    "full": (4096, 14336, 32, 8, 4, 6, 16, 512),
}
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_memory_of_a_block(record, size, dtype) -> None:
    """Bytes that autograd keeps per token and block of a Llama, against the planner and the eager loop."""
    hidden, wide, heads, of_keys, blocks, tasks, rank, tokens = LLAMAS[size]
    shape = (hidden, wide, heads, of_keys, blocks, dtype)
    ranks = {f"t{k}": rank for k in range(tasks)}
    names = [n for n, _ in random_llama(*shape, device="meta").named_modules() if n.endswith(_LINEAR)]
    targets = select_targets(names)
    ids = torch.randint(0, 60, (1, tokens))
    case = f"d={hidden} ff={wide} K={tasks} r={rank} {tokens} tokens {str(dtype)[6:]}"
    eager = _eager_kept(random_llama(*shape), names, targets, ranks, ids) / (tokens * blocks)
    record(case, "eager concatenated adapters with ratio hooks", eager, "bytes a token and block")
    plan = FakeMerge(
        random_llama(*shape, device="meta"), {t: dict.fromkeys(names, rank) for t in ranks}, targets
    )
    share = {}
    for recompute in ("never", "feed_forward", "always"):
        kept, peaks = {}, {}
        for n in (tokens, 4 * tokens):
            kept[n], peaks[n] = _ours(random_llama(*shape), names, targets, ranks, n, recompute)
        each = kept[tokens] / (tokens * blocks)
        share[recompute] = each / eager
        record(case, f"ours, checkpointing {recompute}", each, "bytes a token and block")
        record(case, f"ours, checkpointing {recompute}", share[recompute], "of the eager loop's bytes")
        assert abs(plan.run(1, tokens, recompute, masked=False).kept / kept[tokens] - 1) <= 0.05
        growth = peaks[4 * tokens] / peaks[tokens]
        record(case, f"peak at four times the tokens, checkpointing {recompute}", growth, "times the peak")
        assert 3.6 <= growth <= 4.4
    assert share["always"] <= 0.1
    assert share["feed_forward"] <= 0.3
    assert share["never"] <= 0.75


def _factors(model: nn.Module, name: str, rank: int) -> tuple[Tensor, Tensor]:
    layer = model.get_submodule(name)
    down = torch.randn(rank, layer.in_features) / layer.in_features**0.5
    up = torch.randn(layer.out_features, rank) * 0.02
    return down.to(layer.weight.dtype), up.to(layer.weight.dtype)


def _eager_kept(
    model: nn.Module, names: list[str], targets: Sequence[str], ranks: dict[str, int], ids: Tensor
) -> int:
    """One task's pass of the eager loop: all adapters active, ratios from hooks."""
    ratios, seen = {}, []
    for name in names:
        pairs = [_factors(model, name, rank) for rank in ranks.values()]
        layer = EagerLayer(
            model.get_submodule(name),
            *zip(*pairs, strict=True),
            torch.full((len(ranks),), 0.4, dtype=pairs[0][0].dtype),
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        if name in targets:
            ratios[name] = GramRatio(pairs[0][0])
    for name, ratio in ratios.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, ratio=ratio: seen.append(ratio(args[0]).mean())
        )
    fixed = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    fixed |= {t.data_ptr() for ratio in ratios.values() for t in (ratio.down, ratio.gram_inverse)}
    return _kept(lambda: (model(ids, use_cache=False), torch.stack(seen).mean()), ids, fixed)


def _ours(
    model: nn.Module,
    names: list[str],
    targets: Sequence[str],
    ranks: dict[str, int],
    tokens: int,
    recompute: str,
) -> tuple[int, int]:
    """Bytes alive after the forward pass, and the most alive at any time."""
    adapters = {
        task: {name: canonical(*_factors(model, name, rank)) for name in names}
        for task, rank in ranks.items()
    }
    installation = install(model, adapters, targets=targets)
    driver = Driver(model, installation)
    inputs, batch = (
        {"input_ids": torch.zeros(1, tokens, dtype=torch.int64)},
        torch.zeros(1, dtype=torch.int64),
    )
    fixed = [*model.parameters(), *model.buffers(), *installation.coefficients.parameters(), *inputs.values()]
    # The first pass with such inputs: it runs to the end.
    with (
        checkpointed(model, installation.modules, recompute),
        LiveBytes().ignore([*fixed, batch]) as live,
    ):
        loss = driver.forward(inputs, TokenBatch(batch))
        kept = live.now
        loss.backward()
    installation.monitor.clear()
    return kept, live.peak
