"""Methods with a low-rank form: against their dense definitions, and without ever forming a dense update."""

from __future__ import annotations

import pytest
import torch
from method_inputs import dense, error, inputs_of, merge, random_raw
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from nsc_fast import methods

SHAPES = {"wide": (14, 33), "tall": (29, 16)}
RANKS = {"x": 2, "y": 4, "z": 3}


@pytest.fixture
def raw():
    adapters = random_raw(RANKS, SHAPES, seed=11, scaling=0.7)
    del adapters["y"]["wide"]
    return adapters


def _updates(raw, module) -> list[torch.Tensor]:
    return [s * b @ a for own in raw.values() if module in own for a, b, s in [own[module]]]


def _truncated(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]


def _polar(matrix):
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def test_tsv_from_dense_decompositions(raw):
    for module, got in dense("tsv", raw, {"scaling": 0.8}).items():
        ranks = [own[module][0].shape[0] for own in raw.values() if module in own]
        share = min(SHAPES[module]) // len(ranks)
        parts = zip(_updates(raw, module), ranks, strict=True)
        triplets = [_truncated(update, min(rank, share)) for update, rank in parts]
        left = _polar(torch.cat([u for u, _, _ in triplets], dim=1))
        right = _polar(torch.cat([vh for _, _, vh in triplets]))
        assert error(got, 0.8 * left * torch.cat([s for _, s, _ in triplets]) @ right) <= 1e-9


def test_iso_from_dense_decompositions(raw):
    for module, got in dense("iso_c", raw).items():
        total = sum(_updates(raw, module))
        rank = min(sum(own[module][0].shape[0] for own in raw.values() if module in own), *SHAPES[module])
        u, s, vh = _truncated(total, rank)
        assert error(got, s.mean() * u @ vh) <= 1e-9


def test_lore_from_dense_decompositions(raw):
    tau = 0.2
    for module, got in dense("lore", raw, {"tau": tau, "iterations": 6, "scaling": 1.3}).items():
        updates = _updates(raw, module)
        parts = [torch.zeros_like(u) for u in updates]
        common = sum(updates) / len(updates)
        for _ in range(6):
            for i, update in enumerate(updates):
                u, s, vh = torch.linalg.svd(update - common, full_matrices=False)
                parts[i] = u * (s - tau).clamp(min=0) @ vh
            common = sum(d - e for d, e in zip(updates, parts, strict=True)) / len(updates)
        assert error(got, common + 1.3 * sum(parts) / len(parts)) <= 1e-9


@pytest.mark.parametrize("density", [0.25, 1.0])
def test_knots_from_the_dense_decomposition(raw, density):
    chosen = {"density": density, "granularity": "module", "scaling": 0.9}
    for module, got in dense("knots_ties", raw, chosen).items():
        updates = _updates(raw, module)
        u, s, vh = torch.linalg.svd(torch.cat(updates, dim=1), full_matrices=False)
        keep = int((s > 1e-10 * s[0]).sum())
        aligned = (s[:keep, None] * vh[:keep]).split(SHAPES[module][1], dim=1)
        x = torch.stack(aligned)
        kept = x.shape[1] * x.shape[2]
        for task in x:
            order = task.abs().flatten().sort(descending=True).values
            task[task.abs() < order[min(int(kept * density), kept - 1)]] = 0.0
        x = torch.where(x.sign() == x.sum(0).sign(), x, 0.0)
        expected = 0.9 * u[:, :keep] @ (x.sum(0) / (x != 0).sum(0).clamp(min=1))
        assert error(got, expected) <= 1e-9


def test_a_shared_down_projection(raw):
    """As with VeRA: the stack of A has the rank of one adapter, and nothing arbitrary fills it up."""
    shared = random_raw({"x": 3, "y": 3, "z": 3}, SHAPES, seed=12)
    for own in (shared["y"], shared["z"]):
        for module, (_, b, s) in own.items():
            own[module] = shared["x"][module][0], b, s
    for method, chosen in (
        ("tsv", {}),
        ("iso_c", {}),
        ("iso_cts", {}),
        ("core_space", {"rule": "tsv", "isotropic": True}),
    ):
        result = merge(method, shared, chosen)
        for module, update in result.updates.items():
            a = shared["x"][module][0]
            outside = update.basis - update.basis @ torch.linalg.pinv(a) @ a
            assert outside.abs().max() <= 1e-9 and update.rank <= 3


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.numel())
        return out


