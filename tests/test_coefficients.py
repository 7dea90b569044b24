import pytest
import torch
from tiny import Ops, random_factors

from nsc_fast.coefficients import Coefficients, block_of
from nsc_fast.factors import canonical, stack

TASKS = ("one", "two", "three")


def stacks():
    """Task "two" does not adapt v; the pooler stands outside the blocks. Ranks 2, 3, 1."""
    ranks = dict(zip(TASKS, (2, 3, 1), strict=True))

    def of(*tasks):
        return stack([(t, canonical(*random_factors(ranks[t], 6, 5))) for t in tasks])

    return {
        "enc.layer.0.q": of("one", "two", "three"),
        "enc.layer.0.v": of("one", "three"),
        "enc.layer.1.q": of("two"),
        "pooler": of("three", "one"),
    }


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("encoder.layer.3.attention.self.query", ("encoder.layer", 3)),
        ("h.11", ("h", 11)),
        ("3.weight", ("", 3)),
        ("blocks.2.experts.5.up", ("blocks", 2)),
        ("model.layer4.conv", None),
        ("classifier", None),
    ],
)
def test_the_block_is_the_first_number_of_the_path(path, block):
    assert block_of(path) == block


@pytest.mark.parametrize(
    ("granularity", "sizes"),
    [
        ("task", {"all": 3}),
        ("layer", {"enc/layer/0": 3, "enc/layer/1": 3, "pooler": 3}),
        ("module", {"enc/layer/0/q": 3, "enc/layer/0/v": 2, "enc/layer/1/q": 1, "pooler": 2}),
        ("rank", {"enc/layer/0/q": 6, "enc/layer/0/v": 3, "enc/layer/1/q": 3, "pooler": 3}),
    ],
)
def test_the_granularity_decides_what_is_shared(granularity, sizes):
    c = Coefficients(stacks(), TASKS, granularity=granularity)
    assert {name: len(p) for name, p in c.values.items()} == sizes
    assert all(p.requires_grad and p.dtype == torch.float32 for p in c.parameters())


@pytest.mark.parametrize("granularity", ["task", "layer", "module", "rank"])
def test_every_module_reads_its_tasks_in_the_order_of_its_stack(granularity):
    init = {"one": 1.0, "two": 2.0, "three": 3.0}
    c = Coefficients(stacks(), TASKS, granularity=granularity, init=init, dtype=torch.float64)
    expected = {
        "enc.layer.0.q": [1.0, 2.0, 3.0],
        "enc.layer.0.v": [1.0, 3.0],
        "enc.layer.1.q": [2.0],
        "pooler": [3.0, 1.0],
    }
    if granularity == "rank":
        expected = {
            "enc.layer.0.q": [1.0, 1.0, 2.0, 2.0, 2.0, 3.0],
            "enc.layer.0.v": [1.0, 1.0, 3.0],
            "enc.layer.1.q": [2.0] * 3,
            "pooler": [3.0, 1.0, 1.0],
        }
    assert {m: v.tolist() for m, v in c.by_module().items()} == expected
    assert {m: c.of(m).tolist() for m in expected} == expected
    assert c.of("pooler").dtype == torch.float64


def test_the_initial_value_defaults_to_the_papers():
    c = Coefficients(stacks(), TASKS)
    assert all(torch.equal(p, torch.full_like(p, 0.4)) for p in c.parameters())


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_gradients_reach_the_tasks_that_a_module_has(granularity):
    c = Coefficients(stacks(), TASKS, granularity=granularity)
    (c.of("pooler") * torch.tensor([10.0, 1.0])).sum().backward()
    group = "all" if granularity == "task" else "pooler"
    assert c.values[group].grad.tolist() == [1.0, 0.0, 10.0]
    assert all(p.grad is None for name, p in c.values.items() if name != group)


def test_a_shared_coefficient_adds_up_the_gradients_of_its_modules():
    c = Coefficients(stacks(), TASKS, granularity="layer")
    (c.of("enc.layer.0.q").sum() + c.of("enc.layer.0.v").sum()).backward()
    assert c.values["enc/layer/0"].grad.tolist() == [2.0, 1.0, 2.0]


def test_copies_do_not_follow_the_training():
    c = Coefficients(stacks(), TASKS)
    before = c.by_module()
    with torch.no_grad():
        for p in c.parameters():
            p.zero_()
    assert all(torch.equal(v, torch.full_like(v, 0.4)) for v in before.values())
    assert not any(v.requires_grad for v in before.values())


@pytest.mark.parametrize("granularity", ["task", "layer", "module", "rank", "core"])
def test_the_table_names_the_tasks(granularity):
    init = {"one": 1.0, "two": 2.0, "three": 3.0}
    table = Coefficients(stacks(), TASKS, granularity=granularity, init=init).table()
    assert table["enc.layer.0.v"] == {"one": 1.0, "three": 3.0}
    assert table["pooler"] == {"three": 3.0, "one": 1.0}


def test_the_table_shows_the_mean_over_a_tasks_singular_directions():
    c = Coefficients(stacks(), TASKS, granularity="rank")
    with torch.no_grad():
        c.values["enc/layer/0/v"].copy_(torch.tensor([1.0, 2.0, 5.0]))
    assert c.table()["enc.layer.0.v"] == {"one": 1.5, "three": 5.0}


def test_a_core_has_the_coefficients_on_its_diagonal():
    c = Coefficients(stacks(), TASKS, granularity="core", init={"one": 1.0, "two": 2.0, "three": 3.0})
    assert torch.equal(c.of("enc.layer.0.v"), torch.diag(torch.tensor([1.0, 1.0, 3.0])))
    assert [part.tolist() for part in c.of_task("one")[:1]] == [[1.0, 1.0]]
    with torch.no_grad():
        c.values["enc/layer/0/v"].add_(torch.ones(3, 3))
    assert c.table()["enc.layer.0.v"] == {"one": 2.0, "three": 4.0}


def test_a_part_of_the_tasks_is_picked_without_the_host():
    c = Coefficients(stacks(), TASKS, granularity="layer")
    with torch.inference_mode():
        c.of("pooler")
    with Ops() as ops:
        value = c.of("pooler")
    assert set(ops.seen) <= {"mm", "mv"}
    value.sum().backward()
    assert c.values["pooler"].grad.tolist() == [1.0, 0.0, 1.0]
    assert c.double().of("pooler").dtype == torch.float64


def test_an_unknown_granularity_is_refused():
    with pytest.raises(ValueError, match="granularity='block': choose one of task, layer, module, rank"):
        Coefficients(stacks(), TASKS, granularity="block")


def test_they_are_saved_and_moved_as_any_module():
    c = Coefficients(stacks(), TASKS, granularity="rank")
    other = Coefficients(stacks(), TASKS, granularity="rank", init=0.0)
    other.load_state_dict(c.state_dict())
    assert other.table() == c.table()
    assert c.double().of("pooler").dtype == torch.float64
