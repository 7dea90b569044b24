"""Chats with images become the inputs of a small LLaVA."""

import json

import pytest
import torch
from data_inputs import (
    CHAT_TEMPLATE,
    IMAGE,
    PARTS_TEMPLATE,
    hub_row,
    llava_processor,
    llava_row,
    picture,
    text,
    tiny_llava,
    word_tokenizer,
)

from nsc_fast.data import image_batches, read_data, text_batches
from nsc_fast.errors import MergeError
from nsc_fast.merge import check_inputs, run_recipe
from nsc_fast.recipe import BaseSpec, make_recipe

pytest.importorskip("PIL")
QUIET = pytest.mark.filterwarnings("ignore:task")
# What the processor makes of a picture of 8 pixels: a token for every patch.
PATCHES = "<image> <image> <image> <image>"


def sentences(batches, processor):
    out = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            assert (mask.diff() <= 0).all()
            out.append(" ".join(processor.tokenizer.convert_ids_to_tokens(ids[mask.bool()].tolist())))
    return out


def reds(batches):
    return [round(float(p[0].mean()) * 255) for b in batches for p in b.get("pixel_values", ())]


@pytest.fixture(scope="module")
def processor():
    return llava_processor()


class TestBatches:
    @QUIET
    def test_the_ways_of_writing_give_the_same_batch(self, processor, tmp_path):
        picture(200).save(tmp_path / "0.png")
        path = tmp_path / "d.json"
        path.write_text(json.dumps([llava_row(id=0)]))
        expected = [f"</s> user {PATCHES} w1 w2 assistant"]
        parts = (IMAGE, text("w1 w2"))
        held = [{"type": "image", "image": picture(200)}, parts[1]]
        for rows, options in [
            (path, {"format": "chat", "image": "image"}),
            (path, {"messages": "conversations", "image": "image"}),
            ([llava_row("w1 w2", picture(200))], {"messages": "conversations", "image": "image"}),
            ([hub_row(*parts, images=[picture(200)])], {"format": "chat", "image": "images"}),
            ([hub_row(*held)], {"format": "chat"}),
            ([hub_row(*held)["messages"]], {"format": "chat"}),
        ]:
            batches = image_batches(rows, processor, **options)
            assert sentences(batches, processor) == expected
            assert reds(batches) == [200] and set(batches[0]) == {
                "input_ids",
                "attention_mask",
                "pixel_values",
            }

    @QUIET
    def test_a_table_of_the_hub(self, processor, tmp_path):
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        picture(200).save(tmp_path / "0.png")
        held = {"bytes": (tmp_path / "0.png").read_bytes(), "path": None}
        row = hub_row(text("w1"), {**IMAGE, "index": 0}, images=[held])
        parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "d.parquet")
        batches = image_batches(tmp_path / "d.parquet", processor, format="chat", image="images")
        assert sentences(batches, processor) == [f"</s> user w1 {PATCHES} assistant"]
        assert reds(batches) == [200]
        with pytest.raises(MergeError, match="d.parquet: no column image .it has messages, images"):
            image_batches(tmp_path / "d.parquet", processor, format="chat", image="image")

    @QUIET
    def test_answers_and_prompts_for_them(self, processor):
        row, options = hub_row(IMAGE, text("w1"), images=[picture()]), {"format": "chat", "image": "images"}
        said = {
            name: sentences(image_batches([row], processor, **options, **{name: value}), processor)
            for name, value in (("keep_answer", True), ("generation_prompt", False))
        }
        assert said["keep_answer"] == [f"</s> user {PATCHES} w1 assistant w9"]
        assert said["generation_prompt"] == [f"</s> user {PATCHES} w1"]

    @QUIET
    def test_rows_without_an_image_are_read_as_texts_and_told(self, processor):
        rows = [llava_row(f"w{k}", None if k % 2 else picture(k), id=k) for k in range(5)]
        with pytest.warns(UserWarning, match="2 of 5 rows have no image and are read as texts"):
            batches = image_batches(rows, processor, format="chat", image="image", batch_size=2)
        assert sorted(sentences(batches, processor)) == sorted(
            f"</s> user {'' if k % 2 else PATCHES + ' '}w{k} assistant" for k in range(5)
        )
        assert [len(b["input_ids"]) for b in batches] == [2, 1, 2] and len(reds(batches)) == 3
        assert "pixel_values" not in batches[2]
        with pytest.raises(MergeError, match="these rows have no images; use text_batches"):
            image_batches([hub_row(text("w1"))], processor, format="chat")

    @QUIET
    def test_a_small_llava_takes_rows_with_different_numbers_of_images(self, processor):
        rows = [
            hub_row(IMAGE, text("w1"), images=[picture(0)]),
            hub_row(text("w1"), IMAGE, text("w2 w3"), IMAGE, images=[picture(50), picture(100)]),
        ]
        (batch,) = image_batches(rows, processor, format="chat", image="images")
        assert batch["pixel_values"].shape == (3, 3, 8, 8)
        model = tiny_llava()
        with torch.no_grad():
            logits = model(**batch).logits
            # Alone, without padding, every row gives the same.
            for k, row in enumerate(batch["attention_mask"].sum(1).tolist()):
                mine = [int((batch["input_ids"][j] == 7).sum()) // 4 for j in range(k + 1)]
                pixels = batch["pixel_values"][sum(mine[:-1]) : sum(mine)]
                alone = model(input_ids=batch["input_ids"][k : k + 1, :row], pixel_values=pixels).logits[0]
                torch.testing.assert_close(logits[k, :row], alone, rtol=1e-4, atol=1e-5)

    @QUIET
    def test_no_second_start_token(self):
        plain = llava_processor()
        plain.chat_template = "</s> " + PARTS_TEMPLATE
        row = hub_row(IMAGE, text("w1"), images=[picture()])
        batches = image_batches([row], plain, format="chat", image="images")
        assert sentences(batches, plain) == [f"</s> user {PATCHES} w1 assistant"]

    @QUIET
    def test_a_cut_is_told_and_spares_the_images(self, processor):
        rows = [hub_row(IMAGE, text("w1 " * n), images=[picture()]) for n in (1, 9)]
        options = {"format": "chat", "image": "images"}
        with pytest.warns(UserWarning, match="1 of 2 rows reach 8 tokens; what lies beyond is not read"):
            (batch,) = image_batches(rows, processor, **options, max_length=8)
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 8)
        with torch.no_grad():
            assert tiny_llava()(**batch).logits.shape[:2] == (2, 8)
        with pytest.raises(
            MergeError, match=r"row 1: its images reach beyond 5 tokens \(of 8\); raise data.max_l"
        ):
            image_batches(rows[:1], processor, **options, max_length=5)
        with pytest.raises(MergeError, match="data.max_length is 99, and the base model has 64 positions"):
            image_batches(rows, processor, **options, max_length=99, config=tiny_llava().config)

    @QUIET
    def test_a_row_that_the_processor_refuses_is_named(self, processor):
        rows = [hub_row(IMAGE, text(said), images=[picture()]) for said in ("w1", "w2 <image>", "w3")]
        with pytest.raises(MergeError, match="the rows, row 2: the processor refuses .*<image> tokens"):
            image_batches(rows, processor, format="chat", image="images")


