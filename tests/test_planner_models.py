"""Plans for models with an encoder and a decoder, with images, and for second moments."""

import json

import pytest
import torch
from tiny import canonical_adapters, linear_names, random_adapters
from typer.testing import CliRunner

from nsc_fast import footprint
from nsc_fast.batches import token_batch
from nsc_fast.cli import app
from nsc_fast.driver import Driver
from nsc_fast.errors import MergeError
from nsc_fast.footprint import FakeMerge
from nsc_fast.layers import install, stack_adapters
from nsc_fast.memory import LiveBytes, blocks_of, checkpointed
from nsc_fast.objectives.anchored import AnchoredObjective
from nsc_fast.objectives.anchors import anchors
from nsc_fast.objectives.least_squares import second_moments
from nsc_fast.planner import Choice, Plan
from nsc_fast.recipe import make_recipe
from nsc_fast.row_inputs import RowInputs
from nsc_fast.targets import select_targets
from nsc_fast.workload import Workload, workload

TASKS, RANK, IMAGE = 3, 4, 59
ATTENTION = ("q_proj", "k_proj", "v_proj", "fc1", "fc2")
BLOCKS = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4}
VISION = {**BLOCKS, "image_size": 32, "patch_size": 8}
WORDS = {**BLOCKS, "vocab_size": 60, "max_position_embeddings": 128, "eos_token_id": 2, "pad_token_id": 0}
BOTH_SIDES = {
    **{f"{side}_layers": 4 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 96 for side in ("encoder", "decoder")},
    **{"d_model": 64, "vocab_size": 60, "max_position_embeddings": 128},
}
T5 = {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 4, "num_heads": 4, "vocab_size": 60}
PIXELS = {"pixel_values": ((1, 3, 32, 32), torch.float32)}
# Class, config, adapted modules, inputs of a row, tokens of a row.
MODELS = {
    "t5": ("T5ForConditionalGeneration", T5, ("q", "v", "wo"), RowInputs(decoder=1), 40),
    "bart": ("BartForConditionalGeneration", BOTH_SIDES, ATTENTION, RowInputs(decoder=1), 40),
    "classifying bart": ("BartForSequenceClassification", BOTH_SIDES, ATTENTION, RowInputs(decoder=-1), 40),
    "vit": ("ViTForImageClassification", VISION, ATTENTION, RowInputs((), images=PIXELS), 0),
    "dinov2": ("Dinov2ForImageClassification", VISION, ATTENTION, RowInputs((), images=PIXELS), 0),
    "clip": (
        "CLIPModel",
        {"text_config": WORDS, "vision_config": VISION, "projection_dim": 16},
        ATTENTION,
        RowInputs(images=PIXELS),
        20,
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {**WORDS, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "image_token_id": IMAGE,
        },
        ("q_proj", "v_proj", "down_proj", "fc1"),
        RowInputs(images=PIXELS, image_tokens=17),
        40,
    ),
}


def build(name, device="cpu"):
    import transformers

    torch.manual_seed(1)
    kind = getattr(transformers, MODELS[name][0])
    with torch.device(device):
        return kind(kind.config_class(**MODELS[name][1])).eval()


def adapted(name, model, blind):
    """Modules that are adapted; ``blind``: none that sees images."""
    names = linear_names(model, MODELS[name][2])
    return [m for m in names if "vision" not in m] if blind else names


def real(name, rows):
    """Inputs of the kind that is planned for, with values."""
    inputs, length = MODELS[name][3:]
    batch = inputs.batch(rows, length)
    if "input_ids" in batch:
        batch["input_ids"] = torch.randint(3, IMAGE, (rows, length))
        batch["input_ids"][:, -2] = 2
        batch["attention_mask"][0, -1] = 0
    if inputs.image_tokens:
        batch["input_ids"][:, 1 : inputs.image_tokens] = IMAGE
    if inputs.decoder < 0:
        # Such a model makes them.
        del batch["decoder_input_ids"]
    return {k: v if v.dtype == torch.int64 else torch.randn(v.shape) for k, v in batch.items()}


def updates_of(name, model, blind):
    ranks = {f"t{k}": RANK for k in range(TASKS)}
    return canonical_adapters(random_adapters(model, adapted(name, model, blind), ranks))


