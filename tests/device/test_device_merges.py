"""Merges on another device than the CPU give what they give on the CPU."""

import pytest
import stand_in
import tiny
import torch
from architecture_checks import train
from architecture_rows import ROWS

from nsc_fast import merge_adapters, methods
from nsc_fast.methods import MergeInputs

DEVICES = ("cpu", stand_in.NAME)
AUTO = {"scales": (0.2, 0.5), "data_free": ("iso_c", "knots_ties"), "anchored_steps": 2, "margin": 10.0}
PARAMETERS = {
    "nsc": {"steps": 2, "granularity": "module"},
    "anchored": {"steps": 2},
    "closed_form": {},
    "auto": AUTO,
}
LLAMA = ["q_proj", "k_proj", "v_proj", "down_proj"]


def same_on_both(build, adapted, data, folder, method, parameters, tolerance=1e-6):
    """Compares the results of ``merge_adapters`` on both devices."""
    paths = train(build(), adapted, folder)
    found = {}
    for device in DEVICES:
        torch.manual_seed(0)
        found[device] = merge_adapters(
            build().to(device),
            paths,
            data,
            method=method,
            parameters=parameters,
            base_name="base",
        )
    assert stand_in.RAN
    here, there = (found[device] for device in DEVICES)
    assert here.updates.keys() == there.updates.keys()
    for module, update in there.updates.items():
        assert update.basis.device.type == update.columns.device.type == "cpu"
        expected = here.updates[module].dense()
        off = (update.dense() - expected).abs().max()
        assert off <= tolerance * expected.abs().max(), module
    there.save_pretrained(folder / "out")


@pytest.mark.parametrize("method", PARAMETERS)
@pytest.mark.parametrize("name", ROWS)
def test_architectures(name, method, tmp_path):
    row = ROWS[name]
    data = {task: [row.inputs(3 * k + i) for i in range(3)] for k, task in enumerate("ab")}
    same_on_both(row.build, row.adapted, data, tmp_path, method, PARAMETERS[method])


@pytest.mark.parametrize(
    ("build", "entropy"),
    [(tiny.tiny_bert, "classification"), (tiny.tiny_llama, "first_token"), (tiny.tiny_llama, "all_tokens")],
)
def test_adamerging(build, entropy, tmp_path):
    own = {"steps": 2, "entropy": entropy, **({"max_new_tokens": 3} if entropy == "all_tokens" else {})}
    adapted = ["query", "value"] if build is tiny.tiny_bert else LLAMA
    same_on_both(build, adapted, batches(), tmp_path, "adamerging", own)


WAYS = {
    "joined": {},
    "apart": {"batching": "never"},
    "checkpoints": {"checkpointing": "always"},
    "checkpoints on the host": {"checkpointing": "always", "offload": True},
    "feed forward again": {"checkpointing": "feed_forward"},
    "in parts": {"micro_batch": 1},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["nsc", "anchored"])
def test_ways_through_the_model(method, way, tmp_path):
    own = {"steps": 3, **WAYS[way]}
    same_on_both(tiny.tiny_llama, LLAMA, batches(), tmp_path, method, own)


def test_rows_without_padding(tmp_path):
    own = {"steps": 3, "packing": "auto"}
    same_on_both(tiny.tiny_llama, LLAMA, batches(), tmp_path, "nsc", own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["nsc", "anchored"])
def test_the_kernels(method, dtype, tmp_path, monkeypatch):
    """``impl="auto"`` tests them on the device, then takes them for all that it merges."""
    from nsc_fast.ops import triton_steps

    taken = set()
    for name in ("project", "low_rank_output"):
        step = getattr(triton_steps, name)

        def counted(*args, step=step, name=name, **kwargs):
            taken.add((name, args[0].device.type))
            return step(*args, **kwargs)

        monkeypatch.setattr(triton_steps, name, counted)
    limit = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    same_on_both(
        lambda: tiny.tiny_llama(dtype, blocks=2),
        LLAMA,
        batches(rows=2),
        tmp_path,
        method,
        {"steps": 2},
        tolerance=limit,
    )
    assert {device for _, device in taken} == {stand_in.NAME}


def batches(rows=3):
    return {
        t: [tiny.token_batch(rows, 6, 3 * k + i, padding=2) for i in range(3)] for k, t in enumerate("ab")
    }


@pytest.mark.parametrize("method", ["nsc", "anchored"])
def test_a_step_hardly_waits_and_moves_only_its_data(method):
    """What is the same in every step crosses once, and the host waits no more for many modules."""
    waits, crossed = {}, {}
    for blocks in (2, 6):
        seen = []
        model = tiny.tiny_llama(torch.float32, blocks=blocks)
        raw = tiny.random_adapters(model, tiny.linear_names(model, LLAMA), {"a": 2, "b": 3})
        one = {task: own[:1] for task, own in batches().items()}
        chosen = methods.get(method)
        chosen.run(
            MergeInputs(
                updates=tiny.canonical_adapters(raw),
                model=model.to(stand_in.NAME),
                data=one,
                on_step=lambda _, seen=seen: seen.append((stand_in.WAITS.total(), stand_in.CROSSED["there"])),
                impl="torch",
            ),
            chosen.parameters(steps=4, log_coefficients_every=1),
        )
        (before, there), (after, then) = seen[1:3]
        waits[blocks], crossed[blocks] = after - before, then - there
    assert waits[2] == waits[6] <= 10
    tokens = sum(int(own[0]["attention_mask"].sum()) for own in one.values())
    data = sum(value.nbytes for own in one.values() for value in own[0].values())
    # Last states of 32 numbers, and 64 of each of the blocks below the last.
    states = 4 * tokens * (32 + 64 * 5) if method == "anchored" else 0
    assert crossed[6] <= 1.3 * (data + states) + 1000


@pytest.mark.parametrize("method", PARAMETERS)
def test_a_model_on_two_devices(method, tmp_path):
    """As ``device_map`` spreads it, here over the device and the CPU: accelerate moves what goes across."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    def spread():
        model = tiny.tiny_llama()
        there = [model.model.embed_tokens, model.model.rotary_emb, *model.model.layers[:2]]
        for module in (*there, *model.model.layers[2:], model.model.norm, model.lm_head):
            place = stand_in.NAME if module in there else "cpu"
            add_hook_to_module(module, AlignDevicesHook(place, place_submodules=True))
        return model

    paths = train(tiny.tiny_llama(), LLAMA, tmp_path)
    found = []
    for build in (tiny.tiny_llama, spread):
        torch.manual_seed(0)
        own = PARAMETERS[method]
        found.append(
            merge_adapters(build(), paths, batches(), method=method, parameters=own, base_name="base")
        )
    for module, update in found[0].updates.items():
        expected = update.dense()
        assert (found[1].updates[module].dense() - expected).abs().max() <= 1e-6 * expected.abs().max()
