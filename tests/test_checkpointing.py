from collections import Counter

import pytest
import torch
from compare import error
from tiny import (
    MLP_MODULES,
    Mlp,
    canonical_adapters,
    linear_names,
    random_adapters,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    token_batch,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nsc_fast import memory
from nsc_fast.driver import Driver, optimise
from nsc_fast.errors import MergeError
from nsc_fast.layers import install, remove
from nsc_fast.memory import LiveBytes, blocks_of, checkpointed, parse_bytes, readable_bytes
from nsc_fast.parameters import NSCParameters

RANKS = {"one": 2, "two": 4, "three": 3}
MODELS = {
    "llama": (tiny_llama, ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"), ".layers.3."),
    "bert": (tiny_bert, ("query", "value", "dense"), ".layer.3."),
    "gpt2": (tiny_gpt2, ("c_attn", "c_fc", "c_proj"), ".h.1."),
}


class Case:
    """A model with merged layers in it, and one batch of every task."""

    def __init__(self, kind="llama", dtype=torch.float64, length=7):
        make, ends, last = MODELS[kind]
        self.model = make(dtype)
        names = [n for n in linear_names(self.model, ends) if any(c.isdigit() for c in n)]
        self.adapters = canonical_adapters(random_adapters(self.model, names, RANKS))
        self.targets = [n for n in names if last in n]
        self.batches = {
            "one": token_batch(2, length - 2, seed=1, padding=2),
            "two": token_batch(3, length, seed=2),
            "three": token_batch(1, length - 1, seed=3, padding=1),
        }
        self.installation = install(self.model, self.adapters, targets=self.targets)
        self.driver = Driver(self.model, self.installation)

    def step(self):
        """Loss, ratios and gradients."""
        self.installation.coefficients.zero_grad()
        loss, ratios = self.driver.losses(self.batches)
        values = self.installation.coefficients.values
        return loss, ratios, {name: p.grad.clone() for name, p in values.items()}


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("recompute", ["never", "feed_forward", "always"])
def test_recomputation_changes_nothing(kind, recompute, dtype, limit):
    case = Case(kind, dtype)
    loss, ratios, grads = case.step()
    with checkpointed(case.model, case.installation.modules, recompute):
        # The first step with these inputs stops at the last target, and the second as well.
        for _ in range(2):
            again, seen, others = case.step()
            assert again == pytest.approx(loss, rel=limit)
            assert seen == pytest.approx(ratios, rel=limit)
            for name, grad in grads.items():
                assert error(others[name], grad) <= limit, name


@pytest.mark.parametrize("recompute", ["feed_forward", "always"])
def test_first_pass_with_checkpoints_runs_to_the_end(recompute):
    case, plain = Case(), Case()
    with checkpointed(case.model, case.installation.modules, recompute):
        loss, _, grads = case.step()
    want, _, others = plain.step()
    assert loss == pytest.approx(want, rel=1e-12)
    assert all(error(grads[name], others[name]) <= 1e-12 for name in grads)


def test_blocks_run_twice_and_are_restored():
    case = Case()
    blocks = blocks_of(case.model, case.installation.modules)
    assert list(blocks) == [f"model.layers.{i}" for i in range(4)]
    calls = []
    block = blocks["model.layers.1"]
    own = block.forward

    def counted(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return own(*args, **kwargs)

    block.forward = counted
    case.step()
    assert calls == [False, True], "once to look, once in the step"
    with checkpointed(case.model, case.installation.modules):
        case.step()
        assert len(calls) == 4
    assert block.forward is counted
    assert all("forward" not in b.__dict__ for name, b in blocks.items() if name != "model.layers.1")


class Products(TorchDispatchMode):
    """Counts the products with each weight."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm_.default:
            self.of[args[2].untyped_storage().data_ptr()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute, up", [("never", 2), ("feed_forward", 3), ("always", 3)])
def test_the_last_product_of_a_part_is_not_formed_again(recompute, up):
    case = Case()
    case.step()
    with checkpointed(case.model, case.installation.modules, recompute), Products() as products:
        case.step()
    for block in (0, 1, 2):
        feed_forward = case.model.model.layers[block].mlp
        assert products.of[feed_forward.up_proj.weight.data_ptr()] == up
        # Forward and backward: nothing that is kept comes after it.
        assert products.of[feed_forward.down_proj.weight.data_ptr()] == 2


def test_the_last_layer_of_a_part_that_is_called_is_not_called_again():
    """A base layer of another kind (quantised, with hooks) makes its output when all else is kept."""
    case, calls = Case(), Counter()
    loss, ratios, grads = case.step()
    for block in case.model.model.layers[:3]:
        for name in ("up_proj", "down_proj"):
            base = block.mlp.get_submodule(name).base
            base.register_forward_hook(lambda *_, name=name: calls.update([name]))
    with checkpointed(case.model, case.installation.modules, "always"):
        again, seen, others = case.step()
    assert calls == {"up_proj": 6, "down_proj": 3}
    assert again == pytest.approx(loss, rel=1e-12) and seen == pytest.approx(ratios, rel=1e-12)
    assert all(error(others[name], grad) <= 1e-12 for name, grad in grads.items())


def test_ratios_are_recorded_once():
    case = Case()
    with checkpointed(case.model, case.installation.modules):
        case.step()
        monitor = case.installation.monitor
        seen = []
        record = type(monitor).record

        def counting(self, module, z, omega):
            seen.append((module, self.recording))
            return record(self, module, z, omega)

        type(monitor).record = counting
        try:
            case.step()
        finally:
            type(monitor).record = record
    assert [m for m, recording in seen if recording] == case.targets
    assert sorted(m for m, recording in seen if not recording) == sorted(case.targets)


def test_less_is_kept():
    kept = {}
    for recompute in ("never", "feed_forward", "always"):
        case = Case(length=24)
        with checkpointed(case.model, case.installation.modules, recompute), LiveBytes() as live:
            tokens = case.driver._passes(case.batches, case.installation.monitor.tasks, torch.device("cpu"))
            loss = case.driver.forward(*tokens[0])
            kept[recompute] = live.now
            loss.backward()
        case.installation.monitor.clear()
    assert kept["always"] < 0.5 * kept["feed_forward"] < 0.5 * kept["never"]


def test_offload_moves_the_inputs_of_blocks_alone(monkeypatch):
    case = Case()
    _, _, want = case.step()
    moved = []

    real = memory._inputs_on_host

    def pretending(args):
        hooks = real(args)
        pack = hooks.pack_hook

        def packing(tensor):
            if tensor.shape == args[0].shape:
                moved.append(tuple(tensor.shape))
            return pack(tensor)

        hooks.pack_hook = packing
        return hooks

    monkeypatch.setattr(memory, "_inputs_on_host", pretending)
    with checkpointed(case.model, case.installation.modules, offload=True):
        _, _, grads = case.step()
    assert moved == [(6, 7, 32)] * 4
    assert all(error(grads[name], want[name]) <= 1e-12 for name in want)


def test_errors_inside_a_block_come_through():
    case = Case()
    case.batches["two"] = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 3)}
    with checkpointed(case.model, case.installation.modules), pytest.raises((RuntimeError, ValueError)):
        case.step()
    assert "forward" not in case.model.model.layers[0].__dict__


def test_a_model_without_blocks_that_are_called_is_refused():
    model = Mlp()
    with pytest.raises(MergeError, match="no numbered blocks"), checkpointed(model, MLP_MODULES):
        pass
    with (
        pytest.raises(MergeError, match="feed-forward"),
        checkpointed(nn.Sequential(nn.Linear(2, 2)), ["0"], "feed_forward"),
    ):
        pass


@pytest.mark.parametrize("options", [{"checkpointing": "always", "offload": True}, {"micro_batch": 1}])
def test_whole_run_is_the_same(options):
    case = Case()
    remove(case.model)
    data = {task: [batch] for task, batch in case.batches.items()}
    plain, _, _ = optimise(case.model, case.adapters, data, NSCParameters(steps=3))
    other, _, _ = optimise(case.model, case.adapters, data, NSCParameters(steps=3, **options))
    for module, value in plain.items():
        assert error(other[module], value) <= 1e-9
    assert all("forward" not in m.__dict__ for m in case.model.modules())


def test_offload_needs_checkpoints():
    with pytest.raises(ValueError, match="checkpointing"):
        NSCParameters(offload=True)


def test_live_bytes_counts_storages_once_and_forgets_the_freed():
    kept = torch.zeros(10)
    with LiveBytes().ignore([kept]) as live:
        a = torch.ones(1000)
        view = a.view(10, 100).t()
        kept.add_(1)
        assert live.now == 4000
        del a
        assert live.now == 4000
        b = view + 1
        del view, b
        assert (live.now, live.peak, live.largest) == (0, 8000, 1000)


def test_amounts_of_memory():
    assert parse_bytes("24GB") == 24 * 10**9
    assert parse_bytes("1.5 gib") == 3 * 2**29
    assert readable_bytes(21_340_000_000) == "21.3 GB"
    for wrong in ("24 apples", "", "-3GB", "0"):
        with pytest.raises(MergeError, match="amount of memory"):
            parse_bytes(wrong)
