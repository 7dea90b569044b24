import json
from dataclasses import replace

import pytest
import torch
from compare import error
from test_checkpointing import Case
from tiny import canonical_adapters, linear_names, random_adapters, tiny_llama, token_batch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from bench import plan as readme
from nsc_fast.cli import app
from nsc_fast.errors import MergeError
from nsc_fast.footprint import FakeMerge, Operations
from nsc_fast.layers import install
from nsc_fast.memory import LiveBytes, checkpointed
from nsc_fast.monitor import TokenBatch
from nsc_fast.objectives.anchored import AnchoredObjective
from nsc_fast.objectives.anchors import anchors
from nsc_fast.objectives.waypoints import DIRECTIONS
from nsc_fast.ops import merged_linear, torch_steps
from nsc_fast.planner import RESERVE, Choice, Plan
from nsc_fast.recipe import make_recipe
from nsc_fast.targets import select_targets
from nsc_fast.workload import Workload, workload

ENDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TASKS, RANK = 3, 4


def small_llama(device="cpu", blocks=6, vocabulary=60):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=512,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).eval()


def names_of(model):
    return linear_names(model, ENDS)


def measured(recompute, rows, length, masked=True):
    """Bytes kept, bytes at the peak, and operations of one pass on real tensors, with all blocks."""
    from nsc_fast.driver import Driver

    model = small_llama()
    names = names_of(model)
    raw = random_adapters(model, names, {f"t{k}": RANK for k in range(TASKS)})
    installation = install(model, canonical_adapters(raw), targets=select_targets(names))
    driver = Driver(model, installation)
    batch = token_batch(rows, length, seed=0, padding=1)
    if not masked:
        del batch["attention_mask"]
    tasks = torch.zeros(rows, length, dtype=torch.int64)
    driver.look(batch, TokenBatch(tasks))
    fixed = [*model.parameters(), *model.buffers(), *installation.coefficients.parameters(), tasks]
    with checkpointed(model, installation.modules, recompute):
        with LiveBytes().ignore([*fixed, *batch.values()]) as live, Operations({}, {}) as operations:
            loss = driver.forward(batch, TokenBatch(tasks))
            kept = live.now
            loss.backward()
        installation.monitor.clear()
    return kept, live.peak, operations.total


def counted(recompute, rows, length, masked=True):
    skeleton = small_llama("meta")
    names = names_of(skeleton)
    ranks = {f"t{k}": dict.fromkeys(names, RANK) for k in range(TASKS)}
    return FakeMerge(skeleton, ranks, select_targets(names)).run(rows, length, recompute, masked=masked)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("recompute", ["never", "feed_forward", "always"])
def test_counts_on_fake_tensors_are_those_on_real_ones(recompute, masked):
    kept, peak, operations = measured(recompute, 3, 40, masked)
    found = counted(recompute, 3, 40, masked)
    assert found.kept == pytest.approx(kept, rel=0.05)
    assert found.peak == pytest.approx(peak, rel=0.05)
    assert found.flops == pytest.approx(operations, rel=1e-3)


def test_time_is_in_forward_passes_of_the_base_with_all_blocks():
    model, skeleton = small_llama(), small_llama("meta")
    batch = token_batch(3, 40, seed=0, padding=1)
    with torch.no_grad(), Operations({}, {}) as operations:
        model.model(**batch, use_cache=False)
    ranks = {"t": dict.fromkeys(names_of(model), RANK)}
    fake = FakeMerge(skeleton, ranks, select_targets(names_of(model)))
    assert fake.base_flops(3, 40) == pytest.approx(operations.total, rel=1e-3)


