"""Every kind of file gives the same rows; a bad one is named with task, file and line."""

import gzip
import json
from importlib.util import find_spec

import pytest

from nsc_fast.data import check_data, draw_examples
from nsc_fast.data.files import open_source
from nsc_fast.errors import MergeError
from nsc_fast.recipe import DataSpec

needs_datasets = pytest.mark.skipif(find_spec("datasets") is None, reason="needs the extra 'data'")


def drawn(path, seed=0, **options):
    spec = DataSpec(path=str(path), **options)
    return draw_examples(open_source("vqa", spec), spec, seed)


def texts(path, **options):
    return [e.text if e.pair is None else (e.text, e.pair) for e in drawn(path, **options).examples]


def test_samples_are_drawn_with_the_seed_and_labels_are_not_read(write):
    path = write([{"text": str(i), "label": "secret"} for i in range(30)])
    first = drawn(path, num_samples=10)
    assert first.examples == drawn(path, num_samples=10).examples
    assert first.examples != drawn(path, seed=1, num_samples=10).examples
    assert len({e.text for e in first.examples}) == 10 and "secret" not in str(first.examples)
    assert first.notices == ["task 'vqa': not read: 'label'; only inputs are"]


ROWS = [{"text": f'a, "b" é\n{i}', "n": str(i)} for i in range(9)]


def as_csv(separator):
    quoted = [f'"{row["text"]}"'.replace('"b"', '""b""') + separator + row["n"] for row in ROWS]
    return "\n".join([f"text{separator}n", *quoted]) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("bom.jsonl", b"\xef\xbb\xbf" + b"\n".join(json.dumps(row).encode() for row in ROWS)),
        ("d.JSONL.gz", gzip.compress("\n\n".join(json.dumps(row) for row in ROWS).encode())),
        ("list.json", json.dumps(ROWS, indent=1)),
        ("inside.json", json.dumps({"version": 2, "data": ROWS})),
        ("lines.json", "\n".join(json.dumps(row) for row in ROWS)),
        ("zipped.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("nosuffix", "\n".join(json.dumps(row) for row in ROWS)),
        ("d.csv", as_csv(",")),
        ("excel.csv", b"\xef\xbb\xbf" + as_csv(";").encode()),
        ("d.tsv", as_csv("\t")),
        ("d.csv.gz", gzip.compress(as_csv(",").encode())),
    ],
)
def test_all_formats_give_the_same_rows(write, name, content):
    assert texts(write(content, name)) == texts(write(ROWS, "reference.jsonl"))


@needs_datasets
def test_parquet_and_saved_datasets_give_the_same_rows(write, tmp_path):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "d.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    expected = texts(write(ROWS))
    for name in ("d.parquet", "saved", "splits"):
        assert texts(tmp_path / name) == expected
    assert len(texts(tmp_path / "splits", split="test")) == 1
    with pytest.raises(MergeError, match="no split 'dev'; set data.split to 'train' or 'test'"):
        texts(tmp_path / "splits", split="dev")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(MergeError, match="task 'vqa': bad.parquet: not a readable Parquet file"):
        texts(tmp_path / "bad.parquet")


