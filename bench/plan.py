"""``python -m bench.plan``: the planner's table in README.md, for an 8B Llama on two sizes of device."""

from __future__ import annotations

from pathlib import Path

import torch

from nsc_fast.memory import readable_bytes
from nsc_fast.planner import RESERVE, Choice, Plan
from nsc_fast.targets import select_targets
from nsc_fast.workload import Workload

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- plan:begin -->", "<!-- plan:end -->"
TASKS, RANK, ROWS, LENGTH = 6, 16, 16, 512
BUDGETS = (24 * 10**9, 80 * 10**9)
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama_8b() -> Workload:
    """Llama-3-8B by its shapes, six adapters of rank 16 on all linear layers of its blocks."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    names = [name for name, _ in skeleton.named_modules() if name.endswith(_LINEAR)]
    ranks = {f"task {k}": dict.fromkeys(names, RANK) for k in range(TASKS)}
    weights = 2 * sum(p.numel() for p in skeleton.parameters())
    return Workload(skeleton, ranks, select_targets(names), weights, 0, ROWS, LENGTH)


def markdown() -> str:
    """The table, without the markers."""
    work = llama_8b()
    plan = Plan(work, BUDGETS[0])
    lines = [
        "Computed by the planner, not measured: Llama-3-8B in bfloat16 "
        f"({readable_bytes(work.weight_bytes)}), {TASKS} adapters of rank {RANK} on all linear "
        "layers, targets in the last quarter; "
        f"{readable_bytes(RESERVE)} are left for the device's context. The model itself ends at {plan.limit} "
        "tokens.",
        "",
        "| device | checkpointing | offload | longest sequence, one at a time | "
        f"micro_batch for {TASKS} joined tasks of {LENGTH} tokens | host | time of a step, base forwards |",
        "|---|---|---|---|---|---|---|",
    ]
    for budget in BUDGETS:
        plan.budget = budget
        for choice, need, longest in plan.table():
            fits = need.device <= budget
            rows = str(choice.micro_batch) if fits and choice.together else "none"
            if fits and not choice.together:
                rows = "1, one task after another"
            lines.append(
                f"| {readable_bytes(budget)} | {choice.recompute} | {'yes' if choice.offload else 'no'} | "
                f"{_rounded(longest)} | {rows} | {readable_bytes(need.host)} | {need.time:.1f} |"
            )
    smallest = plan.need(Choice("always", True, 1, False))
    lines += ["", f"The smallest need, with sequences of {LENGTH} tokens: {readable_bytes(smallest.device)}."]
    return "\n".join(lines)


def _rounded(tokens: int) -> str:
    return f"{tokens // 100 * 100:,}" if tokens >= 100 else "none"


def main() -> None:
    """Replaces what stands between the markers."""
    table = markdown()
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
