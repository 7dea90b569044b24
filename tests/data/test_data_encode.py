"""From rows to batches: every token is there, cuts are told, and limits of the model are kept."""

import pytest
import torch
from data_inputs import CHAT_TEMPLATE, word_tokenizer
from transformers import BertConfig, LlamaConfig, RobertaConfig, ViTConfig

from nsc_fast.batches import BatchStream
from nsc_fast.data import image_batches, text_batches
from nsc_fast.data.processors import limits_of
from nsc_fast.errors import MergeError, RecipeError

QUIET = pytest.mark.filterwarnings("ignore:task")


def sentences(batches, tokenizer):
    """The rows of all batches as they would be read."""
    out = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            out.append(" ".join(tokenizer.convert_ids_to_tokens(ids[mask.bool()].tolist())))
    return out


def test_rows_come_back_padded_on_the_right_and_sorted_by_length(tokenizer):
    rows = [" ".join(f"w{i}" for i in range(n)) for n in range(1, 11)]
    batches = text_batches(rows, tokenizer, batch_size=4)
    assert sentences(batches, tokenizer) == rows
    assert [batch["input_ids"].shape for batch in batches] == [(4, 4), (4, 8), (2, 10)]
    assert all((b["attention_mask"].diff(dim=1) <= 0).all() for b in batches)


def test_the_same_rows_for_a_seed_whatever_the_source(tokenizer, write):
    rows = [f"w{i}" for i in range(40)]
    path = write([{"text": row} for row in rows])
    options = {"seed": 5, "num_samples": 8}
    drawn = sentences(text_batches(rows, tokenizer, **options), tokenizer)
    assert drawn == sentences(text_batches(path, tokenizer, **options), tokenizer)
    assert drawn == sentences(text_batches(iter(rows), tokenizer, **options), tokenizer)
    assert drawn != sentences(text_batches(rows, tokenizer, num_samples=8), tokenizer)


def test_words_and_pairs_and_templates(tokenizer):
    assert sentences(text_batches([{"text": ["w1", "w2"]}], tokenizer), tokenizer) == ["w1 w2"]
    assert sentences(text_batches([("w1", "w2")], tokenizer), tokenizer) == ["w1 w2"]
    rows = [{"q": "w3 w4"}]
    assert sentences(text_batches(rows, tokenizer, template="w0 {q} w9"), tokenizer) == ["w0 w3 w4 w9"]


CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


def test_chats_go_through_the_template_without_their_answer(tokenizer):
    tokenizer = word_tokenizer(["[user]", "[assistant]", *(f"w{i}" for i in range(9))])
    assert sentences(text_batches([CHAT], tokenizer), tokenizer) == ["[user] w1 </s> [assistant]"]
    plain = text_batches([CHAT], tokenizer, generation_prompt=False)
    assert sentences(plain, tokenizer) == ["[user] w1 </s>"]
    kept = text_batches([CHAT], tokenizer, keep_answer=True)
    assert sentences(kept, tokenizer) == ["[user] w1 </s> [assistant] w2 </s>"]


def test_a_chat_gets_no_second_start_token():
    from tokenizers import processors

    tokenizer = word_tokenizer(chat_template="</s> " + CHAT_TEMPLATE)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    assert text_batches(["w1"], tokenizer)[0]["input_ids"][0].tolist()[0] == 2
    assert text_batches([CHAT[:1]], tokenizer)[0]["input_ids"][0].tolist()[:2] != [2, 2]


def test_chats_that_cannot_be_written_are_named(tokenizer):
    with pytest.raises(MergeError, match="task 'data': the tokenizer has no chat template; .*data.template"):
        text_batches([CHAT], word_tokenizer(chat_template=None))
    chat = [{"role": "system", "content": "w1"}, *CHAT]
    with pytest.raises(MergeError, match="the rows, row 1: the chat template refuses .* no system messages"):
        text_batches([chat], tokenizer)


def test_cuts_are_told(tokenizer):
    rows = ["w1 " * n for n in (2, 5, 6, 40)]
    with pytest.warns(UserWarning, match="task 'data': 3 of 4 rows reach 5 tokens; what lies beyond"):
        batches = text_batches(rows, tokenizer, max_length=5)
    assert batches[0]["input_ids"].shape == (4, 5)


def test_the_length_is_what_the_model_can_take_and_more_is_refused(tokenizer):
    config = LlamaConfig(max_position_embeddings=7, vocab_size=200)
    with pytest.warns(UserWarning, match="1 of 1 rows reach 7 tokens"):
        assert text_batches(["w1 " * 9], tokenizer, config=config)[0]["input_ids"].shape == (1, 7)
    with pytest.raises(MergeError, match="data.max_length is 8, and the base model has 7 positions"):
        text_batches(["w1"], tokenizer, config=config, max_length=8)
    with pytest.warns(UserWarning, match="max_length 9 is above the 4 tokens that the tokenizer"):
        text_batches(["w1"], word_tokenizer(model_max_length=4), max_length=9)


def test_limits_of_configurations():
    assert limits_of(BertConfig(max_position_embeddings=64, vocab_size=9)).positions == 64
    # Positions of RoBERTa begin after the padding token's.
    assert limits_of(RobertaConfig(max_position_embeddings=514, pad_token_id=1)).positions == 512
    assert limits_of(ViTConfig()).positions is None


