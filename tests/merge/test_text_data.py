"""Text data: only the named columns are read, in an order that the seed fixes."""

import gzip
import json

import pytest

from nsc_fast.errors import MergeError
from nsc_fast.recipe import DataSpec
from nsc_fast.text_data import read_rows


def _file(tmp_path, rows, name="d.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_samples_are_drawn_with_the_seed_and_labels_are_not_read(tmp_path):
    path = _file(tmp_path, [{"text": str(i), "label": "secret"} for i in range(30)])
    spec = DataSpec(path=path, num_samples=10)
    first = read_rows("t", spec, 0)
    assert first == read_rows("t", spec, 0) and first != read_rows("t", spec, 1)
    assert len(set(first)) == 10 and "secret" not in str(first)


def test_pairs_and_gzip(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps({"premise": "a", "hypothesis": "b"}) + "\n")
    assert read_rows("t", DataSpec(path=str(path), text=("premise", "hypothesis")), 0) == [("a", "b")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no text"),
        ('{"text": "  "}\n', "holds no text"),
        ('{"text": "a"}\n{"txt": "b"}\n', r"line 2: no column text \(it has txt\)"),
        ("not json\n", "line 1: not JSON"),
        ("[1]\n", "line 1: no column text"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(MergeError, match=message) as caught:
        read_rows("vqa", DataSpec(path=str(path)), 0)
    assert "vqa" in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(MergeError, match="task 'vqa': there is no data file 'nowhere.jsonl'"):
        read_rows("vqa", DataSpec(path="nowhere.jsonl"), 0)