def anchored_step(recompute, length, *, masked=True, waypoints=False):
    """Anchors of one task, and the bytes at the peak of a step with them, which are not counted."""
    model = small_llama()
    names = names_of(model)
    updates = canonical_adapters(random_adapters(model, names, {f"t{k}": RANK for k in range(TASKS)}))
    batch = token_batch(3, length, seed=0, padding=1 if masked else 0)
    if not masked:
        del batch["attention_mask"]
    fixed = anchors(model, {"t0": updates["t0"]}, {"t0": [batch]}, waypoints=waypoints)["t0"]
    installation = install(model, updates, granularity="core")
    objective = AnchoredObjective(model, installation, {"t0": fixed})
    (anchor,) = fixed.batches
    objective.losses({"t0": anchor})
    held = [*model.parameters(), *model.buffers(), *installation.coefficients.parameters()]
    held += [p.grad for p in installation.coefficients.parameters()]
    held += [*batch.values(), anchor.states, anchor.keep, *anchor.way.values()]
    held += [*(w.root for w in fixed.metrics), *fixed.directions.values()]
    with checkpointed(model, installation.modules, recompute), LiveBytes().ignore(held) as live:
        objective.losses({"t0": anchor})
    return fixed, live.peak


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("recompute", ["never", "always"])
def test_counts_of_anchored_merging_are_those_on_real_tensors(recompute, masked):
    _, peak = anchored_step(recompute, 40, masked=masked)
    skeleton = small_llama("meta")
    ranks = {f"t{k}": dict.fromkeys(names_of(skeleton), RANK) for k in range(TASKS)}
    found = FakeMerge(skeleton, ranks, (), "core", objective="states").run(3, 40, recompute, masked=masked)
    assert found.peak == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("recompute", ["never", "always"])
def test_waypoints_are_in_the_plan(recompute):
    """On the device what their distances keep, in the host's memory what the anchors do."""
    fixed, peak = anchored_step(recompute, 64, waypoints=True)
    with_them, without = (
        Plan(replace(small_work(), granularity="core", objective="states", anchors=256, waypoints=n), 10**12)
        for n in (len(fixed.directions), 0)
    )
    choice = Choice(recompute, False, 3, False)
    assert with_them.need(choice).device - with_them.fixed == pytest.approx(peak, rel=0.1)
    (anchor,) = fixed.batches
    each = sum(w.numel() * w.element_size() for w in anchor.way.values()) / len(anchor.states)
    host = with_them.need(choice).host - without.need(choice).host
    assert host == pytest.approx(TASKS * 256 * 64 * each, rel=0.05)


@pytest.mark.parametrize("recompute", ["never", "always"])
def test_plan_extrapolates_to_other_sizes(recompute):
    plan = Plan(small_work(), 10**12)
    need = plan.need(Choice(recompute, False, 2, True), 48)
    _, peak, _ = measured(recompute, 2 * TASKS, 48)
    assert need.device - plan.fixed == pytest.approx(peak, rel=0.1)


def small_work(rows=4, length=64):
    skeleton = small_llama("meta")
    names = names_of(skeleton)
    ranks = {f"t{k}": dict.fromkeys(names, RANK) for k in range(TASKS)}
    weights = 4 * sum(p.numel() for p in skeleton.parameters())
    return Workload(skeleton, ranks, select_targets(names), weights, 1000, rows, length)


def test_factors_and_weights_are_those_of_the_installed_model():
    work = small_work()
    expected = sum(
        TASKS * RANK * sum(m.weight.shape)
        for name, m in work.skeleton.named_modules()
        if isinstance(m, nn.Linear) and name.endswith(ENDS)
    )
    assert work.factor_numbers == expected
    assert Plan(work, 1).fixed == work.weight_bytes + 4 * expected + RESERVE


def test_a_smaller_budget_recomputes_more_and_takes_smaller_parts():
    plan = Plan(small_work(), 10**12)
    assert plan.chosen == Choice("never", False, 4, True)
    order = list(plan.choices())
    needs = {choice: plan.need(choice) for choice in order}
    smallest = min(needs.values(), key=lambda n: n.device).device
    for choice, need in needs.items():
        plan.__dict__.pop("chosen", None)
        plan.budget = need.device
        assert order.index(plan.chosen) <= order.index(choice)
        assert needs[plan.chosen].device <= plan.budget
    assert needs[Choice("always", True, 1, False)].device == smallest
    time = [needs[Choice(kind, False, 1, False)].time for kind in ("never", "always")]
    assert 1.5 < time[0] < time[1] < time[0] + 1.6


def test_a_budget_that_nothing_fits_says_the_smallest_need():
    plan = Plan(small_work(), RESERVE)
    with pytest.raises(MergeError, match="nothing fits into 1 GB: the smallest need is 1 GB"):
        plan.chosen  # noqa: B018
    assert plan.longest("never", False) == 0


