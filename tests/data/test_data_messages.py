"""The ways in which chats with images are written: which image belongs where."""

import pytest
from data_inputs import IMAGE, hub_row, llava_row, text

from nsc_fast.data import draw_examples
from nsc_fast.data.files import open_rows
from nsc_fast.errors import MergeError
from nsc_fast.recipe import DataSpec


def one(row, **options):
    spec = DataSpec(path="rows", **{"format": "chat", **options})
    (example,) = draw_examples(open_rows("vqa", [row]), spec, 0).examples
    return example


def content(row, **options):
    """The content of the only message, the answer being left out."""
    (message,) = one(row, **options).messages
    return message["content"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("<image>\nw1", [IMAGE, text("w1")]),
        ("w1\n<image>", [text("w1"), IMAGE]),
        ("w1 <image> w2", [text("w1 "), IMAGE, text(" w2")]),
        ("<image>\n\nw1", [IMAGE, text("\nw1")]),
        ("w1", [IMAGE, text("w1")]),
        ("<image>", [IMAGE]),
    ],
)
def test_an_image_stands_at_its_placeholder_or_first(said, expected):
    row = llava_row(said)
    assert content(row, image="image") == expected
    assert one(row, image="image").images == ("0.png",)


def test_several_images_in_several_messages_keep_their_order():
    chat = [
        {"role": "system", "content": "w0"},
        {"role": "user", "content": "<image>\n<image>\nw1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": [text("w3 <image>")]},
    ]
    example = one({"messages": chat, "images": ["a", "b", "c"]}, image="images")
    assert [m["content"] for m in example.messages] == [
        "w0",
        [IMAGE, IMAGE, text("w1")],
        "w2",
        [text("w3 "), IMAGE],
    ]
    assert example.images == ("a", "b", "c")
    bare = [{"role": "system", "content": "w0"}, {"role": "user", "content": "w1"}]
    first = one({"messages": bare, "images": ["a", "b"]}, image="images").messages
    assert [m["content"] for m in first] == ["w0", [IMAGE, IMAGE, text("w1")]]


def test_parts_with_the_keys_of_all_parts():
    parts = (
        {"type": "text", "text": "w1", "index": None},
        {"type": "image", "text": None, "index": 0, "path": None},
    )
    row = hub_row(*parts, images=["a"])
    assert content(row, image="images") == [text("w1"), IMAGE]
    assert one(row, image="images").images == ("a",)


def test_parts_that_hold_their_images_need_no_column():
    row = hub_row({"type": "image", "path": "a"}, text("w1"), {"type": "image", "image": "b"})
    assert one(row).images == ("a", "b")
    assert content(row) == [IMAGE, text("w1"), IMAGE]


def test_a_place_in_words_is_a_word_where_parts_are_images_or_there_is_no_column():
    row = hub_row(IMAGE, text("w1 <image>"), images=["a"])
    assert content(row, image="images") == [IMAGE, text("w1 <image>")]
    assert content(llava_row()) == "<image>\nw1 w2"


def test_images_of_an_answer_that_is_left_out_do_not_count():
    row = hub_row(IMAGE, text("w1"))
    row["messages"][-1]["content"].append({"type": "image", "path": "b"})
    row["messages"][0]["content"][0] = {"type": "image", "path": "a"}
    assert one(row).images == ("a",)
    assert one(row, keep_answer=True).images == ("a", "b")


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            llava_row("<image><image>"),
            {"image": "image"},
            "row 1: the chat has 2 places .* the row 1 ima",
        ),
        (
            llava_row("<image>", image=None),
            {"image": "image"},
            "row 1: .* 1 place .* and the row no image",
        ),
        (hub_row(IMAGE, images=["a", "b"]), {"image": "images"}, "row 1: .* 1 place .* the row 2 images"),
        (hub_row(IMAGE, images=["a"]), {}, "row 1: .*no image; name their column with data.image"),
        (hub_row(IMAGE, {"type": "image", "path": "a"}), {}, "row 1: the chat has 2 places .* 1 image"),
        (
            hub_row({"type": "image", "path": "a"}, images=["a"]),
            {"image": "images"},
            "row 1: the chat holds images itself, and so does the image column",
        ),
        (
            hub_row({**IMAGE, "index": 1}, {**IMAGE, "index": 0}, images=["a", "b"]),
            {"image": "images"},
            r"row 1: the image parts are numbered \[1, 0\]",
        ),
        (hub_row({"type": "image", "url": "https://x.org/a.png"}), {}, "row 1: an image part has a url"),
        (hub_row({"type": "image_url", "image_url": {"url": "x"}}), {}, "row 1: .*has a image_url.*save"),
        (hub_row({"type": "image", "image": "data:image/png;base64,"}), {}, "row 1: .*is an address"),
        (
            llava_row(image="https://x.org/a.png"),
            {"image": "image"},
            "row 1: .*a.png' is an address.*save",
        ),
        (hub_row({"type": "video"}), {}, "row 1: a part of a content is a text or an image, not"),
        (hub_row({"type": "text"}), {}, "row 1: a part of a content is a text or an image, not"),
        (hub_row("w1"), {}, "row 1: a message needs a role and a content"),
        (
            {"messages": [{"role": "system", "content": "w1"}], "image": "a"},
            {"image": "image"},
            "row 1: there is no message of the user",
        ),
        (
            llava_row("w1", image=None),
            {"image": "picture"},
            "no row that was drawn has an image in column",
        ),
        ({**llava_row(), "text": "w1"}, {"format": "auto", "text": None}, "there are images and texts"),
        (llava_row(), {"format": "auto"}, "there are chats and images; set data.format to 'chat'"),
    ],
)
def test_rows_that_do_not_fit_are_named(row, options, message):
    with pytest.raises(MergeError, match=message) as caught:
        one(row, **options)
    assert str(caught.value).startswith("task 'vqa': ")
