"""One optimisation step on a random Llama: the driver against the eager loop, and with less memory.

The loop calls the model as it is, head included, although nobody reads the logits. How much that costs
depends on the vocabulary, so there are three: 32,000 words, the default of LlamaConfig and what stories42M,
the Llama of this size that people know, has, and two in which the head has as many weights, compared with
the blocks, as those of Llama-3.2-1B and of Llama-2-7B.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nsc_fast.batches import Batch
from nsc_fast.driver import Driver
from nsc_fast.factors import LowRankUpdate, canonical
from nsc_fast.layers import install, remove
from nsc_fast.memory import Recompute, checkpointed
from nsc_fast.targets import select_targets

from .llama import random_llama
from .peers import EagerLayer, GramRatio, eager_steps

SHAPES = {  # layers, width, tasks, rank, tokens per task
    "smoke": (4, 64, 3, 4, 16),
    "cpu": (8, 512, 6, 16, 128),
    "full": (16, 2048, 6, 16, 2048),
}

# Weights of the head, of those of the blocks.
HEADS = {"stories42M": 0.63776, "Llama-3.2-1B": 0.27, "Llama-2-7B": 0.02}


@pytest.mark.parametrize("like", list(HEADS))
def test_step(compare, device, size, like) -> None:
    layers, width, tasks, rank, tokens = SHAPES[size]
    inner = width * 11 // 4
    words = round(HEADS[like] * layers * (4 * width + 3 * inner))
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=words,
    )
    model, twin = (LlamaForCausalLM(config).to(device).eval().requires_grad_(False) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    factors = {name: _factors(model.get_submodule(name), tasks, rank) for name in names}
    targets = [
        n for n in names if n.endswith("v_proj") and int(n.split(".")[2]) >= layers - max(layers // 4, 1)
    ]
    adapters = _adapters(factors, tasks)
    batches = {k: {"input_ids": torch.randint(0, words, (1, tokens)).to(device)} for k in range(tasks)}
    installation = install(model, adapters, targets=targets, granularity="module")
    driver = Driver(model, installation)
    named = {f"task{k}": batch for k, batch in batches.items()}
    grams = {n: [GramRatio(a.to(device)) for a in factors[n][0]] for n in targets}
    for name in names:
        downs, ups = ([f.to(device) for f in side] for side in factors[name])
        layer = EagerLayer(twin.get_submodule(name), downs, ups, torch.full((tasks,), 0.4)).to(device)
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, layer)

    ours = partial(_step, driver, named)

    def eager() -> float:
        twin.zero_grad()
        return float(eager_steps(twin, batches, grams))

    ours()
    loss, expected = ours(), eager()
    assert abs(loss - expected) <= 1e-6
    for name in names:
        got = installation.coefficients.of(name).grad
        reference = twin.get_submodule(name).coefficients.grad
        if reference is None:
            assert got is None
        else:
            assert (got - reference).abs().max() <= 1e-5 * max(float(reference.abs().max()), 1e-3)
    compare(
        ours,
        {"eager loop, task after task": eager},
        case=f"{layers} layers d={width} K={tasks} r={rank} {tokens} tokens a task, head like {like}'s",
        goals={"eager loop, task after task": ">= 1.7"},
    )
    remove(model)


def test_step_recomputed(compare, device, size) -> None:
    """What it costs to compute feed-forward parts or whole blocks again instead of keeping them."""
    layers, width, tasks, rank, tokens = SHAPES[size]
    model = random_llama(width, width * 7 // 2, 8, 2, layers, device=device)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    adapters = _adapters({n: _factors(model.get_submodule(n), tasks, rank) for n in names}, tasks)
    installation = install(model, adapters, targets=select_targets(names))
    driver = Driver(model, installation)
    batches = {task: {"input_ids": torch.randint(0, 60, (1, tokens)).to(device)} for task in adapters}
    plain = partial(_step, driver, batches)
    loss = plain()
    again = {way: partial(plain, way) for way in ("feed_forward", "always")}
    assert all(abs(run() - loss) <= 1e-6 for run in again.values())
    compare(
        plain,
        {f"checkpointing {way}": run for way, run in again.items()},
        case=f"{layers} layers d={width} K={tasks} r={rank} {tokens} tokens a task",
    )
    remove(model)


def _step(driver: Driver, batches: Mapping[str, Batch], recompute: Recompute = "never") -> float:
    """Loss of one step, in the way a merge runs it; the gradients are left at the coefficients."""
    driver.installation.coefficients.zero_grad()
    with checkpointed(driver.model, driver.installation.modules, recompute):
        return driver.losses(batches)[0]


_Factors = tuple[list[torch.Tensor], list[torch.Tensor]]


def _adapters(factors: Mapping[str, _Factors], tasks: int) -> dict[str, dict[str, LowRankUpdate]]:
    return {
        f"task{k}": {n: canonical(downs[k], ups[k]) for n, (downs, ups) in factors.items()}
        for k in range(tasks)
    }


def _factors(layer: nn.Linear, tasks: int, rank: int) -> _Factors:
    downs = [torch.randn(rank, layer.in_features) / layer.in_features**0.5 for _ in range(tasks)]
    ups = [torch.randn(layer.out_features, rank) * 0.02 for _ in range(tasks)]
    return downs, ups