def measured(name, rows, objective, recompute, blind):
    """Bytes at the peak of one pass on real tensors."""
    model, driver = build(name), None
    updates, batch = updates_of(name, model, blind), real(name, rows)
    if objective == "states":
        fixed = anchors(model, {"t0": updates["t0"]}, {"t0": [batch]})
        installation = install(model, updates, granularity="core")
        step = {"t0": fixed["t0"].batches[0]}
        driver = AnchoredObjective(model, installation, fixed)
        driver.losses(step)
        held = [p.grad for p in installation.coefficients.parameters()]
        held += [step["t0"].states, step["t0"].keep, *(w.root for w in fixed["t0"].metrics)]
    else:
        targets = select_targets(adapted(name, model, blind))
        installation = install(model, updates, targets=targets)
        driver, tokens = Driver(model, installation), token_batch(batch, 0, torch.device("cpu"))
        driver.look(batch, tokens)
        held = [tokens.task]
    held += [*model.parameters(), *model.buffers(), *installation.coefficients.parameters()]
    with checkpointed(model, installation.modules, recompute):
        with LiveBytes().ignore([*held, *batch.values()]) as live:
            if objective == "states":
                driver.losses(step)
            else:
                driver.forward(batch, tokens).backward()
                installation.monitor.clear()
    return live.peak


def planned_for(name, objective, blind):
    skeleton = build(name, "meta")
    names = adapted(name, skeleton, blind)
    ranks = {f"t{k}": dict.fromkeys(names, RANK) for k in range(TASKS)}
    targets = select_targets(names) if objective == "ratio" else ()
    more = {"objective": objective, "inputs": MODELS[name][3]}
    return skeleton, ranks, targets, {"granularity": "core" if objective == "states" else "layer", **more}


@pytest.mark.parametrize(
    ("name", "objective", "recompute", "blind"),
    [
        *((name, "ratio", "never", False) for name in MODELS),
        *((name, "ratio", "always", False) for name in ("t5", "vit", "llava")),
        *((name, "states", "never", False) for name in ("t5", "vit", "clip")),
        *(("llava", *more, True) for more in (("ratio", "never"), ("states", "always"))),
    ],
)
def test_counts_are_those_on_real_tensors(name, objective, recompute, blind):
    skeleton, ranks, targets, more = planned_for(name, objective, blind)
    found = FakeMerge(skeleton, ranks, targets, **more).run(3, MODELS[name][4], recompute)
    assert found.peak == pytest.approx(measured(name, 3, objective, recompute, blind), rel=0.05)


@pytest.mark.parametrize(
    ("name", "recompute"),
    [("t5", "never"), ("t5", "always"), ("vit", "never"), ("llava", "feed_forward"), ("llava", "always")],
)
def test_a_block_stands_for_all_of_its_kind(monkeypatch, name, recompute):
    """In half precision a norm keeps its input in float32, and the input itself is gone with the block."""

    def run():
        skeleton, ranks, targets, more = planned_for(name, "ratio", False)
        found = FakeMerge(skeleton.bfloat16(), ranks, targets, **more).run(3, MODELS[name][4], recompute)
        return found.kept, found.peak, len(found.blocks)

    def whole(model, ranks, targets):
        modules = list(dict.fromkeys(m for own in ranks.values() for m in own))
        return {path: (path, 1) for path in blocks_of(model, modules)}, {m: m for m in modules}

    short = run()
    monkeypatch.setattr(footprint, "shorten", whole)
    full = run()
    assert short[0] == full[0] and short[2] < full[2]
    assert short[1] == pytest.approx(full[1], rel=2e-3)


@pytest.mark.parametrize("name", ["t5", "vit", "llava", "clip"])
def test_counts_of_moments_are_those_on_real_tensors(name):
    model = build(name)
    updates, batch = updates_of(name, model, True), real(name, 3)
    with LiveBytes().ignore([*model.parameters(), *model.buffers(), *batch.values()]) as live:
        # The factors of a module come when it first runs: in the second pass all are there.
        second_moments(model, updates, {task: [batch, batch] for task in updates})
    skeleton, ranks, _, more = planned_for(name, "moments", True)
    work = Workload(skeleton, ranks, (), 0, 0, 3, MODELS[name][4], **more)
    numbers, (device, host) = work.factor_numbers, work.moments
    passing = FakeMerge(skeleton, ranks, **more).run(3, MODELS[name][4]).peak
    # Beside them the stacked factors in float64, and the moments of the tasks before the last.
    expected = 8 * numbers + device + host * (TASKS - 1) // TASKS + passing
    assert expected == pytest.approx(live.peak, rel=0.05)
    assert numbers == sum(
        u.columns.numel() + u.basis.numel() for own in updates.values() for u in own.values()
    )
    assert device == 4 * sum(
        s.basis.numel() + s.columns.numel() // TASKS + 2 * sum(s.ranks) ** 2
        for s in stack_adapters(updates).values()
    )