def test_roberta_takes_as_many_tokens_as_the_limit_says():
    from transformers import RobertaModel

    config = RobertaConfig(
        max_position_embeddings=12,
        pad_token_id=1,
        hidden_size=8,
        num_attention_heads=1,
        num_hidden_layers=1,
        intermediate_size=8,
        vocab_size=20,
    )
    model, most = RobertaModel(config), limits_of(config).positions
    assert model(input_ids=torch.full((1, most), 5)).last_hidden_state.shape[1] == most == 10
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, most + 1), 5))


def test_tokens_that_do_not_fit_are_named(tokenizer):
    config = LlamaConfig(vocab_size=20)
    with pytest.raises(MergeError, match="row 2: token 66 is beyond the base model's vocabulary of 20"):
        text_batches(["w1", "w59"], tokenizer, config=config)
    bare = word_tokenizer(pad_token=None, eos_token=None)
    bare.unk_token = None
    with pytest.raises(MergeError, match="no token to pad with; set its pad_token"):
        text_batches(["w1"], bare)


def test_padding_leaves_the_tokenizer_as_it_was():
    tokenizer = word_tokenizer(pad_token=None)
    batch = text_batches(["w1", "w1 w2"], tokenizer)[0]
    assert tokenizer.pad_token is None and batch["attention_mask"].tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sample": 3}, "task 'data': num_sample: Extra inputs"),
        ({"batch_size": 0}, "task 'data': batch_size: "),
        ({"template": "x"}, "task 'data': template: .*names no column"),
    ],
)
def test_wrong_options_are_named(tokenizer, options, message):
    with pytest.raises(RecipeError, match=message):
        text_batches(["w1"], tokenizer, **options)


def test_rows_where_batches_belong_are_refused_with_the_way_out():
    for rows in (["w1"], iter(["w1"])):
        with pytest.raises(MergeError, match="task 'one': the data hold a str, not batches .*text_batches"):
            BatchStream("one", rows, 0).next()


class TestImages:
    """PIL is in the extra 'data'; the processors come from transformers."""

    @pytest.fixture
    def folder(self, tmp_path):
        image = pytest.importorskip("PIL.Image")
        for k in range(5):
            path = tmp_path / "images" / f"class{k % 2}" / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            mode = "L" if k == 3 else "RGB"
            image.new(mode, (20 + k, 30), 50 * k if mode == "L" else (50 * k, 0, 0)).save(path)
        return tmp_path / "images"

    @pytest.fixture
    def processor(self, tmp_path):
        import json

        from transformers import AutoImageProcessor

        content = {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": 8, "width": 8},
            "do_normalize": False,
        }
        (tmp_path / "p").mkdir()
        (tmp_path / "p" / "preprocessor_config.json").write_text(json.dumps(content))
        return AutoImageProcessor.from_pretrained(tmp_path / "p")

    def reds(self, batches):
        return sorted(round(float(b[0].mean()) * 255) for batch in batches for b in batch["pixel_values"])

    def test_a_folder_of_images(self, folder, processor):
        batches = image_batches(folder, processor, batch_size=2)
        assert [b["pixel_values"].shape for b in batches] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
        assert self.reds(batches) == [0, 50, 100, 150, 200]

    @QUIET
    def test_a_column_of_paths_bytes_or_images(self, folder, processor, write):
        from PIL import Image

        paths = sorted(folder.rglob("*.png"))
        expected = self.reds(image_batches(folder, processor))
        relative = [{"image": str(p.relative_to(folder.parent)), "label": 1} for p in paths]
        assert self.reds(image_batches(write(relative), processor)) == expected
        contents = [{"image": {"bytes": p.read_bytes(), "path": None}} for p in paths]
        assert self.reds(image_batches(contents, processor)) == expected
        assert self.reds(image_batches([{"img": Image.open(p)} for p in paths], processor)) == expected

    def test_a_bad_image_is_named(self, folder, processor, write):
        (folder / "class0" / "x.png").write_bytes(b"no image")
        with pytest.raises(MergeError, match="task 'data': images, file class0/x.png: this image cannot"):
            image_batches(folder, processor)
        with pytest.raises(MergeError, match="d.jsonl, line 1: this image cannot be opened: .*nowhere.png"):
            image_batches(write([{"image": "nowhere.png"}]), processor)
        with pytest.raises(MergeError, match="row 1: the image is a int"):
            image_batches([{"image": 3}], processor)
        with pytest.raises(MergeError, match="these rows are images; use image_batches"):
            text_batches(folder, None)

    @QUIET
    def test_images_with_texts_go_through_the_joint_processor(self, folder, processor, tokenizer):
        from transformers import CLIPProcessor

        joint = CLIPProcessor.__new__(CLIPProcessor)
        joint.image_processor, joint.tokenizer = processor, tokenizer
        joint.chat_template, joint.audio_tokenizer = None, None
        rows = [{"image": str(p), "q": f"w{k} w1"} for k, p in enumerate(sorted(folder.rglob("*.png")))]
        (batch,) = image_batches(rows, joint, text="q")
        assert batch["pixel_values"].shape == (5, 3, 8, 8) and batch["input_ids"].shape == (5, 2)
