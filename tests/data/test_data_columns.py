"""Columns: named, or guessed from well-known names and told; templates and chats."""

import pytest

from nsc_fast.data import draw_examples
from nsc_fast.data.files import open_rows
from nsc_fast.errors import MergeError
from nsc_fast.recipe import DataSpec


def read(rows, **options):
    spec = DataSpec(path="rows", **options)
    return draw_examples(open_rows("qa", rows), spec, 0)


def one(row, **options):
    return read([row], **options).examples[0]


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ("hello", {}, ("hello", None)),
        (("a", "b"), {}, ("a", "b")),
        ({"text": "a", "text_pair": "b", "label": 1}, {}, ("a", "b")),
        ({"text": 3.5, "label": 1}, {}, ("3.5", None)),
        ({"question": "q", "answer": "x"}, {}, ("q", None)),
        ({"premise": "p", "hypothesis": "h", "label": 0}, {}, ("p", "h")),
        ({"question": "q", "context": "c", "answers": []}, {}, ("q", "c")),
        ({"mine": "m"}, {}, ("m", None)),
        ({"a": "m", "b": "n"}, {"text": "b"}, ("n", None)),
        ({"a": "m", "b": "n"}, {"text": ("b", "a")}, ("n", "m")),
        ({"a": "m", "b": 2}, {"template": "{b}: {{{a}}}\nA:"}, ("2: {m}\nA:", None)),
        ({"tokens": ["a", "b"], "ner_tags": [0, 1]}, {}, (("a", "b"), None)),
        ({"text": "t", "messages": []}, {"format": "text"}, ("t", None)),
        ({"question": "q", "premise": "p", "hypothesis": "h"}, {"format": "pair"}, ("p", "h")),
    ],
)
def test_what_a_row_becomes(row, options, expected):
    example = one(row, **options)
    assert (example.text, example.pair) == expected


def test_guesses_and_labels_are_told():
    notices = read([{"question": "q", "answer": "x", "id": 1}]).notices
    assert notices == [
        "task 'qa': column 'question' taken as the input",
        "task 'qa': not read: 'answer', 'id'; only inputs are",
    ]
    assert read(["a"]).notices == []
    assert "looks like a label" in read([{"text": "a", "label": 1}], template="{text} {label}").notices[-1]


CHAT = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "r"},
    {"role": "assistant", "content": "secret"},
]


def test_the_last_answer_of_a_chat_is_a_label():
    assert one({"messages": CHAT}).messages == tuple(CHAT[:3])
    assert one({"messages": CHAT}, keep_answer=True).messages == tuple(CHAT)
    assert one(CHAT).messages == tuple(CHAT[:3]) == one({"messages": CHAT[:3]}).messages
    with pytest.raises(MergeError, match="holds no text"):
        read([CHAT[1:2]])


def test_the_other_way_of_writing_chats():
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    (message,) = one(row).messages
    assert (message["role"], message["content"]) == ("user", "q")
    assert "'conversations' taken as the input" in read([row]).notices[0]


class Broken:
    """Has a length and no items by position, as a table of pandas."""

    def __len__(self):
        return 3

    def __getitem__(self, key):
        raise KeyError(key)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"a": "x", "b": "y"}], {}, "which column is the input\\? It has a, b; none has a well-known name"),
        ([{"question": "x", "prompt": "y"}], {}, r"several could be meant \(prompt, question\).*data.text"),
        ([{"text": "x", "image": "y"}], {}, "there are images and texts; set data.format"),
        ([{"text": "x"}], {"text": "txt"}, r"no column txt \(it has text\)"),
        ([{"text": "x"}], {"template": "{q}"}, "no column q"),
        ([{"text": "x"}], {"format": "chat"}, "name it with data.messages"),
        ([{"text": "x"}], {"format": "image"}, "name it with data.image"),
        ([{"messages": "hello"}], {}, "row 1: column 'messages' holds no list of messages"),
        ([{"messages": [{"role": "user"}]}], {}, "row 1: a message needs a role and a content"),
        ([{"messages": [{"role": "user", "content": [1]}]}], {}, "row 1: a message needs a role"),
        (["a", {"text": ["b"]}], {}, "some rows hold a text, others a list of words"),
        ([{"text": ["b"]}], {"template": "{text}"}, "row 1: a list of words does not go into a template"),
        ([{"a": ["b"], "b": "c"}], {"text": ("a", "b")}, "row 1: a list of words cannot be combined"),
        ([3], {}, "row 1: a row is an object"),
        ([], {}, "the rows holds no text"),
        (Broken(), {}, r"row 1: cannot be read \(KeyError\(0\)\); give a list"),
        ({"train": []}, {}, "the rows are a mapping of train; choose one"),
    ],
)
def test_bad_rows_are_named(rows, options, message):
    with pytest.raises(MergeError, match=message) as caught:
        read(rows, **options)
    assert str(caught.value).startswith("task 'qa': ")


def test_a_stream_is_read_once_and_gives_the_rows_of_a_list():
    rows = [f"t{i}" for i in range(40)]
    assert read(iter(rows), num_samples=5).examples == read(rows, num_samples=5).examples
    assert read((r for r in rows), num_samples=99).examples == read(rows, num_samples=99).examples


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "a", "template": "{b}"}, "not both"),
        ({"template": "no column"}, "names no column"),
        ({"template": "{a.b}"}, "one column's name"),
        ({"template": "{a!r}"}, "one column's name"),
        ({"template": "{}"}, "one column's name"),
        ({"template": "{a"}, "expected '}'"),
        ({"messages": "m", "text": "t"}, "messages make a chat by themselves"),
        ({"format": "chat", "text": "t"}, "format 'chat' has no text"),
        ({"format": "pair", "text": "t"}, "do not agree"),
        ({"format": "text", "text": ("t", "u")}, "do not agree"),
        ({"image": "i", "messages": "m", "format": "image"}, "format .image. has no messages"),
        ({"format": "video"}, "'auto', 'text', 'pair', 'chat' or 'image'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DataSpec(path="p", **options)
