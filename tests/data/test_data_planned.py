"""Memory is planned for images as the base's processor makes them."""

import json

import pytest
import torch
from data_inputs import llava_processor, llava_row, picture, tiny_llava, word_tokenizer
from typer.testing import CliRunner

from nsc_fast.cli import app
from nsc_fast.errors import MergeError
from nsc_fast.planner import make_plan
from nsc_fast.recipe import make_recipe
from nsc_fast.row_inputs import RowInputs
from nsc_fast.workload import workload

pytest.importorskip("peft")


def tiny_vit():
    """For images of 48 pixels; its processor makes 32 of them."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=8
    )
    return Dinov2ForImageClassification(config).eval()


def tiny_clip():
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    texts = {**sizes, "vocab_size": 80, "max_position_embeddings": 12, "eos_token_id": 2}
    pictures = {**sizes, "image_size": 32, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=texts, vision_config=pictures, projection_dim=8)).eval()


def cropping():
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def clip_processor():
    from transformers import CLIPProcessor

    return CLIPProcessor(cropping(), word_tokenizer(model_max_length=12))


def write(folder, model, processor, adapted, data, **more):
    """A recipe of two adapters over a folder that holds all of it, and four pictures."""
    from peft import LoraConfig, get_peft_model

    model().save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    (folder / "pictures").mkdir()
    for k in range(4):
        picture(50 * k).save(folder / "pictures" / f"{k}.png")
    adapters = []
    for name in ("one", "two"):
        config = LoraConfig(r=2, target_modules=adapted, init_lora_weights=False)
        get_peft_model(model(), config).save_pretrained(folder / name)
        own = {"path": str(folder / "pictures"), "batch_size": 4, **data}
        adapters.append({"name": name, "path": str(folder / name), "data": own})
    return {"base_model": str(folder / "base"), "adapters": adapters, **more}


def planned(recipe):
    return workload(make_recipe(recipe, where="test"))


def chats(folder, *rows):
    file = folder / "chats.json"
    file.write_text(json.dumps(list(rows)))
    return {"path": str(file), "format": "chat", "image": "image"}


@pytest.mark.parametrize("method", ["nsc", "anchored", "auto", "closed_form"])
def test_images_have_the_size_that_the_processor_makes(tmp_path, method):
    recipe = write(tmp_path, tiny_vit, cropping(), ["q_proj", "v_proj"], {})
    recipe["merge_method"] = method
    work = planned(recipe)
    assert work.inputs == RowInputs((), images={"pixel_values": ((1, 3, 32, 32), torch.float32)})
    assert (work.length, work.data_bytes) == (0, 2 * 256 * 3 * 32 * 32 * 4)
    plan = make_plan(make_recipe(recipe, where="test"), 24 * 10**9)
    assert plan.chosen.micro_batch == 4
    if method == "anchored":
        # 17 states of 16 numbers for each of 256 rows of two tasks.
        assert plan.need(plan.chosen).host >= 2 * 256 * 17 * 16 * 4 + work.data_bytes
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    options = ["--dry-run", "--device", "cuda", "--max-memory", "24GB"]
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "recipe.json"), *options])
    assert done.exit_code == 0, done.output
    assert "2 tasks, images" in " ".join(done.output.split())


def test_images_with_texts_beside_them(tmp_path):
    rows = [{"image": f"pictures/{k}.png", "text": f"w{k} w1"} for k in range(4)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"path": str(tmp_path / "d.jsonl"), "image": "image", "text": "text"}
    work = planned(write(tmp_path, tiny_clip, clip_processor(), ["q_proj", "v_proj"], data))
    assert work.inputs.images == {"pixel_values": ((1, 3, 32, 32), torch.float32)}
    assert {"input_ids", "attention_mask"} <= set(work.inputs.tokens)
    assert (work.length, work.inputs.image_tokens, work.inputs.divisible) == (12, 0, True)


def test_images_that_stand_in_texts(tmp_path):
    data = chats(tmp_path, llava_row(image="pictures/0.png"), llava_row("w1", None))
    recipe = write(tmp_path, tiny_llava, llava_processor(), ["q_proj", "v_proj"], data)
    with pytest.raises(MergeError, match="cut only where data.max_length says so; set it, to 517 for 5"):
        planned(recipe)
    for spec in recipe["adapters"]:
        spec["data"]["max_length"] = 24
    plan = make_plan(make_recipe(recipe, where="test"), 24 * 10**9)
    # Four tokens of the image and one that starts the text.
    assert (plan.work.inputs.image_tokens, plan.work.length) == (5, 24)
    assert plan.chosen.micro_batch == 4 and plan.chosen.together
    plan.budget = plan.need(plan.chosen).device
    assert plan.longest("never", False) > 24


def test_rows_of_several_images_stay_whole(tmp_path):
    two = llava_row("<image>\n<image>\nw1", ["pictures/0.png", "pictures/1.png"])
    data = {**chats(tmp_path, llava_row(image="pictures/0.png"), two), "max_length": 24}
    work = planned(write(tmp_path, tiny_llava, llava_processor(), ["q_proj", "v_proj"], data))
    assert work.inputs.images["pixel_values"][0] == (2, 3, 8, 8)
    assert work.inputs.image_tokens == 9 and not work.inputs.divisible


def test_texts_alone_for_a_model_that_takes_images_too(tmp_path):
    data = chats(tmp_path, llava_row("w1", None))
    del data["image"]
    work = planned(write(tmp_path, tiny_llava, llava_processor(), ["q_proj", "v_proj"], data))
    assert work.inputs == RowInputs() and work.length == 64


def test_images_for_a_model_of_texts(tmp_path):
    from tiny import tiny_llama

    recipe = write(tmp_path, lambda: tiny_llama(torch.float32), cropping(), ["q_proj"], {"format": "image"})
    with pytest.raises(MergeError, match="'one': the data are images, and LlamaForCausalLM takes no pixel_v"):
        planned(recipe)
