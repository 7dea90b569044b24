"""A processor and a model of Qwen2-VL's kind that need no network.

The patches of all images of a batch are one long list, and an image takes as many tokens as its size asks
for.
"""

from data_inputs import WORDS, word_tokenizer

PATCH = 4
# Two patches by two become one token.
MERGE = 2
_SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% if m.content is string %}{{ m.content }} {% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|> "
    "{% elif 'text' in c %}{{ c.text }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


KINDS = ("Qwen2VL", "Qwen2_5_VL")


def qwen_processor(kind=KINDS[0]):
    """Pictures of 8 to 32 pixels a side; an image token for every 8 by 8 pixels."""
    import transformers

    tokenizer = word_tokenizer([*_SPECIAL, *WORDS], chat_template=TEMPLATE, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL)})
    sizes = {"patch_size": PATCH, "merge_size": MERGE}
    pixels = {"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
    return getattr(transformers, f"{kind}Processor")(
        transformers.Qwen2VLImageProcessor(**sizes, size=pixels),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**sizes, size=pixels),
        chat_template=TEMPLATE,
    )


def tiny_qwen(kind=KINDS[0]):
    """A random model that belongs to it."""
    import torch
    import transformers

    token = qwen_processor(kind).tokenizer.convert_tokens_to_ids
    texts = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 80,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
    }
    vision = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE}
    if kind == KINDS[0]:
        vision |= {"embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24, "window_size": 16}
        vision |= {"fullatt_block_indexes": [1]}
    model = getattr(transformers, f"{kind}ForConditionalGeneration")
    torch.manual_seed(0)
    config = model.config_class(
        text_config=texts,
        vision_config=vision,
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
    )
    return model(config).eval()
