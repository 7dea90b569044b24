"""Small adapters and models that the tests of this folder share."""

from __future__ import annotations

import torch
from torch import nn

PREFIX = "base_model.model."


class Mlp(nn.Module):
    """Two blocks of two linears of different shapes, a norm between them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 10), "norm": nn.LayerNorm(10), "down": nn.Linear(10, 6)})
            for _ in range(2)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["down"](layer["norm"](layer["up"](x)).relu())
        return self.head(x)


def plain_config(**changes) -> dict:
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/base",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["up", "down"],
        "bias": "none",
        "task_type": None,
    }
    return config | changes


def plain_tensors() -> dict[str, torch.Tensor]:
    """Factors of rank 2 for the four inner linears of ``Mlp``, by their keys in a file."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(2):
        for name, d_out, d_in in (("up", 10, 6), ("down", 6, 10)):
            path = f"{PREFIX}layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(2, d_in, generator=generator)
            tensors[f"{path}.lora_B.weight"] = torch.randn(d_out, 2, generator=generator)
    return tensors


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=20,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    return BertModel(config).eval()


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20,
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=20,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=12, n_layer=2, n_head=2)).eval()


MODELS = {"mlp": lambda: Mlp().eval(), "bert": tiny_bert, "llama": tiny_llama, "gpt2": tiny_gpt2}


def build(kind: str) -> nn.Module:
    """The same model, bit for bit, at every call."""
    torch.manual_seed(0)
    return MODELS[kind]()


def output_of(kind: str, model: nn.Module) -> torch.Tensor:
    """The model's output for a fixed input."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        if kind == "mlp":
            return model(torch.randn(5, 6, generator=generator))
        return model(torch.randint(0, 20, (2, 9), generator=generator))[0]


def with_lora(kind: str, seed: int = 0, model: nn.Module | None = None, **config):
    """A PeftModel whose factors are random, so that no update is zero."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model or build(kind), LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model