def test_longest_sequence_is_the_last_that_fits():
    plan = Plan(small_work(), RESERVE + 10**8)
    for kind in ("never", "always"):
        longest = plan.longest(kind, False)
        assert (
            plan.need(Choice(kind), longest).device
            <= plan.budget
            < plan.need(Choice(kind), longest + 1).device
        )
    assert plan.longest("always", False) > 2 * plan.longest("never", False)


def test_nothing_of_the_size_of_the_vocabulary_is_made():
    case = Case()
    tokens, vocabulary = 3 * 2 * 30, 5000
    from nsc_fast.driver import Driver

    model = small_llama(blocks=2, vocabulary=vocabulary)
    raw = random_adapters(model, names_of(model), {t: 2 for t in case.batches})
    installation = install(
        model,
        canonical_adapters(raw),
        targets=select_targets(names_of(model)),
    )
    driver = Driver(model, installation)
    batches = {t: token_batch(2, 30, k, vocabulary=vocabulary) for k, t in enumerate(case.batches)}
    for _ in range(2):
        with LiveBytes() as live:
            driver.losses(batches)
        # The widest activation is that of the feed-forward part; the mask of padding is tokens x length.
        assert 0 < live.largest <= tokens * 192 < tokens * vocabulary


@pytest.mark.parametrize("bias", [False, True])
def test_half_precision_is_lifted_block_by_block(monkeypatch, bias):
    n, d, block = 512, 256, 64
    monkeypatch.setattr(torch_steps, "_BLOCK_BYTES", 4 * block * d)
    wide = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            wide.extend(t.numel() for t in tree_leaves(out) if getattr(t, "dtype", None) == torch.float32)
            return out

    z = torch.randn(n, d).bfloat16().requires_grad_()
    weight, offset = torch.randn(d, d).bfloat16(), torch.randn(d).bfloat16() if bias else None
    basis = torch.linalg.qr(torch.randn(d, 4)).Q.T
    columns, segment = torch.randn(d, 4), torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    coefficients = torch.full((2,), 0.4, requires_grad=True)
    task = torch.zeros(n, dtype=torch.int32)
    factors = basis, columns, segment, coefficients
    with Watch():
        y, omega, _ = merged_linear(z, weight, offset, *factors, num_tasks=2, task=task, impl="torch")
        (y.sum() + omega.sum()).backward()
    assert max(wide) == block * d
    want = (z.float() @ weight.float().T) + ((z.float() @ basis.T) * 0.4) @ columns.T
    if bias:
        want = want + offset.float()
    assert error(y.float(), want) < 1e-2


def test_peak_grows_with_the_tokens():
    for recompute in ("never", "always"):
        peaks = [measured(recompute, 2, length, masked=False)[1] for length in (32, 128)]
        assert 3.6 <= peaks[1] / peaks[0] <= 4.4


def test_readme_table_is_the_planners():
    text = readme.README.read_text(encoding="utf-8")
    stands = text.split(readme.BEGIN)[1].split(readme.END)[0].strip()
    assert stands == readme.markdown()
    assert "not measured" in stands


@pytest.fixture
def recipe(tmp_path):
    """A recipe over real files: a base model's config, two adapters, data."""
    import peft

    base = tiny_llama(torch.float32)
    base.save_pretrained(tmp_path / "base")
    adapters = []
    for k in range(2):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(tiny_llama(torch.float32), config)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / f"a{k}")
        (tmp_path / f"d{k}.jsonl").write_text(json.dumps({"text": "one row"}) + "\n")
        adapters.append(
            {
                "name": f"t{k}",
                "path": str(tmp_path / f"a{k}"),
                "data": {"path": str(tmp_path / f"d{k}.jsonl"), "batch_size": 4, "max_length": 32},
            }
        )
    return {"base_model": str(tmp_path / "base"), "adapters": adapters}


def merge(tmp_path, recipe, *options):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe))
    return CliRunner().invoke(app, ["merge", str(file), "--dry-run", "--device", "cuda", *options])


def test_dry_run_prints_the_plan(tmp_path, recipe):
    done = merge(tmp_path, recipe, "--max-memory", "24GB")
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    assert "plan: 4 sequences of each task in a pass, no part computed again" in words
    assert "computed, not measured" in words


