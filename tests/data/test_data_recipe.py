"""Data of a recipe: tokenizer and processor of the base, tokenizers of the adapters, notices of the merge."""

import json

import pytest
from data_inputs import CHAT_TEMPLATE, WORDS, word_tokenizer

from nsc_fast.data import check_tokenizers, read_data
from nsc_fast.errors import MergeError
from nsc_fast.merge import check_inputs, run_recipe
from nsc_fast.recipe import BaseSpec, make_recipe


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """base/ with a tokenizer without chat template, bare/ without any, adapters one/ and two/."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("shop")
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=70,
        max_position_embeddings=16,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    config.save_pretrained(folder / "bare")
    word_tokenizer(chat_template=None).save_pretrained(folder / "base")
    for name in ("one", "two"):
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), lora)
        model.save_pretrained(folder / name)
    return folder


def recipe(shop, data, base="base", **adapters):
    paths = {"one": "one", "two": "two", **adapters}
    content = {
        "base_model": str(shop / base),
        "adapters": [{"name": n, "path": str(shop / p), "data": data} for n, p in paths.items()],
        "parameters": {"steps": 1},
    }
    return make_recipe(content, where="here")


def read(shop, data, base="base"):
    return read_data(recipe(shop, data, base), BaseSpec(path=str(shop / base)))


def test_a_merge_tells_what_it_read(shop, write):
    path = write([{"question": "w1 " * n, "answer": "w2"} for n in (3, 4, 20)])
    result, _ = run_recipe(recipe(shop, {"path": path, "batch_size": 2}))
    assert [n for n in result.notices if n.startswith("task 'one'")] == [
        "task 'one': column 'question' taken as the input",
        "task 'one': not read: 'answer'; only inputs are",
        "task 'one': 1 of 3 rows reach 16 tokens; what lies beyond is not read",
    ]


def test_the_resolved_recipe_reads_the_same(shop, write):
    data = {"path": write([{"q": f"w{i}"} for i in range(30)]), "template": "w0 {q}", "num_samples": 5}
    first = recipe(shop, data)
    again = make_recipe(first.model_dump(mode="json", exclude_none=True), where="again")
    assert again == first
    batches, repeated = (read_data(r, r.base_model)[0]["one"] for r in (first, again))
    assert all(a["input_ids"].equal(b["input_ids"]) for a, b in zip(batches, repeated, strict=True))


def test_a_base_without_tokenizer_or_processor_is_named(shop, write, tmp_path):
    with pytest.raises(MergeError, match="base model '.*bare' has no tokenizer, which text data needs"):
        read(shop, {"path": write(["w1"])}, base="bare")
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(
        MergeError, match="base' has no processor, which image data need .*preprocessor_config"
    ):
        read(shop, {"path": str(tmp_path), "format": "image"})
    rows = write([{"image": "x.png", "q": "w1"}])
    with pytest.raises(MergeError, match="base' has no processor for images with texts"):
        read(shop, {"path": rows, "image": "image", "text": "q"})


def test_images_that_are_not_there_are_named_before_anything_is_loaded(shop, write):
    data = {"path": write([{"image": "x.png"}]), "image": "image"}
    with pytest.raises(MergeError, match="task 'one': d.jsonl, line 1: there is no image 'x.png'"):
        check_inputs(recipe(shop, data, base="bare"))


def test_a_chat_is_written_by_the_template_that_its_adapter_brings(shop, write, tmp_path):
    path = write([[{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]])
    with pytest.raises(MergeError, match="task 'one': the tokenizer has no chat template"):
        read(shop, {"path": path})
    content = recipe(shop, {"path": path}).model_dump()
    for adapter in content["adapters"]:
        folder = tmp_path / adapter["name"]
        folder.mkdir()
        for file in (shop / adapter["name"]).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        word_tokenizer(chat_template=f"{adapter['name']} " + CHAT_TEMPLATE).save_pretrained(folder)
        adapter["path"] = str(folder)
    batches, notices = read_data(make_recipe(content, where="here"), BaseSpec(path=str(shop / "base")))
    assert batches["one"][0]["input_ids"].shape == (1, 5)
    assert "adapters 'one', 'two': different chat templates" in notices


class TestTokenizers:
    def save(self, folder, name, tokenizer):
        tokenizer.save_pretrained(folder / name)
        return folder / name

    def test_equal_ones_and_none_at_all_are_fine(self, tmp_path):
        folders = {n: self.save(tmp_path, n, word_tokenizer()) for n in ("a", "b")}
        (tmp_path / "c").mkdir()
        notices, templates = check_tokenizers({**folders, "c": tmp_path / "c"}, word_tokenizer())
        assert notices == [] and set(templates) == {"a", "b"}

    def test_a_token_with_two_ids_is_an_error_that_names_both(self, tmp_path):
        folders = {
            "a": self.save(tmp_path, "a", word_tokenizer()),
            "b": self.save(tmp_path, "b", word_tokenizer([*WORDS[:5], *reversed(WORDS[5:])])),
        }
        message = "'w5' is token 12 in the tokenizer of adapter 'a' and 66 in that of adapter 'b'.*remove the"
        with pytest.raises(MergeError, match=message):
            check_tokenizers(folders)
        with pytest.raises(MergeError, match="of the base model and 66 in that of adapter 'b'"):
            check_tokenizers({"b": folders["b"]}, word_tokenizer())

    def test_an_id_with_two_tokens_is_an_error(self, tmp_path):
        folders = {n: self.save(tmp_path, n, word_tokenizer([*WORDS, n])) for n in ("a", "b")}
        with pytest.raises(MergeError, match="token 67 is 'a' in the tokenizer of adapter 'a' and 'b' in"):
            check_tokenizers(folders)

    def test_added_padding_tokens_do_not_count(self, tmp_path):
        folders = {}
        for name in ("<a>", "<b>"):
            tokenizer = word_tokenizer(pad_token=name)
            folders[name] = self.save(tmp_path, name, tokenizer)
        vocabularies = [
            json.loads((f / "tokenizer.json").read_text())["added_tokens"] for f in folders.values()
        ]
        assert any(token["id"] == 67 for tokens in vocabularies for token in tokens)
        check_tokenizers(folders)

    def test_more_tokens_other_templates_and_broken_files_are_told(self, tmp_path):
        folders = {
            "more": self.save(tmp_path, "more", word_tokenizer([*WORDS, "x", "y"])),
            "other": self.save(tmp_path, "other", word_tokenizer(chat_template="{{ messages }}")),
            "broken": tmp_path / "broken",
        }
        folders["broken"].mkdir()
        (folders["broken"] / "tokenizer.json").write_text("{")
        notices, _ = check_tokenizers(folders, word_tokenizer())
        assert len(notices) == 3
        assert "adapter 'broken': its tokenizer cannot be read" in notices[0]
        assert (
            "adapter 'more': its tokenizer has 2 tokens that the base model's does not have ('x', 'y')"
            in (notices[1])
        )
        assert notices[2] == "adapters 'other': another chat template than the base model's"

    def test_a_recipe_is_refused_before_the_model_is_loaded(self, shop, write):
        names = {}
        for k, name in enumerate(("one", "two")):
            target = shop / f"{name}-own"
            target.mkdir()
            for file in (shop / name).iterdir():
                (target / file.name).write_bytes(file.read_bytes())
            self.save(target, ".", word_tokenizer(WORDS if k else WORDS[::-1]))
            names[name] = target.name
        with pytest.raises(MergeError, match="adapter 'one' and .* adapter 'two': .*different tokenizers"):
            check_inputs(recipe(shop, {"path": write(["w1"])}, base="bare", **names))


def test_a_decoder_beside_an_encoder_gets_its_start_token_only(write, tmp_path):
    from transformers import BartConfig, T5Config

    for config in (
        T5Config(vocab_size=99, pad_token_id=1),
        BartConfig(vocab_size=99, decoder_start_token_id=1),
    ):
        config.save_pretrained(tmp_path)
        word_tokenizer().save_pretrained(tmp_path)
        content = {"adapters": [{"name": "one", "path": "a", "data": {"path": write(["w1 w2", "w3"])}}]}
        loaded, base = make_recipe(content, where="here"), BaseSpec(path=str(tmp_path))
        (batch,) = read_data(loaded, base)[0]["one"]
        assert batch["decoder_input_ids"].tolist() == [[1], [1]] and batch["input_ids"].shape == (2, 2)
        assert "decoder_input_ids" not in read_data(loaded, base, "SEQ_CLS")[0]["one"][0]