LOW_RANK = [
    ("task_arithmetic", {}),
    ("uniform", {}),
    ("linear", {}),
    ("knots_ties", {}),
    ("knots_dare_ties", {"density": 0.5}),
    ("tsv", {}),
    ("iso_c", {}),
    ("iso_cts", {}),
    ("lore", {}),
    ("lego", {}),
    ("robust_merge", {}),
    ("reversible", {}),
    *[("core_space", {"rule": rule}) for rule in ("sum", "mean", "tsv", "cart", "ties", "dare_ties")],
    ("core_space", {"rule": "sum", "isotropic": True}),
]


@pytest.mark.parametrize("case", LOW_RANK, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def test_nothing_dense_is_formed(case):
    width = 1024
    inputs = inputs_of(random_raw({"x": 4, "y": 4, "z": 4}, {"m": (width, width)}))
    method = methods.get(case[0])
    parameters = method.parameters(**case[1])
    with _Largest() as seen:
        result = method.run(inputs, parameters)
    assert seen.numel < width * width / 20
    assert all(update.rank <= 12 for update in result.updates.values())


@pytest.fixture(scope="module")
def wide():
    """One module of the size that the goal for memory is set for."""
    raw = random_raw({f"task{k}": 16 for k in range(6)}, {"m": (4096, 4096)}, scaling=2.0)
    halves = {t: {m: (a.float(), b.float(), s) for m, (a, b, s) in own.items()} for t, own in raw.items()}
    return inputs_of(halves)


WIDE = [
    *[(name, {}) for name, more in LOW_RANK if not more and name != "reversible"],
    ("knots_dare_ties", {}),
    ("knots_ties", {"majority_sign": "frequency", "combine": "max"}),
    *[("core_space", {"rule": rule}) for rule in ("sum", "mean", "tsv", "cart", "ties", "dare_ties")],
    ("core_space", {"rule": "sum", "isotropic": True}),
    ("core_space", {"rule": "ties", "space": "knots"}),
]


@pytest.mark.parametrize("case", WIDE, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def test_extra_memory_is_below_a_twentieth_of_a_dense_update(wide, case):
    """Beside the inputs and the result; stacks of all factors of one side are a fortieth each."""
    method = methods.get(case[0])
    parameters = method.parameters(**case[1])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        update = method.run(wide, parameters).updates["m"]
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    result = sum(t.numel() for t in (update.columns, update.basis, update.singular_values))
    assert result < peak / 8 < result + 4096 * 4096 / 20


IN_PLACE = [
    *LOW_RANK,
    ("knots_ties", {"majority_sign": "frequency"}),
    *[
        ("core_space", {"rule": rule, "space": space, "isotropic": True})
        for rule in ("sum", "tsv", "ties")
        for space in ("knots", "full")
    ],
]


@pytest.mark.parametrize("case", IN_PLACE, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def test_the_inputs_stay_as_they_are(case):
    """Methods reuse memory for their results, but never that of the adapters; also with a single one."""
    for ranks in ({"x": 4, "y": 4, "z": 4}, {"x": 4}):
        inputs = inputs_of(random_raw(ranks, SHAPES, seed=14))
        own = [
            tensor
            for task in inputs.tasks
            for m in SHAPES
            for part in (inputs.updates[task][m], inputs.factors[task][m])
            for tensor in vars(part).values()
            if isinstance(tensor, torch.Tensor)
        ]
        before = [tensor.clone() for tensor in own]
        method = methods.get(case[0])
        method.run(inputs, method.parameters(**case[1]))
        assert len(own) == 10 * len(ranks)
        assert all(map(torch.equal, own, before))


def test_dense_methods_are_read_in_blocks():
    """No more than the merged update of one module and what its decomposition needs."""
    width = 512
    inputs = inputs_of(random_raw({"x": 4, "y": 4, "z": 4}, {"m": (width, width), "n": (width, width)}))
    method = methods.get("ties")
    with _Largest() as seen:
        method.run(inputs, method.parameters(max_rank=8))
    assert seen.numel <= width * width


@pytest.mark.parametrize("shape", [(40, 25), (25, 40)])
def test_truncation_keeps_the_most_energy(shape):
    raw = random_raw({"x": 5, "y": 5}, {"m": shape}, seed=13)
    full = merge("ties", raw).updates["m"]
    result = merge("ties", raw, {"max_rank": 6})
    best, share = full.truncate(6)
    assert error(result.updates["m"].dense(), best.dense()) <= 1e-9
    assert result.updates["m"].rank == 6 and f"{share:.2%}" in result.notices[0]
    assert "full rank" in merge("ties", raw).notices[0]