@pytest.mark.parametrize(("method", "merges"), [("auto", 3), ("anchored", 0)])
def test_methods_that_compare_states_are_planned(tmp_path, recipe, method, merges):
    done = merge(tmp_path, {**recipe, "merge_method": method}, "--max-memory", "24GB")
    assert done.exit_code == 0, done.output
    assert "plan: 4 sequences of each task in a pass" in " ".join(done.output.split())
    work = workload(make_recipe({**recipe, "merge_method": method}, where="test"))
    assert (work.targets, work.granularity, work.anchors, work.merges) == ((), "core", 256, merges)
    assert work.core_numbers == len(work.ranks["t0"]) * 4**2
    config = work.skeleton.config
    assert work.waypoints == config.num_hidden_layers - 1
    # States of 256 rows of 32 tokens, the last ones and on the way, token ids and masks of as many, and what
    # 'auto' finds in closed form.
    states = 4 * (config.hidden_size + work.waypoints * min(DIRECTIONS, 2 * config.hidden_size))
    more = 2 * 256 * 32 * (states + 2 * 8) + bool(merges) * work.moments[1]
    plan = Plan(work, 24 * 10**9)
    assert plan.need(Choice(), 32).host == pytest.approx(
        work.adapter_bytes + max(work.weight_bytes, (16 + 8 * merges) * work.factor_numbers) + more
    )


def test_a_method_whose_memory_is_not_planned(tmp_path, recipe):
    done = merge(tmp_path, {**recipe, "merge_method": "adamerging"}, "--max-memory", "24GB")
    assert done.exit_code == 3
    said = "memory is planned for methods 'nsc', 'anchored', 'auto', 'closed_form', not 'adamerging'"
    assert said in " ".join(done.output.split())


def test_a_plan_needs_data(recipe):
    for adapter in recipe["adapters"]:
        del adapter["data"]
    with pytest.raises(MergeError, match="without data, which 'nsc' needs"):
        workload(make_recipe(recipe, where="test"))


@pytest.mark.parametrize("recompute", ["never", "always"])
def test_every_block_that_runs_keeps_something(recompute):
    for layers, ran in (("last_quarter", 6), ("2", 3), ("all", 6)):
        skeleton = small_llama("meta")
        names = names_of(skeleton)
        ranks = {"t0": dict.fromkeys(names, RANK)}
        targets = select_targets(names, layers=layers)
        counted = FakeMerge(skeleton, ranks, targets).run(2, 16, recompute)
        assert sum(count for count, _ in counted.blocks.values()) == ran
        assert all(size > 0 for _, size in counted.blocks.values()), counted.blocks


def test_dry_run_names_blocks_in_words(tmp_path, recipe):
    words = " ".join(merge(tmp_path, recipe, "--max-memory", "24GB").output.split())
    assert " keeps " in words and "and 0 more" not in words and "-" not in words.split("keeps", 1)[1][:20]


def test_quantised_base_takes_less(tmp_path, recipe):
    plain = workload(make_recipe(recipe, where="test"))
    linear = [m.weight.numel() for m in plain.skeleton.model.modules() if isinstance(m, nn.Linear)]
    assert plain.weight_bytes == 4 * sum(p.numel() for p in plain.skeleton.parameters())
    base = {"path": recipe["base_model"], "load_in_4bit": True}
    packed = workload(make_recipe({**recipe, "base_model": base}, where="test"))
    saved = plain.weight_bytes - packed.weight_bytes
    assert saved == pytest.approx((4 - 0.5625) * sum(linear) - 4 * max(linear), abs=1)


def test_base_whose_files_are_quantised_is_refused(tmp_path, recipe):
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(MergeError, match="quantised by gptq"):
        workload(make_recipe(recipe, where="test"))


def test_dry_run_with_a_budget_that_nothing_fits(tmp_path, recipe):
    done = merge(tmp_path, recipe, "--max-memory", "900MB")
    assert done.exit_code == 3
    assert "the smallest need is 1 GB" in " ".join(done.output.split())
    assert merge(tmp_path, recipe, "--max-memory", "lots").exit_code == 3


def test_dry_run_with_sequences_beyond_the_positions(tmp_path, recipe):
    recipe["adapters"][1]["data"]["max_length"] = 65
    done = merge(tmp_path, recipe, "--max-memory", "24GB")
    assert done.exit_code == 3
    assert "'t1': sequences of up to 65 tokens are longer than the 64 positions" in " ".join(
        done.output.split()
    )