@pytest.mark.parametrize(("name", "rows", "length"), [("t5", 3, 90), ("vit", 7, 0), ("llava", 3, 30)])
def test_plan_extrapolates(monkeypatch, name, rows, length):
    skeleton, ranks, targets, more = planned_for(name, "ratio", False)
    plan = Plan(Workload(skeleton, ranks, targets, 0, 0, 3, MODELS[name][4], **more), 10**12)
    need = plan.need(Choice("never", False, rows, False), length)
    monkeypatch.setitem(MODELS, name, (*MODELS[name][:4], length))
    assert need.device - plan.fixed == pytest.approx(measured(name, rows, "ratio", "never", False), rel=0.05)


def test_what_cannot_be_divided_is_not():
    skeleton, ranks, targets, more = planned_for("t5", "ratio", False)
    plan = Plan(Workload(skeleton, ranks, targets, 0, 0, 8, 40, **more), 10**12)
    assert {c.micro_batch for c in plan.choices()} == {8}
    assert {c.together for c in plan.choices()} == {True, False}
    plan.budget = 1
    with pytest.raises(MergeError, match="set data.max_length below 40, set a smaller data.batch_size"):
        plan.chosen  # noqa: B018


def test_images_have_no_longest_row():
    skeleton, ranks, targets, more = planned_for("vit", "ratio", False)
    plan = Plan(Workload(skeleton, ranks, targets, 0, 0, 8, 0, **more, alike=False), 10**12)
    assert {longest for *_, longest in plan.table()} == {None} and plan.unit == "row"
    assert [c for c in plan.choices()][:2] == [Choice("never", False, k, False) for k in (8, 4)]
    plan.budget = 1
    with pytest.raises(MergeError, match="Give more memory, or load the base in a smaller dtype"):
        plan.chosen  # noqa: B018


@pytest.fixture
def recipe(tmp_path):
    """Makes a recipe over real files from a model: its config, two adapters, data of texts."""
    import peft

    def make(name, task_type=None, **more):
        model = build(name)
        model.save_pretrained(tmp_path / "base")
        (tmp_path / "d.jsonl").write_text(json.dumps({"text": "one row"}) + "\n")
        adapters = []
        for k in range(2):
            lora = peft.LoraConfig(r=2, target_modules=list(MODELS[name][2]), task_type=task_type)
            adapted = peft.get_peft_model(build(name), lora)
            adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
            adapted.save_pretrained(tmp_path / f"a{k}")
            data = {"path": str(tmp_path / "d.jsonl"), "batch_size": 4, "max_length": 32}
            adapters.append({"name": f"t{k}", "path": str(tmp_path / f"a{k}"), "data": data})
        return {"base_model": str(tmp_path / "base"), "adapters": adapters, **more}

    return make


def plan_of(tmp_path, recipe):
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    options = ["--dry-run", "--device", "cuda", "--max-memory", "24GB"]
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "recipe.json"), *options])
    return done.exit_code, " ".join(done.output.split())


def test_texts_for_an_encoder_and_a_decoder(tmp_path, recipe):
    made = recipe("t5", "SEQ_2_SEQ_LM")
    code, said = plan_of(tmp_path, made)
    assert code == 0, said
    assert "plan: 4 sequences of each task in a pass, no part computed again" in said
    work = workload(make_recipe(made, where="test"))
    assert (work.inputs, work.length, work.limit) == (RowInputs(decoder=1), 32, None)
    assert work.data_bytes == 2 * 256 * 32 * 16


def test_a_classifier_makes_the_inputs_of_its_decoder(recipe):
    made = recipe("classifying bart", "SEQ_CLS")
    work = workload(make_recipe(made, where="test"))
    assert (work.inputs, work.limit) == (RowInputs(decoder=-1), 128)
    made["adapters"][0]["data"]["max_length"] = 129
    with pytest.raises(MergeError, match="'t0': sequences of up to 129 tokens are longer than the 128"):
        workload(make_recipe(made, where="test"))


