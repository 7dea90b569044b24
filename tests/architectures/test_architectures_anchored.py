"""Merges by agreement with the adapters alone, on every architecture."""

from types import SimpleNamespace

import pytest
import torch
from architecture_checks import train
from architecture_rows import ROWS, text

from nsc_fast import methods, read_adapter
from nsc_fast.errors import MergeError
from nsc_fast.methods import MergeInputs, anchored, auto, closed_form
from nsc_fast.objectives.anchors import anchors
from nsc_fast.objectives.least_squares import second_moments
from nsc_fast.objectives.running import adapted, evaluating, watched
from nsc_fast.objectives.score import score
from nsc_fast.objectives.states import states
from nsc_fast.targets import tokens_of


def job(name, folder):
    """Model, updates, and three batches of two rows for each of two tasks."""
    row = ROWS[name]
    model = row.build()
    adapters = {t: read_adapter(f, name=t) for t, f in train(model, row.adapted, folder).items()}
    updates = {task: adapter.canonical() for task, adapter in adapters.items()}
    data = {task: [row.inputs(3 * k + i) for i in range(3)] for k, task in enumerate(updates)}
    return MergeInputs(updates=updates, model=model, data=data)


@pytest.mark.parametrize("name", ROWS)
def test_auto_chooses(name, tmp_path):
    inputs = job(name, tmp_path)
    result = auto.METHOD.run(
        inputs, auto.Parameters(scales=(0.2, 0.5), data_free=("iso_c",), anchored_steps=2, margin=10.0)
    )
    (notice,) = [n for n in result.notices if n.startswith("auto chose ")]
    assert " among 7 merges" in notice and set(result.updates) == {
        m for u in inputs.updates.values() for m in u
    }


@pytest.mark.parametrize("name", ROWS)
def test_the_distance_falls_and_joined_or_not_it_is_the_same(name, tmp_path):
    inputs = job(name, tmp_path)
    model, updates, data = inputs.model, inputs.updates, inputs.data

    def run(**parameters):
        how = {"steps": 12, "learning_rate": 0.01, "signal_rows": 0, **parameters}
        return anchored.METHOD.run(inputs, anchored.Parameters(**how))

    joined, apart = run(), run(batching="never")
    for a, b in zip(joined.history, apart.history, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
    fixed = anchors(model, updates, data)
    arithmetic = methods.get("task_arithmetic")
    start = arithmetic.run(inputs, arithmetic.parameters(scaling=0.4))
    assert score(model, joined.updates, fixed).mean < 0.98 * score(model, start.updates, fixed).mean


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_a_task_of_texts_alone_leaves_the_vision_tower_to_the_others(name, tmp_path):
    inputs = job(name, tmp_path)
    without, other = inputs.tasks
    inputs.data[without] = [text(50 + i) for i in range(3)]
    closed = closed_form.METHOD.run(inputs, closed_form.Parameters(ridge=0.0))
    towers = [m for m in closed.updates if tokens_of(m) == "other"]
    assert towers
    moments = second_moments(inputs.model, inputs.updates, inputs.data)
    for module in towers:
        assert list(moments.values[module]) == [other]
        got, own = closed.updates[module].dense(), inputs.updates[other][module].dense()
        z = inputs_at(inputs, module, other)
        assert (z @ (got - own).T).abs().max() < 1e-6 * (z @ own.T).abs().max()
    result = auto.METHOD.run(
        inputs, auto.Parameters(scales=(0.2, 0.5), data_free=("iso_c",), anchored_steps=2, margin=10.0)
    )
    assert set(towers) < set(result.updates)


def inputs_at(inputs, module, task):
    """Activations of a task at a module under its own adapter, ``(N, d_in)``."""
    seen = []
    own = inputs.updates[task]

    def see(module, z, y):
        seen.append(z.reshape(-1, z.shape[-1]))

    with evaluating(inputs.model), adapted(inputs.model, own), watched(inputs.model, [module], see):
        for batch in inputs.data[task]:
            inputs.model(**batch)
    return torch.cat(seen)


def test_a_pair_of_encoders_needs_pairs():
    both = SimpleNamespace(image_embeds=torch.ones(2, 3), text_embeds=torch.ones(4, 3))
    with pytest.raises(MergeError, match="a batch has 2 images and 4 texts; give batches of pairs"):
        states(both)
    both.text_embeds = torch.zeros(2, 3)
    assert states(both).tolist() == [[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]] * 2


@pytest.mark.parametrize(
    ("name", "stack"),
    [("t5", "decoder.block"), ("llama", "model.layers"), ("llava", "model.language_model.layers")],
)
def test_waypoints_are_in_the_stack_whose_states_come_out(name, stack, tmp_path):
    inputs = job(name, tmp_path)
    fixed = anchors(inputs.model, inputs.updates, inputs.data, waypoints=True)
    found = {block.rpartition(".")[0] for own in fixed.values() for block in own.directions}
    assert found == {stack}


def test_embeddings_of_a_pair_of_encoders_have_no_waypoints(tmp_path):
    inputs = job("clip", tmp_path)
    fixed = anchors(inputs.model, inputs.updates, inputs.data, waypoints=True)
    assert not any(own.directions for own in fixed.values())
