"""Chats with several images of different sizes become the inputs of a small Qwen2-VL, and merge."""

import json

import pytest
import torch
import yaml
from data_inputs import IMAGE, hub_row, text
from qwen_inputs import KINDS, PATCH, qwen_processor, tiny_qwen
from typer.testing import CliRunner

from nsc_fast.cli import app
from nsc_fast.data import image_batches, read_data
from nsc_fast.packing import divisible, parts
from nsc_fast.recipe import make_recipe

pytest.importorskip("PIL")
pytest.importorskip(
    "torchvision", reason="Qwen's image processor needs torchvision", exc_type=(ImportError, RuntimeError)
)

# Width and height of every row's images in pixels; 8 by 8 make a token.
SIZES = [[(8, 8)], [(16, 8), (8, 24)], [(24, 24)], [(16, 16), (8, 8), (32, 16)], [(8, 16)], []]


def rows():
    from PIL import Image

    out = []
    for k, own in enumerate(SIZES):
        pictures = [Image.new("RGB", size, (40 * k, 25 * j, 0)) for j, size in enumerate(own)]
        content = [part for j in range(len(own)) for part in (IMAGE, text(f"w{j}"))]
        out.append(hub_row(*content, text("w9 " * (k + 1)), images=pictures))
    return out


@pytest.fixture(scope="module", params=KINDS)
def shop(request, tmp_path_factory):
    """base/ with model and processor, adapters one/ and two/ of both towers, pictures, d.jsonl."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("shop")
    tiny_qwen(request.param).save_pretrained(folder / "base")
    qwen_processor(request.param).save_pretrained(folder / "base")
    for k, name in enumerate(("one", "two")):
        torch.manual_seed(k)
        targets = ["q_proj", "v_proj", "down_proj", "qkv", "attn.proj"]
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(tiny_qwen(request.param), config).save_pretrained(folder / name)
    told = rows()
    for k, row in enumerate(told):
        for j, picture in enumerate(row["images"]):
            picture.save(folder / f"{k}-{j}.png")
            row["images"][j] = f"{k}-{j}.png"
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    return folder


def content(shop, **more):
    data = {"path": str(shop / "d.jsonl"), "format": "chat", "image": "images", "batch_size": 3}
    adapters = [{"name": n, "path": str(shop / n), "data": data} for n in ("one", "two")]
    return {"base_model": str(shop / "base"), "adapters": adapters, **more}


@pytest.mark.filterwarnings("ignore:task")
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_gets_the_tokens_of_its_images(kind):
    processor, model = qwen_processor(kind), tiny_qwen(kind)
    batches = image_batches(rows(), processor, format="chat", image="images", batch_size=3)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 2, 1]
    assert all(divisible(batch) for batch in batches)
    last, found = processor.tokenizer.convert_tokens_to_ids("w9"), {}
    for part in (part for batch in batches for part in parts(batch, 1)):
        ids, grids = part["input_ids"], part.get("image_grid_thw", torch.zeros(0, 3))
        sizes = [(int(w) * PATCH, int(h) * PATCH) for _, h, w in grids]
        # As many tokens as its images take, and the rows are told apart by their last words.
        assert int((ids == model.config.image_token_id).sum()) == sum(w * h // 64 for w, h in sizes)
        found[int((ids == last).sum()) - 1] = sizes
    assert found == dict(enumerate(SIZES))
    for batch in batches:
        with torch.no_grad():
            logits = model(**batch).logits
            # Alone, every row gives the same.
            for k, part in enumerate(parts(batch, 1)):
                real = part["attention_mask"][0].bool()
                torch.testing.assert_close(logits[k][real], model(**part).logits[0][real])


def test_a_recipe_reads_them(shop):
    recipe = make_recipe(content(shop), where="here")
    batches, notices = read_data(recipe, recipe.base_model)
    assert [set(b) >= {"pixel_values", "image_grid_thw"} for b in batches["one"]] == [True, True, False]
    assert "task 'two': 1 of 6 rows have no image and are read as texts" in notices


@pytest.mark.parametrize("method", ["nsc", "anchored"])
def test_merges_in_parts_are_the_same(shop, method, tmp_path):
    parameters = {"steps": 4, "signal_rows": 4} | ({"scope": {"layers": "all"}} if method == "nsc" else {})
    found = {}
    for micro_batch in (None, 1, 2):
        own = parameters if micro_batch is None else {**parameters, "micro_batch": micro_batch}
        recipe = tmp_path / f"{micro_batch}.yaml"
        recipe.write_text(yaml.safe_dump(content(shop, merge_method=method, parameters=own)))
        out = tmp_path / f"out {micro_batch}"
        done = CliRunner().invoke(app, ["merge", str(recipe), str(out), "--device", "cpu"])
        assert done.exit_code == 0, done.output
        told = (out / "nsc_fast" / "metrics.jsonl").read_text().splitlines()
        found[micro_batch] = [json.loads(line)["loss"] for line in told]
    assert len(found[None]) == 4 and len(set(found[None])) > 1
    for micro_batch in (1, 2):
        assert found[micro_batch] == pytest.approx(found[None], rel=1e-4)
