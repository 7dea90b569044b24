"""Smoke form of the quality benchmark: few steps on the demo's rows, which come with the package.

Mechanics only: adapters of a few steps are worth nothing.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from bench.quality import command, course, phenomenon, run, suites, table, text, train
from bench.quality.base import Suite, Task
from bench.quality.tasks import DATA_VARIABLE, divide
from bench.quality.workshop import UNLABELED_BATCH
from nsc_fast.demo.encoder import MissingBaseModel, encoder_folder
from nsc_fast.demo.evaluate import applied
from nsc_fast.demo.tasks import DATA, read_rows
from nsc_fast.errors import MergeError

STEPS = 6
MIXED, CLASSES = ("emobank", "ewt_pos", "snips"), ("snli", "scitail")


def test_split_rows_are_disjoint_and_repeatable() -> None:
    rows = list(range(1000))
    trained, held_out = divide(rows, "train"), divide(rows, "held_out")
    assert len(held_out) == 200 and sorted(trained + held_out) == rows
    sample = divide(rows, "train", 50, seed=3)
    assert sample == divide(rows, "train", 50, seed=3) != divide(rows, "train", 50, seed=4)
    assert len(sample) == 50 and set(sample) <= set(trained)
    assert divide(rows, "test", 5000) == rows


def test_prefix_mask() -> None:
    types = torch.tensor([[0, 0, 1, 1, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    expected = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert text.prefix_mask(types, mask).tolist() == [[torch.tensor(expected).bool().tolist()]]


def test_rank_correlation() -> None:
    assert phenomenon.spearman([1, 2, 3, 4], [1, 8, 27, 64]) == 1.0
    assert phenomenon.spearman([1, 2, 3], [3, 2, 1]) == -1.0
    assert phenomenon.spearman([1, 1, 2], [5, 5, 5]) is None
    # Ties take the mean rank: 1.5 1.5 3 against 1 2 3.
    assert phenomenon.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.866, abs=1e-4)


def test_cache_inside_the_repository_is_refused() -> None:
    with pytest.raises(MergeError, match="inside the repository"):
        command.cache_folder(Path(__file__).parent / "results" / "adapters")


def test_what_the_user_can_put_right_is_told_without_a_traceback(tmp_path) -> None:
    arguments = ["--suite", "text", "--methods", "nsx", "--out", str(tmp_path / "out.jsonl")]
    with pytest.raises(SystemExit, match="^error: .*'nsx'"):
        command.ended(lambda: run.main(arguments))
    with pytest.raises(SystemExit) as done:
        command.ended(lambda: 3)
    assert done.value.code == 3 and not (tmp_path / "out.jsonl").exists()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(MergeError, match="no suite 'txt'; there are text"):
        suites.suite("txt")
    with pytest.raises(MergeError, match="not JSON"):
        run.parse("mine=nsc:{steps}", text.BASE)


def test_table_of_known_numbers(tmp_path) -> None:
    """Averages and worst over the draws; a task at the share of the commonest class does not count."""
    told = {"kind": "run", "date": "d", "cpu": "c", "threads": 1, "torch": "t", "revision": "v"}
    # The same seed for adapters of another training is a draw of its own.
    lines = [{**told, "run": f"r{training}", "adapter_seed": training} for training in (0, 1)]
    fine_tuned = {"a": 0.8, "b": 0.5, "chance": 0.52}
    shares = {
        ("fine-tuned", 0): (1, 1, 1),
        ("fine-tuned", 1): (1, 1, 1),
        ("mine", 0): (0.9, 0.7, 2.0),
        ("mine", 1): (0.8, 0.6, 0.1),
    }
    for (label, training), values in shares.items():
        for (task, own), share in zip(fine_tuned.items(), values, strict=True):
            lines.append(
                {
                    "run": f"r{training}",
                    "kind": "score",
                    "suite": "s",
                    "label": label,
                    "seed": 3,
                    "task": task,
                    "status": "ok",
                    "metric": "accuracy",
                    "score": share * own,
                    "fine_tuned": own,
                    "normalised": share,
                    "majority": 0.5 if task == "chance" else 0.3,
                    "test_rows": 500,
                    "seconds": {"preparation": 1.0, "optimisation": 2.0, "evaluation": 3.0},
                    "peak_mib": 10.0,
                }
            )
    lines.append(
        {"run": "r0", "kind": "score", "suite": "s", "label": "x", "status": "failed", "reason": "broke"}
    )
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (results,) = table.read([path])
    assert results.at_chance == ["chance"]
    summary = table.summarise(results, "mine")
    assert summary.average == pytest.approx((75.0, 50**0.5))
    assert summary.worst == pytest.approx((65.0, 50**0.5)) and summary.worst_task == "b"
    shown = table.markdown(results)
    assert (
        "| mine | 85.0 ± 7.1 | 65.0 ± 7.1 | 105.0 ± 134.4 | 75.0 ± 7.1 | 65.0 ± 7.1 (b) | 3.0 | 10 |" in shown
    )
    assert "adapters of training 0, 1, seeds 3;" in shown
    for draws in results.scores.values():
        for own in draws.values():
            del own["a"], own["b"]
    assert "| mine | 105.0 ± 134.4 | – | – (no task counts) | 3.0 | 10 |" in table.markdown(results)
    assert "x: failed: broke" in shown and "commonest class: chance." in shown


def _small(name: str) -> Task:
    return replace(suites.task("minilm", name), batch=8, steps=STEPS, max_length=32)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data folder from the demo's rows, small tasks in two suites, checkpoints every three steps."""
    try:
        encoder_folder()
    except MissingBaseModel as missing:
        pytest.skip(str(missing))
    folder = tmp_path_factory.mktemp("quality")
    data = folder / "data"
    data.mkdir()
    sources = {"emobank": "emobank", "ewt_pos": "ewt_pos", "snli": "nli_snli", "scitail": "nli_scitail"}
    for name, stem in sources.items():
        rows = read_rows(DATA / f"{name}.test.jsonl.gz")
        _write(data, stem, rows)
        if name == "emobank":  # any text will do: the answer is its beginning
            frames = [{"text": r["text"], "frame": " ".join(r["text"].lower().split()[:4])} for r in rows]
            _write(data, "snips", frames)
    tasks = {name: _small(name) for name in (*MIXED, *CLASSES)}
    own = (Suite("mixed", "minilm", MIXED, "kinds"), Suite("classes", "minilm", CLASSES, "classes"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DATA_VARIABLE, str(data))
        patch.setattr(suites, "SUITES", own)
        patch.setattr(text, "TASKS", tuple(tasks.values()))
        patch.setattr(text, "BASE", text.TextBase())
        patch.setattr(text, "ANSWER", 6)
        patch.setattr(train, "CHECKPOINT_EVERY", 3)
        threads = torch.get_num_threads()
        cache = folder / "cache"
        for one in own:
            train.main(["--suite", one.name, "--cache", str(cache)])
        yield tasks, cache, folder
        torch.set_num_threads(threads)


def _write(data: Path, stem: str, rows: list[dict]) -> None:
    for part, own in (("train", rows[:100]), ("test", rows[100:130])):
        with gzip.open(data / f"{stem}.{part}.jsonl.gz", "wt", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in own)


@pytest.mark.parametrize("task", MIXED)
def test_training_writes_what_the_rest_needs(world, task) -> None:
    tasks, cache, _ = world
    folder = train.adapter_folder(cache, tasks[task], 0)
    assert not list(folder.glob("*.partial")) and not (folder / "checkpoint.pt").exists()
    record = json.loads((folder / "training.json").read_text())
    assert record["train_rows"] == 80 and record["held_out_rows"] == 20 and record["steps"] == STEPS
    assert [probe["step"] for probe in record["curve"]] == list(range(STEPS + 1))
    last = record["curve"][-1]
    assert len(last["ratio_per_module"]) == 36 and len(last["ratio_per_block"]) == 6
    targets = [v for m, v in last["ratio_per_module"].items() if m.split(".")[2] in "45"]
    assert last["ratio"] == pytest.approx(sum(targets) / 12, abs=2e-5)
    assert all(0 < v < 1 for v in last["ratio_per_module"].values())
    assert record["curve"][0]["loss"] is None and last["loss"] > 0


def test_killed_training_continues_to_the_same_adapter(world, capsys) -> None:
    tasks, cache, folder = world
    task, out = tasks["ewt_pos"], folder / "again"
    assert not train.train(task, text.BASE, out, stop_after=4)
    assert (out / "checkpoint.pt").is_file() and not train.is_trained(out)
    with pytest.raises(MergeError, match="belongs to a training with"):
        train.train(task, text.BASE, out, steps=STEPS + 1)
    assert train.train(task, text.BASE, out)
    assert "continues from step 3" in capsys.readouterr().out
    whole = train.adapter_folder(cache, task, 0)
    for file in ("adapter_model.safetensors", "head.safetensors"):
        one, other = load_file(whole / file), load_file(out / file)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(MergeError, match="trained with other settings"):
        train.train(task, text.BASE, out, seed=1)


def test_merge_score_and_table(world) -> None:
    _, cache, folder = world
    out = folder / "mixed.jsonl"
    own = ['third=task_arithmetic:{"scaling": 0.25}', 'short=nsc:{"steps": 2}', "adamerging", "uniform"]
    arguments = ["--suite", "mixed", "--cache", str(cache), "--out", str(out), "--rows", "15"]
    assert run.main([*arguments, "--seeds", "0", "1", "--methods", *own]) == 0
    first, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert first["kind"] == "run" and set(first["adapters"]) == set(MIXED) and first["torch"]
    assert {row["status"] for row in rows if row["label"] == "adamerging"} == {"not applicable"}
    scored = {(r["label"], r["seed"], r["task"]): r for r in rows if r["status"] == "ok"}
    labels = ("fine-tuned", "base", "third", "short", "uniform (1/K)")
    assert set(scored) == {(label, seed, task) for label in labels for seed in (0, 1) for task in MIXED}
    for (label, seed, task), row in scored.items():
        alone = scored["fine-tuned", seed, task]["score"]
        assert row["fine_tuned"] == alone and row["normalised"] == pytest.approx(row["score"] / alone)
        assert row["test_rows"] == 15 and row["run"] == first["run"]
        if label == "short":
            assert row["parameters"]["scope"]["layers"] == "last_quarter" and row["steps"] == 2
    (results,) = table.read([out])
    shown = table.markdown(results)
    assert all(f"| {label} |" in shown for label in labels[1:]) and "adamerging: not applicable" in shown
    assert not results.at_chance


def test_a_failed_method_is_a_result_and_an_exit_status(world, monkeypatch, capsys) -> None:
    _, cache, folder = world
    out = folder / "failed.jsonl"
    own = ['bad=knots_ties:{"density": 7}', "uniform"]
    arguments = ["--suite", "classes", "--cache", str(cache), "--out", str(out), "--rows", "10"]
    assert run.main([*arguments, "--methods", *own]) == 1
    assert "failed: bad" in capsys.readouterr().err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert any(r.get("status") == "failed" and "density" in r["reason"] for r in rows)
    assert any(r.get("label") == "uniform (1/K)" and r["status"] == "ok" for r in rows)


def test_predictions_are_looked_at_with_each_task_s_own_head(world) -> None:
    """AdaMerging: the first loss is the mean entropy of both tasks' heads at the initial coefficients."""
    _, cache, _ = world
    shop = run.Workshop(suites.suite("classes"), cache, rows=10)
    before = {name: p.clone() for name, p in shop.model.named_parameters()}
    (one,) = run.parse('a=adamerging:{"steps": 1, "init": 0.0}', shop.base)
    merged = shop.merge(one, 0)
    classes = {"snli": 3, "scitail": 2}
    assert 0 < merged.history[0].loss <= sum(torch.tensor(float(n)).log() for n in classes.values()) / 2
    assert set(merged.updates) == set(shop.adapters["snli"].canonical())
    assert all(torch.equal(before[name], p) for name, p in shop.model.named_parameters())


def _unlabeled(shop: run.Workshop) -> dict[str, list[dict[str, torch.Tensor]]]:
    """As a method gets them, made anew."""
    shop._answered.clear()
    return shop.unlabeled(0, rows=20)


def _answers(batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    """Pieces that follow [MASK] in every row."""
    pairs = [(ids, types == 1) for b in batches for ids, types in zip(*_columns(b), strict=True)]
    return [ids[answer].tolist()[1:] for ids, answer in pairs]


def _columns(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch["input_ids"], batch["token_type_ids"]


@pytest.fixture
def shop(world) -> run.Workshop:
    """With a head that answers something; after a few steps of training it would end at once."""
    out = run.Workshop(suites.suite("mixed"), world[1], rows=10)
    out.heads["snips"].dense.weight.normal_(generator=torch.Generator().manual_seed(0))
    out.heads["snips"].bias.zero_()
    return out


def test_reference_answers_do_not_reach_the_unlabeled_rows(shop, monkeypatch) -> None:
    """Other references change nothing; a head that says [UNK] alone leaves [UNK] alone in the answers."""
    tokenizer, own = shop.base._tokenizer, shop.base.examples
    wrong = tokenizer("wrong answer", add_special_tokens=False)["input_ids"] + [tokenizer.sep_token_id]

    def falsified(task, split, limit, seed):
        rows = own(task, split, limit, seed)
        if task.kind != "generation":
            return rows
        prompts = [r["input_ids"][: r["token_type_ids"].index(1)] for r in rows]
        return [shop.base._row(task, prompt, wrong) for prompt in prompts]

    before = _unlabeled(shop)
    assert len({tuple(answer) for answer in _answers(before["snips"])} - {()}) > 5
    monkeypatch.setattr(shop.base, "examples", falsified)
    after = _unlabeled(shop)
    for one, other in zip(before["snips"], after["snips"], strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    monkeypatch.undo()
    head = shop.heads["snips"]
    head.bias[-1] = 1e4
    unknown = [[tokenizer.unk_token_id] * (text.ANSWER - 1)] * 20
    assert _answers(_unlabeled(shop)["snips"]) == unknown
    head.bias[list(shop.base._vocabulary(shop.tasks["snips"])).index(tokenizer.sep_token_id)] = 2e4
    assert _answers(_unlabeled(shop)["snips"]) == [[]] * 20


def test_unlabeled_answers_are_greedy_with_the_task_s_own_adapter(shop) -> None:
    task, adapter = shop.tasks["snips"], shop.adapters["snips"]
    # After a few steps an adapter changes little, and the answers of the base model would do as well.
    updates = {name: update.scaled(20.0) for name, update in adapter.canonical().items()}
    shop.adapters["snips"] = SimpleNamespace(canonical=lambda: updates)
    before = {name: p.clone() for name, p in shop.model.named_parameters()}
    batches = _unlabeled(shop)["snips"]
    assert all(torch.equal(before[name], p) for name, p in shop.model.named_parameters())
    prompts = [
        r["input_ids"][: r["token_type_ids"].index(1)] for r in shop.base.examples(task, "train", 20, 0)
    ]
    seen = [ids[types == 0] for b in batches for ids, types in zip(*_columns(b), strict=True)]
    assert sorted([i for i in ids.tolist() if i] for ids in seen) == sorted(prompts)
    vocabulary = torch.tensor(list(shop.base._vocabulary(task)))

    def said() -> list[int]:
        """The likeliest piece wherever the rows hold the next one, all places at once."""
        out = []
        for inputs in batches:
            places = shop.base.predict(task, shop.model, shop.heads["snips"], inputs).argmax(-1)
            lengths = (inputs["token_type_ids"] == 1).sum(1).tolist()
            out += [vocabulary[row[:-1]].tolist() for row in places.split(lengths)]
        return out

    with torch.no_grad(), applied(shop.model, updates):
        assert said() == _answers(batches)
    assert said() != _answers(batches)


def test_unlabeled_rows_of_other_tasks_are_the_rows_themselves(shop) -> None:
    batches = _unlabeled(shop)
    assert shop.unlabeled(0, rows=20)["snips"][0]["input_ids"].equal(batches["snips"][0]["input_ids"])
    for name in ("emobank", "ewt_pos"):
        task = shop.tasks[name]
        rows = shop.base.examples(task, "train", 20, 0)
        expected = [x for x, _ in shop.base.batches(task, rows, UNLABELED_BATCH, None)]
        for one, other in zip(batches[name], expected, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_missing_adapters_are_named(world, tmp_path) -> None:
    with pytest.raises(MergeError, match="snli, scitail not trained .* bench.quality.train --suite classes"):
        run.Workshop(suites.suite("classes"), tmp_path)


def test_course(world) -> None:
    pytest.importorskip("matplotlib")
    _, cache, folder = world
    arguments = ["--suite", "mixed", "--cache", str(cache), "--out", str(folder), "--rows", "10"]
    assert course.main([*arguments, "--methods", "nsc", "--steps", "2", "0"]) == 0
    assert course.main([*arguments, "--methods", "nsc", "--steps", "1"]) == 0
    assert course.main([*arguments, "--methods", "nsc", "--steps", "1", "--batch", "3", "--rate", "0.1"]) == 0
    path = folder / "course-mixed.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum(r["kind"] == "run" and r["unlabeled_answered_by_adapter"] == ["snips"] for r in rows) == 3
    assert [r["unlabeled_batch"] for r in rows if r["kind"] == "run"] == [8, 8, 3]
    merges = [r for r in rows if "course" in r]
    assert [(r["course"], r["budget"], r.get("steps", 0)) for r in merges[::3]] == [
        ("nsc", 2, 2),
        ("nsc", 0, 0),
        ("nsc", 1, 1),
        ("nsc, 3 rows a step, rate 0.1", 1, 1),
    ]
    (results,) = table.read([path])
    lines = course.course(results)
    assert list(lines) == ["nsc", "nsc, 3 rows a step, rate 0.1"] and lines["nsc"]["budget"] == [0, 1, 2]
    own = [r["normalised"] for r in rows if r.get("label") == "nsc 1"]
    assert lines["nsc"]["average"][1] == pytest.approx(100 * sum(own) / 3)
    assert 0 < lines["nsc"]["seconds"][0] < lines["nsc"]["seconds"][1]
    assert "<svg" in path.with_suffix(".svg").read_text()


def test_budgets() -> None:
    """Without a step, what the optimisation begins at."""
    start, few = course.budgets("anchored", [0, 25], text.BASE)
    assert (start.label, start.method, start.parameters) == (
        "anchored 0",
        "task_arithmetic",
        {"scaling": 0.4},
    )
    assert (few.label, few.method, few.parameters) == ("anchored 25", "anchored", {"steps": 25})
    auto = [one.parameters for one in course.budgets("auto", [0, 25], text.BASE)]
    assert auto == [{"anchored_steps": 0}, {"anchored_steps": 25}]
    (quick,) = course.budgets("anchored", [25], text.BASE, rate=0.02)
    assert quick.parameters == {**few.parameters, "learning_rate": 0.02}
    (paper,) = course.budgets("nsc", [50], text.BASE)
    assert paper.parameters["steps"] == 50 and paper.parameters["scope"] == text.BASE.target_scope
    with pytest.raises(MergeError, match="'uniform' takes no steps"):
        course.budgets("uniform", [0], text.BASE)


def test_phenomenon(world, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(phenomenon, "COEFFICIENTS", (0.2, 0.8))
    monkeypatch.setattr(phenomenon, "SWEEP_ROWS", 15)
    _, cache, folder = world
    arguments = ["--suite", "mixed", "--cache", str(cache), "--out", str(folder), "--rows", "5"]
    phenomenon.main([*arguments, "--method", "uniform"])
    content = json.loads((folder / "phenomenon-mixed.json").read_text())
    for task in MIXED:
        own = content["samples"][task]
        assert own["single"]["rows"] == 5 and len(own["merged"]["ratio"]) == 5
        assert -1 <= own["single"]["spearman_ratio_loss"] <= 1
        assert len(content["training"][task]["modules"]) == 36
        assert len(content["merges"][task]["score"]) == 2
    assert "<svg" in (folder / "phenomenon-mixed.svg").read_text()
