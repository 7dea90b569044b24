"""The bundled rows: present, parseable, credited, and without labels where they must have none."""

import pytest

from nsc_fast.demo.prepare import TEST, UNLABELED, select, write_rows
from nsc_fast.demo.tasks import DATA, TASKS, read_rows, task_named

BY_NAME = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@BY_NAME
def test_unlabeled_rows_hold_inputs_only(task):
    rows = task.rows("unlabeled")
    assert len(rows) == UNLABELED
    assert all(set(row) == set(task.inputs) for row in rows)
    assert all(row[field] for row in rows for field in task.inputs)


@BY_NAME
def test_test_rows_hold_answers_that_the_task_knows(task):
    rows = task.rows("test")
    assert len(rows) == TEST
    assert all(set(row) == {*task.inputs, *task.targets} for row in rows)
    for row in rows:
        if task.kind == "regression":
            assert all(1 <= row[field] <= 5 for field in task.targets)
        elif task.kind == "tagging":
            assert len(row["tags"]) == len(row["tokens"])
            assert set(row["tags"]) <= set(task.labels)
        else:
            assert row["label"] in task.labels


@BY_NAME
def test_no_test_input_is_among_the_unlabeled_rows(task):
    def inputs(split):
        return {str([row[field] for field in task.inputs]).lower() for row in task.rows(split)}

    assert not inputs("unlabeled") & inputs("test")


@BY_NAME
def test_source_and_licence_are_credited(task):
    line = next(
        line
        for line in (DATA / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith(f"| `{task.name}` |")
    )
    assert task.source in line
    assert task.license.replace("-", " ").lower() in line.replace("-", " ").lower()
    assert "commit" in line


def test_the_data_folder_is_small_and_holds_nothing_else():
    expected = {f"{t.name}.{split}.jsonl.gz" for t in TASKS for split in ("unlabeled", "test")}
    assert {path.name for path in DATA.iterdir()} == {*expected, "README.md"}
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 400_000


def test_selection_is_repeatable_and_drops_known_inputs(tmp_path):
    task = task_named("scitail")
    train = [{"premise": f"p {i}", "hypothesis": "h", "label": "neutral", "id": i} for i in range(300)]
    test = [{"premise": f"P {i}", "hypothesis": "h", "label": "neutral", "id": i} for i in range(250, 750)]
    unlabeled, labeled = select(task, train, test)
    assert (unlabeled, labeled) == select(task, train, test)
    assert all(int(row["premise"].split()[1]) >= 300 for row in labeled)
    assert set(unlabeled[0]) == {"premise", "hypothesis"}
    assert set(labeled[0]) == {"premise", "hypothesis", "label"}
    write_rows(tmp_path / "a.gz", labeled)
    write_rows(tmp_path / "b.gz", labeled)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert read_rows(tmp_path / "a.gz") == labeled


def test_an_unknown_task_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="no demo task 'sick'; there are emobank"):
        task_named("sick")
