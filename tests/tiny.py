"""Tiny random models and adapters, and the eager computation that every fast path must agree with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from nsc_fast import reference
from nsc_fast.factors import LowRankUpdate, canonical

# A, B and the scale of one adapter at one module.
Raw = tuple[Tensor, Tensor, float]


def random_factors(rank: int, d_in: int, d_out: int, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """A ``(r, d_in)`` and B ``(d_out, r)`` of the size that a trained adapter has."""
    a = torch.randn(rank, d_in, dtype=torch.float64) / d_in**0.5
    b = torch.randn(d_out, rank, dtype=torch.float64) * 0.2
    return a.to(dtype), b.to(dtype)


def tiny_llama(dtype=torch.float64, blocks: int = 4) -> nn.Module:
    """Grouped-query attention: k and v are narrower than q."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_bert(dtype=torch.float64, blocks: int = 4) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(1)
    config = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        vocab_size=60,
        max_position_embeddings=64,
        num_labels=3,
    )
    return BertForSequenceClassification(config).to(dtype).eval()


def tiny_gpt2(dtype=torch.float64, blocks: int = 2) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(n_embd=32, n_layer=blocks, n_head=4, vocab_size=60, n_positions=64)
    return GPT2LMHeadModel(config).to(dtype).eval()


class Mlp(nn.Module):
    """Two numbered blocks of two linear layers each, and a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 12), "down": nn.Linear(12, width, bias=False)})
            for _ in range(2)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(x)


MLP_MODULES = tuple(f"blocks.{i}.{name}" for i in range(2) for name in ("up", "down"))


def linear_names(model: nn.Module, ends: Sequence[str]) -> list[str]:
    """Paths of the modules whose last name is one of ``ends``."""
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends]


def sizes(module: nn.Module) -> tuple[int, int]:
    """``(d_out, d_in)``."""
    if hasattr(module, "nf"):
        return module.nf, module.nx
    return module.out_features, module.in_features


def random_adapters(
    model: nn.Module, modules: Mapping[str, Sequence[str]] | Sequence[str], ranks: Mapping[str, int]
) -> dict[str, dict[str, Raw]]:
    """Task -> module -> (A, B, s). ``modules`` may differ by task; ``ranks`` says the rank of each task."""
    out: dict[str, dict[str, Raw]] = {}
    for k, (task, rank) in enumerate(ranks.items()):
        own = modules[task] if isinstance(modules, Mapping) else modules
        out[task] = {}
        for name in own:
            d_out, d_in = sizes(model.get_submodule(name))
            out[task][name] = (*random_factors(rank, d_in, d_out), 1.0 + k / 2)
    return out


def canonical_adapters(raw: Mapping[str, Mapping[str, Raw]]) -> dict[str, dict[str, LowRankUpdate]]:
    return {task: {m: canonical(*factors) for m, factors in own.items()} for task, own in raw.items()}


def token_batch(rows: int, length: int, seed: int, padding: int = 0, vocabulary: int = 60) -> dict:
    """input_ids and attention_mask; the first row ends in ``padding`` masked tokens."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.int64)
    if padding:
        mask[0, length - padding :] = 0
    ids = torch.randint(1, vocabulary, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask}


def eager_loss(
    model: nn.Module,
    raw: Mapping[str, Mapping[str, Raw]],
    batches: Mapping[str, dict],
    targets: Sequence[str],
    coefficient: Callable[[str, str], Tensor],
    preferences: Mapping[str, float] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The paper, written out: merged weights in full, one task after another, whole model, textbook ratio.

    Args:
        coefficient: (module, task) -> scalar tensor.

    Returns:
        The loss, differentiable in the coefficients, and the mean ratio of each task.
    """
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for task, own in raw.items():
        for name, (a, b, s) in own.items():
            delta = coefficient(name, task) * s * (b @ a)
            transposed = hasattr(model.get_submodule(name), "nf")
            key = f"{name}.weight"
            weights[key] = weights[key] + (delta.t() if transposed else delta).to(weights[key].dtype)
    share = {t: 1.0 / len(raw) for t in raw}
    if preferences is not None:
        share = {t: preferences[t] / sum(preferences.values()) for t in raw}
    total, ratios = torch.zeros((), dtype=torch.float64), {}
    for task, batch in batches.items():
        seen: dict[str, Tensor] = {}

        def keep(_, args, kwargs, name=None, seen=seen):
            seen[name] = args[0] if args else next(iter(kwargs.values()))

        handles = [
            model.get_submodule(name).register_forward_pre_hook(partial(keep, name=name), with_kwargs=True)
            for name in targets
        ]
        try:
            functional_call(model, weights, args=(), kwargs=batch)
        finally:
            for handle in handles:
                handle.remove()
        own = [name for name in targets if name in raw[task]]
        mask = batch.get("attention_mask")
        mean = sum(reference.ratio_loss(seen[m], raw[task][m][0].to(seen[m].dtype), mask) for m in own)
        mean = mean / len(own)
        ratios[task] = mean.item()
        total = total + share[task] * mean
    return total, ratios


def module_inputs(model: nn.Module, names: Iterable[str], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the named modules receive while the model runs on ``batch``."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(m).register_forward_pre_hook(lambda _, args, m=m: seen.__setitem__(m, args[0]))
        for m in names
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    return seen


class Ops(TorchDispatchMode):
    """How often each operation runs while it is active: some of them make a GPU and the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))
