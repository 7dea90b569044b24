"""Images whose patches come in one list: a batch of them in parts."""

import pytest
import torch
from architecture_checks import RANKS
from architecture_rows import IMAGE_TOKEN, ROWS, text

from nsc_fast.driver import Driver
from nsc_fast.errors import MergeError
from nsc_fast.factors import canonical
from nsc_fast.layers import install, remove
from nsc_fast.objectives.anchored import AnchoredObjective
from nsc_fast.objectives.anchors import anchors
from nsc_fast.objectives.score import held_out
from nsc_fast.packing import divisible, parts, whole_of
from nsc_fast.processes import share

ROW = ROWS["qwen2-vl"]
# Height and width in patches, of the images of three sequences: a token for two by two.
IMAGES = [[(4, 4)], [(2, 2), (4, 2)], [(2, 6)]]


def batch(seed, images=IMAGES):
    """Three sequences of 11 tokens with one or two images each."""
    out = text(seed, length=11)
    last = text(seed + 50, length=11)
    out = {key: torch.cat([value, last[key][1:]]) for key, value in out.items()}
    for row, own in enumerate(images):
        start = 1
        for height, width in own:
            count = height * width // 4
            out["input_ids"][row, start : start + count] = IMAGE_TOKEN
            start += count + 1
    grids = torch.tensor([(1, *size) for own in images for size in own])
    generator = torch.Generator().manual_seed(seed)
    shape = int(grids.prod(1).sum()), 3 * 2 * 4 * 4
    patches = torch.randn(shape, generator=generator, dtype=torch.float64)
    kinds = (out["input_ids"] == IMAGE_TOKEN).int()
    return {**out, "pixel_values": patches, "image_grid_thw": grids, "mm_token_type_ids": kinds}


def gradients_of(model, installed):
    """Of the coefficients that act on anything; the model is as it was before."""
    found = {n: p.grad.clone() for n, p in installed.coefficients.named_parameters() if p.grad is not None}
    remove(model)
    return found


class Case:
    def __init__(self):
        self.model = ROW.build()
        generator = torch.Generator().manual_seed(0)

        def factor(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.3

        names = [n for n, m in self.model.named_modules() if n.split(".")[-1] in (*ROW.adapted, "0")]
        names = [n for n in names if isinstance(self.model.get_submodule(n), torch.nn.Linear)]
        assert any("merger" in name for name in names) and any("language" in name for name in names)
        self.updates = {task: {} for task in RANKS}
        for name in names:
            linear = self.model.get_submodule(name)
            for task, rank in RANKS.items():
                down, up = factor(rank, linear.in_features), factor(linear.out_features, rank)
                self.updates[task][name] = canonical(down, up, 1.0)
        self.names = names
        self.batches = {task: batch(seed) for seed, task in enumerate(RANKS)}

    def step(self, batches=None, wholes=None, **options):
        """Loss, ratios and gradients of NSC with all modules in the loss."""
        installed = install(self.model, self.updates, targets=self.names)
        driver = Driver(self.model, installed, **options)
        loss, ratios = driver.part(batches or self.batches, wholes)
        return loss, ratios, gradients_of(self.model, installed)


@pytest.fixture(scope="module")
def case():
    return Case()


def same(found, want):
    assert found[0] == pytest.approx(want[0], rel=1e-10)
    assert found[1] == pytest.approx(want[1], rel=1e-10)
    assert any(float(g.abs().max()) > 1e-6 for g in want[2].values())
    for name, gradient in want[2].items():
        torch.testing.assert_close(found[2][name], gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_parts_add_up_to_the_batch(case, micro_batch):
    want = case.step()
    same(case.step(micro_batch=micro_batch), want)


def test_processes_add_up_to_the_batch(case):
    want = case.step()
    loss, ratios, gradients = 0.0, dict.fromkeys(RANKS, 0.0), {}
    for rank in range(4):
        mine, wholes = share(case.batches, rank, 4)
        found = case.step(mine, wholes)
        loss += found[0]
        ratios = {task: value + found[1].get(task, 0.0) for task, value in ratios.items()}
        gradients = {n: gradients.get(n, 0.0) + g for n, g in found[2].items()}
    same((loss, ratios, gradients), want)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_distances_of_parts_add_up(case, micro_batch):
    def step(own):
        fixed = anchors(case.model, case.updates, {t: [b] for t, b in case.batches.items()}, micro_batch=own)
        installed = install(case.model, case.updates)
        objective = AnchoredObjective(case.model, installed, fixed, micro_batch=own)
        loss, distances = objective.losses({task: found.batches[0] for task, found in fixed.items()})
        return loss, distances, gradients_of(case.model, installed)

    same(step(micro_batch), step(None))


def test_every_sequence_keeps_its_images():
    whole = batch(0)
    pieces = parts(whole, 1)
    assert [p["image_grid_thw"].tolist() for p in pieces] == [[[1, *size] for size in own] for own in IMAGES]
    assert [len(p["pixel_values"]) for p in pieces] == [16, 12, 12]
    assert torch.equal(torch.cat([p["pixel_values"] for p in pieces]), whole["pixel_values"])
    assert whole_of(whole).patches == sum(whole_of(piece).patches for piece in pieces) == 40
    assert [len(p["pixel_values"]) for p in parts(whole, 2)] == [28, 12]


def test_rows_that_are_held_out_take_their_images_along():
    fitted, kept = held_out({"a": [batch(0)]})
    pieces = [*fitted["a"], *kept["a"]]
    assert [len(p["pixel_values"]) for p in pieces] == [16, 12, 12]
    assert [p["image_grid_thw"].tolist() for p in pieces] == [[[1, *size] for size in own] for own in IMAGES]


@pytest.mark.parametrize("kind", ["no kinds", "no image", "other grids"])
def test_images_that_may_be_anybodys_are_not_divided(kind):
    own = batch(0)
    if kind == "no kinds":
        del own["mm_token_type_ids"]
    elif kind == "no image":
        own["mm_token_type_ids"][2] = 0
    else:
        own["image_grid_thw"] = torch.tensor([[1, 4, 5], [1, 4, 2], [1, 2, 6]])
    assert not divisible(own)
    with pytest.raises(MergeError, match="not known which part of 'pixel_values' belongs to which sequence"):
        parts(own, 1)
    assert len(parts(own, 3)) == 1
