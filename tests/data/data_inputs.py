"""Tokenizers, a processor and a model that need no network, and rows of chats with images."""

WORDS = [f"w{i}" for i in range(60)]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system messages') }}"
    "{% endif %}[{{ m['role'] }}] {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def word_tokenizer(words=WORDS, chat_template=CHAT_TEMPLATE, special=("[UNK]", "[PAD]", "</s>"), **more):
    """One token a word; roles in brackets are four tokens each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate([*special, "[", "]", "user", "assistant", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", **{"pad_token": "[PAD]", "eos_token": "</s>", **more}
    )
    fast.chat_template = chat_template
    return fast


# As LLaVA's: contents are lists of parts, and what is no such list is left out.
PARTS_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}<image> "
    "{% elif c.type == 'text' %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
_IMAGE_ID = 7


def llava_processor():
    """A processor of pictures of 8 pixels, four tokens each, with a start token and LLaVA's padding."""
    from tokenizers import processors
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer = word_tokenizer(["<image>", *WORDS], chat_template=None, bos_token="</s>", padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    assert tokenizer.convert_tokens_to_ids("<image>") == _IMAGE_ID
    pictures = CLIPImageProcessor(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_normalize=False
    )
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=PARTS_TEMPLATE,
    )


def tiny_llava():
    """A random LLaVA that belongs to it."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    texts = {"vocab_size": 80, "max_position_embeddings": 64, "model_type": "llama"}
    pictures = {"image_size": 8, "patch_size": 4, "model_type": "clip_vision_model"}
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config={**sizes, **texts},
        vision_config={**sizes, **pictures},
        image_token_id=_IMAGE_ID,
        image_seq_length=4,
    )
    return LlavaForConditionalGeneration(config).eval()


def picture(red=0):
    from PIL import Image

    return Image.new("RGB", (8, 8), (red, 0, 0))


def llava_row(text="<image>\nw1 w2", image="0.png", **more):
    chat = [{"from": "human", "value": text}, {"from": "gpt", "value": "w9"}]
    return {"conversations": chat, **({} if image is None else {"image": image}), **more}


def hub_row(*parts, images=None):
    chat = [{"role": "user", "content": list(parts)}]
    chat.append({"role": "assistant", "content": [{"type": "text", "text": "w9"}]})
    return {"messages": chat, **({} if images is None else {"images": images})}


def text(said):
    return {"type": "text", "text": said}


IMAGE = {"type": "image"}
