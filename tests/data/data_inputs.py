"""Tokenizers that need no network."""

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
