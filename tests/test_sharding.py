"""Two processes with half of the base's blocks each give what one process with the whole base gives."""

import pickle

import pytest
import torch
import torch.distributed as dist
from children import results_of_two
from tiny import canonical_adapters, random_adapters, token_batch
from torch import nn

from nsc_fast import methods
from nsc_fast.driver import optimise
from nsc_fast.errors import MergeError
from nsc_fast.methods import MergeInputs
from nsc_fast.processes import launched
from nsc_fast.sharding import is_sharded, shard

RANKS = {"one": 2, "two": 4, "three": 3}


class Normed(nn.Module):
    """A block whose backward pass reads weights other than those of its adapted modules."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))

    def forward(self, x):
        x = x + self.mix(self.norm(x))
        return x + self.mlp(x)


class Stacked(nn.Module):
    """Texts, and images that run through blocks of their own."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(60, 8)
        self.vision_tower = nn.ModuleList(Normed() for _ in range(2))
        self.blocks = nn.ModuleList(Normed() for _ in range(4))

    def forward(self, input_ids, attention_mask=None, pixel_values=None):
        x = self.embedding(input_ids)
        if pixel_values is not None:
            seen = pixel_values
            for block in self.vision_tower:
                seen = block(seen)
            x = x + seen.mean(1, keepdim=True)
        for block in self.blocks:
            x = block(x)
        return x


MODULES = [f"blocks.{i}.{name}" for i in range(4) for name in ("mix", "mlp.1", "mlp.3")]
MODULES += [f"vision_tower.{i}.mix" for i in range(2)]
ROWS = {"one": 3, "two": 2, "three": 4}

# Method, its parameters, and the job where it is not the usual one.
QUICK = {"steps": 3, "learning_rate": 0.02}
NSC = {**QUICK, "signal_rows": 0}
ANCHORED = {**QUICK, "rows": 8, "signal_rows": 0}
CASES = {
    "joined": ("nsc", {**NSC, "signal_rows": 2}, {}),
    "less work than processes": ("nsc", {**NSC, "checkpointing": "always"}, {"rows": {"one": 1}}),
    "unlike numbers of micro-batches": (
        "nsc",
        {**NSC, "micro_batch": 1, "checkpointing": "feed_forward"},
        {"rows": {"one": 3, "two": 2}},
    ),
    "targets everywhere": (
        "nsc",
        {
            **NSC,
            "scope": {"layers": "all"},
            "batching": "never",
            "checkpointing": "always",
            "offload": True,
        },
        {},
    ),
    "images of one task": ("nsc", {**NSC, "micro_batch": 2, "checkpointing": "always"}, {"images": True}),
    "tasks that stop": ("nsc", {**NSC, "signal_rows": 2, "stop_at_alone": True, "learning_rate": 0.2}, {}),
    "cores": ("anchored", {**ANCHORED, "signal_rows": 2}, {}),
    "coefficients of blocks": (
        "anchored",
        {**ANCHORED, "granularity": "layer", "batching": "never", "checkpointing": "feed_forward"},
        {},
    ),
    "cores of one task": ("anchored", {**ANCHORED, "checkpointing": "always"}, {"rows": {"two": 2}}),
    "cores, images of one task": (
        "anchored",
        {**ANCHORED, "micro_batch": 2, "checkpointing": "always"},
        {"images": True},
    ),
    "closed form": ("closed_form", {"micro_batch": 2}, {}),
    "a choice": (
        "auto",
        {"rows": 8, "anchored_steps": 3, "data_free": ("iso_c",), "scales": (0.2, 0.5), "margin": 10.0},
        {},
    ),
    "entropy": ("adamerging", QUICK, {"images": True}),
}


def job(rows=ROWS, images=False):
    """The same in every process."""
    torch.manual_seed(0)
    model = Stacked().double()
    own = {t: MODULES if images and t == "one" else MODULES[:12] for t in rows}
    adapters = canonical_adapters(random_adapters(model, own, {t: RANKS[t] for t in rows}))
    data = {t: [token_batch(n, 5, seed=n + i, padding=1) for i in range(4)] for t, n in rows.items()}
    if images:
        for batch in data["one"]:
            batch["pixel_values"] = torch.randn(len(batch["input_ids"]), 3, 8, dtype=torch.float64)
    return model, adapters, data


def result_of(case, processes=None):
    """Updates, losses and notices."""
    name, options, how = CASES[case]
    model, adapters, data = job(**how)
    held = divided(model, adapters, processes)
    method = methods.get(name)
    inputs = MergeInputs(updates=adapters, model=model, data=data, processes=processes)
    result = method.run(inputs, method.parameters(**options))
    held()
    updates = {module: update.dense() for module, update in result.updates.items()}
    return updates, [record.loss for record in result.history], result.notices


def divided(model, adapters, processes):
    """Shards the model where there are processes; returns a check that each holds half of it."""
    whole = sum(p.numel() for p in model.blocks.parameters())
    if processes is None:
        return lambda: None
    shard(model, list(next(iter(adapters.values()))), "cpu")

    def held():
        assert is_sharded(model)
        assert sum(p.to_local().numel() for p in model.blocks.parameters()) < 0.6 * whole

    return held


def other_rows(processes):
    model, adapters, data = job()
    if processes.rank == 1:
        data["two"].append(data["two"][0])
    shard(model, MODULES[:12], "cpu")
    method = methods.get("closed_form")
    inputs = MergeInputs(updates=adapters, model=model, data=data, processes=processes)
    with pytest.raises(MergeError, match="process 1 has other inputs than process 0: rows of two"):
        method.run(inputs, method.parameters())


def work(folder):
    processes = launched(timeout=60)
    results = {case: result_of(case, processes) for case in CASES}
    other_rows(processes)
    (folder / f"result{processes.rank}").write_bytes(pickle.dumps(results))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the two processes has found."""
    return results_of_two(work, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("case", list(CASES))
def test_a_sharded_base_gives_the_same(found, case):
    updates, losses, notices = result_of(case)
    (got, seen, told), other = found[0][case], found[1][case]
    for module, update in updates.items():
        torch.testing.assert_close(got[module], update, rtol=1e-6, atol=1e-6)
        assert torch.equal(got[module], other[0][module])
    assert seen == pytest.approx(losses, rel=1e-9)
    assert (seen, told) == other[1:] and told == notices


@pytest.fixture
def lone_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class TestRefusals:
    def sharded(self, *parts):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model, adapters, data = job()
        for part in parts:
            fully_shard(model.get_submodule(part), mesh=init_device_mesh("cpu", (1,)))
        return model, adapters, data

    def test_a_weight_that_is_sharded_otherwise(self, lone_group):
        made = self.sharded("embedding")
        with pytest.raises(MergeError, match=r"the base model is sharded \(embedding.weight\) in a way"):
            optimise(*made)

    @pytest.mark.parametrize("name", ["nsc", "anchored", "auto", "closed_form", "adamerging"])
    def test_processes_that_are_not_given(self, lone_group, name):
        model, adapters, data = self.sharded(*(f"blocks.{i}" for i in range(4)))
        method = methods.get(name)
        with pytest.raises(MergeError, match="the merge was not told of them: give processes="):
            method.run(MergeInputs(updates=adapters, model=model, data=data), method.parameters())

    def test_another_objective(self, lone_group):
        made = self.sharded(*(f"blocks.{i}" for i in range(4)))
        with pytest.raises(MergeError, match="object cannot run on a sharded base model"):
            optimise(*made, objective=lambda *_: object(), processes=object())
