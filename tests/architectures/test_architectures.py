"""Every common architecture: gradients, a merge, and what PEFT makes of the written folder."""

import pytest
import torch
from architecture_checks import (
    RANKS,
    check_gradients,
    check_reload,
    eager,
    leaves,
    merged_weights,
    second_step,
    train,
    with_weights,
)
from architecture_rows import ROWS

from nsc_fast import merge_adapters
from nsc_fast.adapters import read_adapter
from nsc_fast.driver import target_modules
from nsc_fast.parameters import NSCParameters

pytest.importorskip("peft")


@pytest.mark.parametrize("name", ROWS)
def test_gradients_merge_and_reload(name, tmp_path):
    row = ROWS[name]
    model = row.build()
    paths = train(model, row.adapted, tmp_path)
    adapters = {task: read_adapter(path, name=task) for task, path in paths.items()}
    updates = {task: adapter.canonical() for task, adapter in adapters.items()}
    batches = {task: row.inputs(i) for i, task in enumerate(RANKS)}
    targets = target_modules(model, updates, NSCParameters())
    assert len(targets) == row.targets

    expected = leaves(adapters["a"].modules)
    loss = eager(model, merged_weights(model, adapters, expected), adapters, batches, targets, row.masks)
    loss.backward()
    value, coefficients = second_step(model, updates, batches, targets)
    assert value == pytest.approx(loss.item(), rel=1e-9)
    check_gradients(coefficients, expected)

    result = merge_adapters(
        model,
        paths,
        {task: [batch] for task, batch in batches.items()},
        parameters={"steps": 1, "learning_rate": 0.1, "granularity": "module"},
        base_name=name,
    )
    assert all((c - 0.4).abs().max() < 0.11 for c in result.coefficients.values())
    result.save_pretrained(tmp_path / "out", dtype=torch.float64)
    table = {m: dict(zip(result.stack_tasks[m], c, strict=True)) for m, c in result.coefficients.items()}
    merged = with_weights(model, merged_weights(model, adapters, table))
    check_reload(row.build(), tmp_path / "out", merged, model, batches["a"])
