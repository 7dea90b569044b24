"""Trains the demo's adapters: one LoRA adapter and one head per task.

    python -m nsc_fast.demo.train --data FOLDER --out OUT [--task NAME ...]

FOLDER holds the full data files (see ``prepare.py``). What it measures on the way (loss, score
on rows held out of the training rows, null-space ratio per block) goes to
``OUT/TASK/training.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nsc_fast.adapters import read_adapter
from nsc_fast.demo.encoder import BASE_MODEL, load_encoder
from nsc_fast.demo.evaluate import TestSet, applied, evaluate, load_head, test_set
from nsc_fast.demo.tasks import (
    ADAPTERS,
    TASKS,
    Row,
    Task,
    batches,
    collate,
    collate_targets,
    encode,
    loss,
    new_head,
    predict,
    read_rows,
    targets,
    task_named,
)
from nsc_fast.factors import row_basis

RANK = 8
ALPHA = 16
MODULES = ["query", "key", "value", "output.dense", "intermediate.dense"]
BATCH = 16
RATE = 1e-3
HEAD_RATE = 2e-3
WARMUP = 0.06
CLIP = 1.0
HELD_OUT = 200
PROBES = 9


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the full data files")
    parser.add_argument("--out", type=Path, default=ADAPTERS, help="default: the package's own")
    parser.add_argument("--task", action="append", default=[], help="repeatable; default: all")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for task in [task_named(name) for name in options.task] or TASKS:
        train(task, options.data, options.out / task.name, options.steps, options.seed)


def train(task: Task, data: Path, out: Path, steps: int, seed: int) -> None:
    """Trains one adapter and its head and writes both, with the measurements, to ``out``."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    draw = random.Random(seed)
    encoder = load_encoder()
    rows = read_rows(data / f"{task.stem}.train.jsonl.gz")
    draw.shuffle(rows)
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    config = LoraConfig(
        base_model_name_or_path=BASE_MODEL,
        task_type="FEATURE_EXTRACTION",
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=MODULES,
    )
    model = get_peft_model(encoder.model, config)
    head = new_head(task)
    examples = encode(task, encoder.tokenizer, rows)
    answers = targets(task, rows, examples)
    mean, deviation = torch.zeros(task.outputs), torch.ones(task.outputs)
    if task.kind == "regression":
        values = torch.tensor(answers)
        mean, deviation = values.mean(0), values.std(0)
    watch = test_set(task, head, encoder.tokenizer, held_out)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.requires_grad], "lr": RATE},
            {"params": list(head.parameters()), "lr": HEAD_RATE},
        ],
        weight_decay=0.01,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    probe_at = {round(steps * i / (PROBES - 1)) for i in range(PROBES)}
    curve = [_probe(0, model, watch, math.nan)]
    started, running = time.perf_counter(), None
    stream = _stream([len(e["input_ids"]) for e in examples], draw)
    for step in range(1, steps + 1):
        index = next(stream)
        inputs = collate([examples[i] for i in index])
        target = collate_targets(task, [answers[i] for i in index])
        if task.kind == "regression":
            target = (target - mean) / deviation
        states = model(**inputs).last_hidden_state
        value = loss(task, predict(task, head, states, inputs["attention_mask"]), target)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], CLIP)
        optimizer.step()
        schedule.step()
        running = value.item() if running is None else 0.95 * running + 0.05 * value.item()
        if step in probe_at:
            curve.append(_probe(step, model, watch, running))
            print(
                task.name,
                json.dumps(curve[-1]),
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )
    seconds = time.perf_counter() - started
    with torch.no_grad():  # the head answers in the units of the data, not in standard deviations
        head.weight.mul_(deviation[:, None])
        head.bias.mul_(deviation).add_(mean)
    _save(model, head, out)
    saved = as_saved(task, out, held_out)
    record = {
        "task": task.name,
        "metric": task.metric_name,
        "steps": steps,
        "seed": seed,
        "batch": BATCH,
        "learning_rate": RATE,
        "head_learning_rate": HEAD_RATE,
        "train_rows": len(rows),
        "held_out_rows": len(held_out),
        "seconds": round(seconds),
        "random_subspace_ratio": {str(width): round(math.sqrt(1 - RANK / width), 4) for width in (384, 1536)},
        "held_out_as_saved": round(saved, 4),
        "curve": curve,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def as_saved(task: Task, folder: Path, rows: Sequence[Row]) -> float:
    """Score of the adapter and the head as the files hold them, rounding included, on labeled rows."""
    model, tokenizer = load_encoder()
    updates = read_adapter(folder, name=task.name).canonical()
    with applied(model, updates):
        tests = [test_set(task, load_head(task, folder), tokenizer, rows)]
        return evaluate(model, tests)[task.name]


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, max(0.0, (steps - step) / (steps - warmup)))


def _stream(lengths: Sequence[int], draw: random.Random) -> Iterator[list[int]]:
    """Endless shuffled batches, each of rows of similar length."""
    while True:
        order = list(range(len(lengths)))
        draw.shuffle(order)
        for start in range(0, len(order) - BATCH + 1, 16 * BATCH):
            pool = order[start : start + 16 * BATCH]
            chunks = [[pool[i] for i in b] for b in batches([lengths[p] for p in pool], BATCH)]
            draw.shuffle(chunks)
            yield from (chunk for chunk in chunks if len(chunk) == BATCH)


def _probe(step: int, model: nn.Module, watch: TestSet, running: float) -> dict[str, Any]:
    """Score on the held-out rows and mean null-space ratio per block, on the model as it stands."""
    sums: dict[str, list[float]] = {}
    bases = {
        name: row_basis(module.lora_A["default"].weight)[0].float()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    mask = torch.empty(0)  # of the batch that is going through the model

    def hook(name: str) -> Any:
        def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            z = inputs[0][mask]
            u = (z @ bases[name].T).square().sum(-1) / z.square().sum(-1)
            omega = (1 - u).clamp_min(0).sqrt()
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += float(omega.sum())
            total[1] += len(omega)

        return record

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(hook(name)) for name in bases]

    def with_mask(**batch: Tensor) -> Any:
        nonlocal mask
        mask = batch["attention_mask"].bool()
        return model(**batch)

    model.eval()
    scores = evaluate(with_mask, [watch])  # type: ignore[arg-type]
    model.train()
    for handle in handles:
        handle.remove()
    blocks: dict[str, list[float]] = {}
    for name, (total, count) in sums.items():
        block = name.split("layer.")[1].split(".")[0]
        blocks.setdefault(block, []).append(total / count)
    return {
        "step": step,
        "loss": None if math.isnan(running) else round(running, 4),
        "held_out": round(scores[watch.task.name], 4),
        "ratio_per_block": [round(sum(v) / len(v), 4) for _, v in sorted(blocks.items())],
    }


def _save(model: nn.Module, head: nn.Linear, out: Path) -> None:
    """PEFT's two files and ``head.safetensors``, in float16."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.half()
    # save_embedding_layers: otherwise PEFT asks the hub about the base model's vocabulary.
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink()  # an empty form; the numbers are in adapters/README.md
    config = out / "adapter_config.json"
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields["target_modules"].sort()  # a set in PEFT: the order would change from run to run
    config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    state = {key: value.half().contiguous() for key, value in head.state_dict().items()}
    save_file(state, out / "head.safetensors")
    for path in out.glob("*.safetensors"):
        path.chmod(0o644)  # written readable by the owner only, which would go into the wheel


if __name__ == "__main__":
    main()
