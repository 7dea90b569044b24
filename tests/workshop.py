"""A folder with a tiny base model, its tokenizer, three adapters and their data, as a user would have it."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Path:
    """base/, a0/ to a2/ (ranks 4, 8, 3; alpha != r; one rslora; different modules), d0.jsonl, recipe.yaml"""
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("workshop")
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[PAD]", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="</s>"
    )
    base = folder / "base"
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(vocabulary),
    )
    LlamaForCausalLM(config).save_pretrained(base)
    fast.save_pretrained(base)
    settings = ((4, 8, False, ["q_proj", "v_proj"]), (8, 8, True, "all-linear"), (3, 1, False, ["v_proj"]))
    for k, (r, alpha, rslora, modules) in enumerate(settings):
        model = LlamaForCausalLM.from_pretrained(base)
        lora = LoraConfig(
            r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=modules, task_type="CAUSAL_LM"
        )
        peft = get_peft_model(model, lora)
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05)
        peft.save_pretrained(folder / f"a{k}")
        rows = [
            {"text": " ".join(WORDS[(7 * j + i + k) % 60] for i in range(4 + j % 7 + 3 * k)), "label": 1}
            for j in range(20)
        ]
        (folder / f"d{k}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(
        "base_model: base\n"
        "adapters:\n"
        "  - {name: one, path: a0, data: {path: d0.jsonl}}\n"
        "  - {name: two, path: a1, data: {path: d1.jsonl}}\n"
        "  - {name: three, path: a2, data: {path: d2.jsonl}}\n"
        "parameters: {steps: 6, learning_rate: 1e-2, scope: {filter: v_proj}}\n"
    )
    return folder


@contextmanager
def interrupted_after(steps, monkeypatch):
    """Whoever optimises in here presses Ctrl-C when so many steps are done."""
    from nsc_fast import loop

    step = loop.Recorder.step

    def pressed(self, history, ended):
        step(self, history, ended)
        if len(history) == steps:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Recorder, "step", pressed)
        yield
