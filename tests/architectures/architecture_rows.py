"""The common architectures: a tiny random model of each, what its adapters adapt, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 60
IMAGE_TOKEN = 59
PADDING = 2

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 1}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Row:
    """One architecture.

    Attributes:
        model: class in transformers.
        config: arguments of its config class.
        adapted: PEFT's target_modules.
        targets: number of modules that the default scope takes into the loss.
        inputs: batch of a seed; two rows.
        masks: module path -> key of the batch that masks its tokens, or None where all of them count.
    """

    model: str
    config: dict[str, Any]
    adapted: Sequence[str] | str
    targets: int
    inputs: Callable[[int], dict[str, Tensor]]
    masks: Callable[[str], str | None] = field(default=lambda module: "attention_mask")

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        torch.manual_seed(1)
        kind = getattr(transformers, self.model)
        config = kind.config_class(**self.config)
        model = kind(config)
        # With the usual spread of 0.02 the ratios of so small a model hardly react to anything.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.3)
        return model.to(dtype).eval()


def text(seed: int, length: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, length - PADDING :] = 0
    ids = torch.randint(3, IMAGE_TOKEN, (2, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask}


def images(seed: int, size: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)}


def to_and_from(seed: int) -> dict[str, Tensor]:
    """Text in, text out; as many tokens on both sides, masked differently."""
    out = text(seed + 100)
    decoder = {"decoder_input_ids": out["input_ids"], "decoder_attention_mask": out["attention_mask"].flip(0)}
    return {**text(seed), **decoder}


def speech(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sound = torch.randn(2, 8, 20, generator=generator, dtype=torch.float64)
    said = text(seed, length=5)
    return {
        "input_features": sound,
        "decoder_input_ids": said["input_ids"],
        "decoder_attention_mask": said["attention_mask"],
    }


def text_and_image(seed: int) -> dict[str, Tensor]:
    """CLIP: two texts and two images beside each other."""
    return {**text(seed), **images(seed)}


def image_in_text(seed: int) -> dict[str, Tensor]:
    """LLaVA: four places of every text hold the patches of its image."""
    batch = text(seed, length=9)
    batch["input_ids"][:, 1:5] = IMAGE_TOKEN
    return {**batch, **images(seed)}


def patches_in_text(seed: int) -> dict[str, Tensor]:
    """Qwen2-VL: the patches of all images of the batch in one long list, here of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    batch = text(seed, length=11)
    batch["input_ids"][0, 1:5] = IMAGE_TOKEN
    batch["input_ids"][1, 2:10] = IMAGE_TOKEN
    grids = torch.tensor([[1, 4, 4], [1, 4, 8]])
    patches = torch.randn(48, 3 * 2 * 4 * 4, generator=generator, dtype=torch.float64)
    kinds = (batch["input_ids"] == IMAGE_TOKEN).int()
    return {**batch, "pixel_values": patches, "image_grid_thw": grids, "mm_token_type_ids": kinds}


def no_mask(module: str) -> None:
    return None


def sides(module: str) -> str:
    """Encoder-decoder: the keys and values of the cross-attention are the encoder's tokens."""
    crossing = any(part in module for part in ("EncDecAttention", "encoder_attn"))
    if "decoder" in module and not (crossing and module.split(".")[-1] in ("k", "v", "k_proj", "v_proj")):
        return "decoder_attention_mask"
    return "attention_mask"


def spoken(module: str) -> str | None:
    return "decoder_attention_mask" if sides(module) == "decoder_attention_mask" else None


def seen(module: str) -> str | None:
    return None if "vis" in module else "attention_mask"


ROWS = {
    "llama": Row("LlamaForCausalLM", GROUPED, ["q_proj", "v_proj", "down_proj"], 3, text),
    "mistral": Row("MistralForCausalLM", GROUPED, ["k_proj", "o_proj", "gate_proj"], 3, text),
    "qwen2": Row("Qwen2ForCausalLM", GROUPED, ["q_proj", "v_proj", "up_proj"], 3, text),
    "qwen3": Row("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}, ["q_proj", "o_proj"], 2, text),
    "gemma2": Row("Gemma2ForCausalLM", {**GROUPED, "head_dim": 8}, ["q_proj", "down_proj"], 2, text),
    "gemma3": Row("Gemma3ForCausalLM", {**GROUPED, "head_dim": 8}, ["v_proj", "down_proj"], 2, text),
    "phi3": Row("Phi3ForCausalLM", GROUPED, ["qkv_proj", "gate_up_proj"], 2, text),
    "gpt2": Row(
        "GPT2LMHeadModel",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 64},
        ["c_attn", "c_fc", "mlp.c_proj"],
        3,
        text,
    ),
    "gpt-neox": Row("GPTNeoXForCausalLM", TEXT, ["query_key_value", "dense_4h_to_h"], 2, text),
    "t5": Row(
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        ["q", "k", "v", "wo"],
        11,
        to_and_from,
        sides,
    ),
    "bart": Row(
        "BartForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 64,
        },
        ["q_proj", "k_proj", "fc2"],
        8,
        to_and_from,
        sides,
    ),
    "bert": Row("BertForSequenceClassification", TEXT, ["query", "value", "output.dense"], 4, text),
    "roberta": Row("RobertaForSequenceClassification", TEXT, ["query", "intermediate.dense"], 2, text),
    "modernbert": Row("ModernBertForMaskedLM", TEXT, ["Wqkv", "Wo"], 3, text),
    "mixtral": Row(
        "MixtralForCausalLM",
        {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 1, "experts_implementation": "eager"},
        ["q_proj", "o_proj"],
        2,
        text,
    ),
    "qwen2-moe": Row(
        "Qwen2MoeForCausalLM",
        {
            **GROUPED,
            "num_experts": 3,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
            "experts_implementation": "eager",
        },
        ["v_proj", "o_proj"],
        2,
        text,
    ),
    "vit": Row("ViTForImageClassification", VISION, ["q_proj", "v_proj"], 2, images, no_mask),
    "dinov2": Row("Dinov2ForImageClassification", VISION, ["q_proj", "fc2"], 2, images, no_mask),
    "clip": Row(
        "CLIPModel",
        {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16},
        ["q_proj", "v_proj"],
        4,
        text_and_image,
        seen,
    ),
    "whisper": Row(
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "num_mel_bins": 8,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_source_positions": 10,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        ["q_proj", "v_proj"],
        6,
        speech,
        spoken,
    ),
    "llava": Row(
        "LlavaForConditionalGeneration",
        {
            "text_config": {**GROUPED, "model_type": "llama"},
            "vision_config": {**VISION, "num_hidden_layers": 4, "model_type": "clip_vision_model"},
            "image_token_id": IMAGE_TOKEN,
            "image_seq_length": 4,
        },
        ["q_proj", "v_proj"],
        4,
        image_in_text,
        seen,
    ),
    "qwen2-vl": Row(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                **GROUPED,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
            },
            "vision_config": {
                "depth": 4,
                "embed_dim": 16,
                "hidden_size": 16,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": 58,
            "vision_start_token_id": 57,
            "vision_end_token_id": 56,
        },
        ["q_proj", "v_proj", "qkv", "fc1"],
        4,
        patches_in_text,
        seen,
    ),
}
