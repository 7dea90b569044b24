"""Every common architecture: gradients, a merge, and what PEFT makes of the written folder."""

from contextlib import nullcontext

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
from nsc_fast.saved import compact_saved

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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ROWS)
def test_what_is_kept_in_its_smaller_form_changes_no_bit(name, dtype, tmp_path):
    row = ROWS[name]
    model = row.build(dtype)
    paths = train(model, row.adapted, tmp_path)
    updates = {task: read_adapter(path, name=task).canonical() for task, path in paths.items()}
    batches = {
        task: {k: v.to(dtype) if v.is_floating_point() else v for k, v in row.inputs(i).items()}
        for i, task in enumerate(RANKS)
    }
    targets = target_modules(model, updates, NSCParameters(scope={"layers": "all"}))
    found = []
    for forms in (nullcontext, compact_saved):
        with forms():
            value, coefficients = second_step(model, updates, batches, targets)
        grads = [p.grad for p in coefficients.parameters() if p.grad is not None]
        found.append((value, torch.cat([g.flatten() for g in grads])))
    (value, grads), (same, own) = found
    assert own.abs().max() > 0 and value == same and torch.equal(grads, own)