@needs_datasets
def test_a_hub_id_goes_to_datasets_and_its_errors_are_told(monkeypatch):
    import datasets

    asked = []
    found = datasets.DatasetDict({"validation": datasets.Dataset.from_list(ROWS)})
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, name, revision: asked.append((path, name, revision)) or found
    )
    assert len(texts("org/set", subset="en", revision="r1")) == 9 and asked == [("org/set", "en", "r1")]

    def refuse(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("no such dataset")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(MergeError, match="task 'vqa': dataset 'org/set' cannot be loaded: no such dataset"):
        texts("org/set")


def test_a_missing_library_is_named_with_its_extra(write, monkeypatch):
    import sys

    path = write(b"PAR1", "d.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for what in (path, "org/set"):
        with pytest.raises(MergeError, match=r"task 'vqa': .* pip install 'nsc-fast\[data\]'"):
            texts(what)


def test_text_files_are_lines_and_folders_of_them_documents(write, tmp_path):
    path = write("one\r\n\n  \ntwo\n", "docs/b.txt")
    write("three\nfour\n", "docs/sub/a.txt")
    write("hidden", "docs/.cache/x.txt")
    assert sorted(texts(path)) == ["one", "two"]
    assert sorted(texts(tmp_path / "docs")) == ["one\r\n\n  \ntwo\n", "three\nfour\n"]
    assert sorted(texts(tmp_path / "docs", documents=False)) == ["four", "one", "three", "two"]
    assert texts(path, documents=True) == ["one\r\n\n  \ntwo\n"]


def test_a_folder_of_shards_is_one_file_after_the_other(write, tmp_path):
    write(ROWS[:4], "shards/0.jsonl")
    write([*ROWS[4:], {"txt": 1}], "shards/1.jsonl")
    with pytest.raises(MergeError, match="task 'vqa': 1.jsonl, line 6: no column text"):
        texts(tmp_path / "shards")
    write(ROWS[4:], "shards/1.jsonl")
    assert texts(tmp_path / "shards") == texts(write(ROWS))
    write("a,b\n", "shards/x.csv")
    with pytest.raises(MergeError, match="holds 2 lines, 1 table; give a file"):
        texts(tmp_path / "shards")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", "", "d.jsonl holds no text"),
        ("d.jsonl", '{"text": "  "}\n{"text": null}', "d.jsonl holds no text"),
        ("d.jsonl", '{"text": "a"}\n{"txt": "b"}\n', r"d.jsonl, line 2: no column text \(it has txt\)"),
        ("d.jsonl", "not json\n", "d.jsonl, line 1: not JSON"),
        ("d.jsonl", "version https://git-lfs.github.com/spec/v1\n", "line 1: not JSON.* git-lfs pointer"),
        ("d.jsonl", "[1]\n", r"d.jsonl, line 1: a row is an object .* not \[1\]"),
        (
            "d.jsonl",
            b'{"text": "a"}\n{"text": "\xe9"}',
            "line 2: byte 0xe9 at position 10 is not UTF-8; .*iconv",
        ),
        ("d.jsonl", '{"text": {"a": 1}}', "line 1: column 'text' holds a dict, not text"),
        ("d.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9)[:-9], "d.jsonl.gz, line .* cannot be read"),
        ("d.jsonl.gz", b"plain", "d.jsonl.gz, line 1: cannot be read: Not a gzipped file"),
        ("d.json", "[1, 2]", r"d.json, item 1: a row is an object"),
        ("d.json", "[", "d.json: not a readable JSON file"),
        ("d.json", "1", "d.json: holds no list of rows"),
        ("d.csv", "text,n\na,1\nb\n", "d.csv, line 3: 1 fields where the first line has 2"),
        ("d.csv", "text,text\na,1\n", "d.csv, line 1: two columns are named 'text'"),
        ("d.csv", b"text,n\n\xe9,1\n", "d.csv, line 2: cannot be read: .*0xe9.* save it as UTF-8"),
        ("d.csv", 'text,n\na,1\n"b,2\n', "d.csv, line .: cannot be read: unexpected end of data"),
        ("d.csv", "", "which column is the input"),
        ("d.txt", b"\xff\xfeh\0i\0", "d.txt, line 1: byte 0xff at position 0 is not UTF-8"),
        ("d.doc", "x", r"d.doc: unknown kind of file; known are \.jsonl"),
    ],
)
def test_bad_files_are_named(write, name, content, message):
    path = write(content, name)
    with pytest.raises(MergeError, match=message) as caught:
        check_data("vqa", DataSpec(path=path), 0)
    assert str(caught.value).startswith("task 'vqa': ")


@pytest.mark.parametrize("path", ["nowhere.jsonl", "no/where.jsonl", "/no/where", "imdb"])
def test_a_missing_file_is_named(path):
    with pytest.raises(MergeError, match=f"task 'vqa': there is no data file '{path}'"):
        check_data("vqa", DataSpec(path=path), 0)


def test_empty_rows_are_left_out_and_told(write):
    sample = drawn(write([{"text": "a"}, {"text": " "}, {"text": None}, {"text": "b"}]))
    assert sorted(e.text for e in sample.examples) == ["a", "b"]
    assert sample.notices == ["task 'vqa': empty rows left out: 2, the first d.jsonl, line 2"]


def test_a_long_field_of_a_table_is_read_and_the_limit_put_back(write):
    import csv

    before = csv.field_size_limit()
    assert len(texts(write("text\n" + "a" * 200_000 + "\n", "d.csv"))[0]) == 200_000
    assert csv.field_size_limit() == before