class TestTemplates:
    """Templates that want texts, lists of parts, or take both."""

    PARTS = [{"role": "user", "content": [text("w1"), text("w2")]}]
    TEXT = [{"role": "user", "content": "w1\nw2"}]
    BOTH = (
        "{% for m in messages %}{{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}"
        "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }} {% endfor %}{% endif %} "
        "{% endfor %}"
    )

    def test_lists_of_texts_and_texts_reach_any_tokenizer(self):
        said = {}
        for name, template in (("text", CHAT_TEMPLATE), ("parts", PARTS_TEMPLATE), ("both", self.BOTH)):
            tokenizer = word_tokenizer(["[user]", "[assistant]", "w1", "w2"], chat_template=template)
            for chat in (self.PARTS, self.TEXT):
                ids = text_batches([chat], tokenizer)[0]["input_ids"][0].tolist()
                said.setdefault(name, []).append(" ".join(tokenizer.convert_ids_to_tokens(ids)))
        assert said == {
            "text": ["[user] w1 w2 </s> [assistant]"] * 2,
            "parts": ["user w1 w2 assistant"] * 2,
            "both": ["user w1 w2"] * 2,
        }

    @pytest.mark.parametrize(
        "wanted",
        ["m.content[0].text + ' '", "m.content + ' '", "(m.content if m.content is string else '') ~ ' '"],
    )
    def test_a_role_may_want_another_form_than_the_user(self, wanted):
        """As Gemma's and Pixtral's templates: the user's contents are read in both forms, others in one."""
        user = self.BOTH.removeprefix("{% for m in messages %}").removesuffix("{% endfor %}")
        template = "{% if messages[0].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
        template += "{% for m in messages %}{% if m.role == 'user' %}" + user + "{% else %}{{ " + wanted
        tokenizer = word_tokenizer(chat_template=template + " }}{% endif %}{% endfor %}")
        for first, answer in (("w3", "w4"), ([text("w3")], "w4"), ("w3", [text("w4")])):
            chat = [
                {"role": "system", "content": first},
                *self.PARTS,
                {"role": "assistant", "content": answer},
                *self.TEXT,
            ]
            ids = text_batches([chat], tokenizer)[0]["input_ids"][0].tolist()
            said = " ".join(tokenizer.convert_ids_to_tokens(ids))
            assert said == "w3 user w1 w2 w4 user w1 w2"

    @QUIET
    def test_images_in_a_template_for_texts_are_tokens(self, processor):
        template = "{% for m in messages %}{{ m.role + ' ' + m.content }} {% endfor %}"
        rows, options = (
            [hub_row(text("w1"), IMAGE, images=[picture()])],
            {"format": "chat", "image": "images"},
        )
        for chosen, expected in (
            (template, f"</s> user w1 {PATCHES}"),
            (self.BOTH, f"</s> user w1 {PATCHES}"),
        ):
            own = llava_processor()
            own.chat_template = chosen
            assert sentences(image_batches(rows, own, **options), own) == [expected]

    @QUIET
    def test_a_template_without_a_place_for_images_is_refused(self):
        own = llava_processor()
        own.chat_template = (
            "{% for m in messages %}{% for c in m.content if c.type == 'text' %}{{ c.text }}"
            "{% endfor %}{% endfor %}"
        )
        row = hub_row(text("w1"), IMAGE, images=[picture()])
        with pytest.raises(
            MergeError, match="row 1: the chat template refuses this chat: it has no place for im"
        ):
            image_batches([row], own, format="chat", image="images")
        own.chat_template = None
        own.tokenizer.chat_template = None
        with pytest.raises(MergeError, match="task 'data': the processor has no chat template"):
            image_batches([row], own, format="chat", image="images")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """base/ with model and processor, adapters one/ and two/ of both towers, pictures, data."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("shop")
    tiny_llava().save_pretrained(folder / "base")
    llava_processor().save_pretrained(folder / "base")
    for name in ("one", "two"):
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(tiny_llava(), config).save_pretrained(folder / name)
    rows = [llava_row(f"<image>\nw{k}", f"{k}.png", id=k) for k in range(4)]
    for k in range(4):
        picture(50 * k).save(folder / f"{k}.png")
    rows += [llava_row("w7", None, id=k) for k in range(4, 7)]
    (folder / "d.json").write_text(json.dumps(rows))
    return folder


class TestRecipe:
    def recipe(self, shop, **data):
        data = {"path": str(shop / "d.json"), "format": "chat", "image": "image", "batch_size": 2, **data}
        content = {
            "base_model": str(shop / "base"),
            "adapters": [{"name": n, "path": str(shop / n), "data": data} for n in ("one", "two")],
            "parameters": {"steps": 4, "scope": {"layers": "all"}},
        }
        return make_recipe(content, where="here")

    def test_a_merge_reads_them_with_and_without_images(self, shop):
        recipe = self.recipe(shop)
        assert make_recipe(recipe.model_dump(mode="json", exclude_none=True), where="again") == recipe
        batches, _ = read_data(recipe, recipe.base_model)
        assert sorted(reds(batches["one"])) == [0, 50, 100, 150]
        assert ["pixel_values" in b for b in batches["one"]] == [True, True, False, False]
        result, _ = run_recipe(recipe)
        assert "task 'one': 3 of 7 rows have no image and are read as texts" in result.notices
        assert len(result.history) == 4 and all(0 < step.loss < 1 for step in result.history)

    def test_a_task_without_images_never_comes_to_the_vision_tower(self, shop, tmp_path):
        (tmp_path / "d.jsonl").write_text(json.dumps({"text": "w1 w2 w3"}) + "\n")
        content = self.recipe(shop).model_dump()
        content["adapters"][1]["data"] = {"path": str(tmp_path / "d.jsonl")}
        result, _ = run_recipe(make_recipe(content, where="here"))
        tasks = {name: set(own) for name, own in result.signal["modules"].items()}
        assert {frozenset(own) for name, own in tasks.items() if "vision" in name} == {frozenset({"one"})}
        assert {frozenset(own) for name, own in tasks.items() if "language" in name} == {
            frozenset({"one", "two"})
        }
        vision = [name for name in tasks if "vision" in name]
        content["parameters"] = {"steps": 1, "scope": {"layers": "all", "filter": vision}}
        with pytest.raises(MergeError, match="task 'two': a batch reaches none of .* without images"):
            run_recipe(make_recipe(content, where="here"))

    def test_images_and_places_are_checked_before_anything_is_loaded(self, shop):
        (shop / "bad.json").write_text(json.dumps([llava_row(), llava_row(image="nowhere.png")]))
        with pytest.raises(MergeError, match="task 'one': bad.json, item 2: there is no image 'nowhere.png'"):
            check_inputs(self.recipe(shop, path=str(shop / "bad.json")))
        (shop / "bad.json").write_text(json.dumps([llava_row(), llava_row("<image> <image>")]))
        with pytest.raises(MergeError, match="task 'one': bad.json, item 2: the chat has 2 places"):
            check_inputs(self.recipe(shop, path=str(shop / "bad.json")))

    def test_an_adapter_brings_its_template_and_a_copy_of_the_tokenizers_does_not_count(self, shop, tmp_path):
        recipe = self.recipe(shop, num_samples=1, path=str(tmp_path / "d.json"))
        picture().save(tmp_path / "0.png")
        (tmp_path / "d.json").write_text(json.dumps([llava_row()]))
        content = recipe.model_dump()
        for adapter, template in zip(content["adapters"], ("w5 " + PARTS_TEMPLATE, None), strict=True):
            folder = tmp_path / adapter["name"]
            folder.mkdir()
            for file in (shop / adapter["name"]).iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
            tokenizer = llava_processor().tokenizer
            tokenizer.chat_template = template or CHAT_TEMPLATE
            tokenizer.save_pretrained(folder)
            adapter["path"] = str(folder)
        # A base whose tokenizer has another template than its processor, for texts alone.
        base = tmp_path / "base"
        processor = llava_processor()
        tiny_llava().save_pretrained(base)
        processor.save_pretrained(base)
        (base / "chat_template.jinja").unlink()
        settings = json.loads((base / "tokenizer_config.json").read_text())
        (base / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT_TEMPLATE}))
        (base / "chat_template.json").write_text(json.dumps({"chat_template": PARTS_TEMPLATE}))
        batches, _ = read_data(make_recipe(content, where="here"), BaseSpec(path=str(base)))
        assert sentences(batches["one"], processor) == [f"</s> w5 user {PATCHES} w1 w2 assistant"]
        assert sentences(batches["two"], processor) == [f"</s> user {PATCHES} w1 w2 assistant"]