def test_the_closed_form_gets_no_parameter_that_it_lacks(tmp_path, recipe):
    made = recipe("t5", "SEQ_2_SEQ_LM", merge_method="closed_form")
    code, said = plan_of(tmp_path, made)
    assert code == 0, said
    assert "plan: 4 sequences of one task in a pass, no part computed again" in said
    work = workload(make_recipe(made, where="test"))
    assert (work.objective, work.merges, work.core_numbers) == ("moments", 1, 0)
    plan = Plan(work, 24 * 10**9)
    settings = plan.chosen.settings(work.objective)
    assert settings == {"micro_batch": 4}
    make_recipe({**made, "parameters": settings}, where="test").method_parameters()
    assert {choice.recompute for choice in plan.choices()} == {"never"}
    factors = max(work.weight_bytes, 24 * work.factor_numbers)
    assert plan.need(plan.chosen).host == work.adapter_bytes + work.data_bytes + work.moments[1] + factors


def test_shapes_that_depend_on_values_are_refused(monkeypatch):
    words = {**WORDS, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 64, "num_heads": 2, "patch_size": 4}
    ids = {f"{name}_token_id": 58 - k for k, name in enumerate(("video", "vision_start", "vision_end"))}
    config = {"text_config": words, "vision_config": vision, "image_token_id": IMAGE, **ids}
    patches = {"pixel_values": ((16, 96), torch.float32), "image_grid_thw": ((1, 3), torch.int64)}
    row = ("Qwen2VLForConditionalGeneration", config, ("q_proj",), RowInputs(images=patches), 20)
    monkeypatch.setitem(MODELS, "qwen", row)
    skeleton, ranks, targets, more = planned_for("qwen", "ratio", True)
    with pytest.raises(MergeError, match="Qwen2VLForConditionalGeneration, whose shapes depend on values"):
        FakeMerge(skeleton, ranks, targets, **more).run(2, 20)


@pytest.mark.parametrize("layer", [4, [1, 5]])
def test_states_that_are_selected_by_number_are_refused(monkeypatch, layer):
    """A block stands for all of its kind, so that there are fewer."""
    name, config, *more = MODELS["llava"]
    monkeypatch.setitem(MODELS, "llava", (name, {**config, "vision_feature_layer": layer}, *more))
    skeleton, ranks, targets, options = planned_for("llava", "states", False)
    with pytest.raises(
        MergeError, match="LlavaForConditionalGeneration, which selects states of blocks by number"
    ):
        FakeMerge(skeleton, ranks, targets, **options).run(2, 40)
    # A tower that nobody adapts is whole.
    skeleton, ranks, targets, options = planned_for("llava", "states", True)
    assert FakeMerge(skeleton, ranks, targets, **options).run(2, 40).peak


def test_counts_do_not_depend_on_those_before():
    skeleton, ranks, targets, more = planned_for("llava", "ratio", False)
    fresh = FakeMerge(skeleton, ranks, targets, **more).run(3, 40, "always")
    skeleton, ranks, targets, more = planned_for("llava", "ratio", False)
    used = FakeMerge(skeleton, ranks, targets, **more)
    used.run(1, 60, masked=False)
    base = used.base_flops(2, 40)
    used.run(3, 40, "feed_forward")
    assert used.run(3, 40, "always") == fresh
    assert used.base_flops(2, 40) == base and used.run(3, 40, "always") == fresh


def test_other_inputs_than_the_data_give_are_named(tmp_path, recipe, monkeypatch):
    from transformers import WhisperConfig

    sound = {f"{side}_{key}": 1 for side in ("encoder", "decoder") for key in ("layers", "attention_heads")}
    sound |= {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 60}
    config = WhisperConfig(**sound, num_mel_bins=8, pad_token_id=0)
    row = ("WhisperForConditionalGeneration", config.to_dict(), ("q_proj",), RowInputs(), 0)
    monkeypatch.setitem(MODELS, "whisper", row)
    code, said = plan_of(tmp_path, recipe("whisper"))
    assert code == 3
    assert "WhisperForConditionalGeneration needs 'input_features', and the data" in said
    code, said = plan_of(tmp_path, recipe("vit"))
    assert code == 3
    assert "ViTForImageClassification needs 'pixel_values', and the data of the recipe give input_ids" in said
