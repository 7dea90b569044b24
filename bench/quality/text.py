"""The text suites' base model: all-MiniLM-L6-v2, six blocks of width 384.

Sentences are pooled by the masked mean over the tokens; every word piece has its own output in tagging. The
encoder generates as a prefix language model: a 4-D mask lets the source see the source, and every token of
the answer see the source and the answer so far; the answer starts with [MASK] and ends with [SEP].
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nsc_fast.demo import tasks as demo
from nsc_fast.demo.encoder import load_encoder

from .base import Lora, Split, Task
from .tasks import TASKS, divide, file_rows

__all__ = ["BASE", "TASKS", "GenerationHead", "TextBase"]

ANSWER = 40
"""Longest answer of a generation task in word pieces, its end included."""

GENERATED = 64
"""Rows that are answered together."""

POOL = 16
"""Batches whose rows are sorted by length together, when the order is drawn."""


class GenerationHead(nn.Module):
    """Scores of word pieces: a linear layer and a normalisation, then the frozen word embeddings.

    Args:
        embeddings: ``(V, width)``, those of the pieces that may be answered.
    """

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        width = embeddings.shape[1]
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(len(embeddings)))
        self.register_buffer("embeddings", embeddings.clone(), persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """``(..., width)`` to ``(..., V)``."""
        return self.norm(self.dense(states)) @ self.embeddings.T + self.bias


class TextBase:
    """MiniLM and its tasks; see :class:`bench.quality.base.Base`.

    Regression targets are standardised with mean and deviation of the train file, in all splits; the score,
    a correlation, is the same with them.
    """

    name = "minilm"
    lora = Lora(16, 32, ("query", "key", "value", "intermediate.dense", "output.dense"), 1e-3, 2e-3)
    target_scope = {"layers": "last_quarter"}

    def __init__(self) -> None:
        self._tokenizer: Any = None
        self._embeddings: Tensor | None = None
        self._encoded: dict[tuple[Task, str], list[dict[str, Any]]] = {}
        self._pieces: dict[Task, dict[int, int]] = {}

    def load(self) -> nn.Module:
        """A fresh encoder without its pooling layer."""
        encoder = load_encoder()
        self._tokenizer = encoder.tokenizer
        self._embeddings = encoder.model.embeddings.word_embeddings.weight.detach()
        return encoder.model

    def examples(
        self, task: Task, split: Split, limit: int | None = None, seed: int = 0
    ) -> list[dict[str, Any]]:
        """Encoded rows; each has ``input_ids``, ``token_type_ids``, ``attention_mask`` and ``target``."""
        part = "test" if split == "test" else "train"
        if (task, part) not in self._encoded:
            self._encoded[task, part] = self._encode(task, file_rows(task.source, part))
        return divide(self._encoded[task, part], split, limit, seed)

    def batches(
        self, task: Task, examples: Sequence[dict[str, Any]], size: int, seed: int | None
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Padded to the longest row of the batch; a fixed order goes from short to long."""
        lengths = [len(e["input_ids"]) for e in examples]
        if seed is None:
            chosen = demo.batches(lengths, size)
        else:
            chosen = _drawn(lengths, size, random.Random(seed))
        for index in chosen:
            yield self._collate(task, [examples[i] for i in index])

    def new_head(self, task: Task) -> nn.Module:
        if task.kind == "generation":
            self._start()
            return GenerationHead(self._embeddings[torch.tensor(list(self._vocabulary(task)))])
        return nn.Linear(demo.HIDDEN, len(task.labels) or len(task.targets))

    def predict(self, task: Task, model: nn.Module, head: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """One row a sentence, a word piece (tagging) or a word piece of an answer (generation)."""
        states = model(**inputs).last_hidden_state
        if task.kind == "generation":
            return head(states[inputs["token_type_ids"] == 1])
        return demo.predict(task, head, states, inputs["attention_mask"])

    def loss(self, task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
        return demo.loss(task, outputs, targets)

    def score(self, task: Task, outputs: list[Tensor], targets: list[Tensor]) -> float:
        """Accuracy over rows or tokens, or the mean correlation of the targets."""
        return demo.metric(task, outputs, targets)

    @torch.inference_mode()
    def answered(
        self, task: Task, model: nn.Module, head: nn.Module, examples: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The rows with greedy answers of at most ``ANSWER`` pieces; see :class:`~bench.quality.base.Base`.

        The encoder keeps no states between two pieces: every piece is a pass over the row so far.
        """
        vocabulary = torch.tensor(list(self._vocabulary(task)))
        prompts = [e["input_ids"][: e["token_type_ids"].index(1)] for e in examples]
        answers: list[list[int]] = [[] for _ in prompts]
        end = self._tokenizer.sep_token_id
        for chosen in demo.batches([len(p) for p in prompts], GENERATED):
            for _ in range(ANSWER):
                inputs, _ = self._collate(
                    task, [self._row(task, prompts[i], [*answers[i], end]) for i in chosen]
                )
                last = torch.tensor([len(prompts[i]) + len(answers[i]) for i in chosen])
                states = model(**inputs).last_hidden_state[torch.arange(len(chosen)), last]
                for i, piece in zip(chosen, vocabulary[head(states).argmax(-1)].tolist(), strict=True):
                    answers[i].append(piece)
                chosen = [i for i in chosen if answers[i][-1] != end]
                if not chosen:
                    break
        return [self._row(task, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def _start(self) -> None:
        if self._tokenizer is None:
            self.load()

    def _encode(self, task: Task, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        self._start()
        examples = demo.encode(task, self._tokenizer, rows)
        if task.kind == "generation":
            return self._with_answers(task, rows, examples)
        targets = demo.targets(task, rows, examples)
        if task.kind == "regression":
            mean, deviation = self._moments(task)
            targets = ((torch.tensor(targets) - mean) / deviation).tolist()
        for example, target in zip(examples, targets, strict=True):
            example["target"] = target
            example.pop("word_ids", None)
        return examples

    @staticmethod
    def _moments(task: Task) -> tuple[Tensor, Tensor]:
        rows = file_rows(task.source, "train")
        values = torch.tensor([[float(row[field]) for field in task.targets] for row in rows])
        return values.mean(0), values.std(0)

    def _answers(self, task: Task, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
        texts = [row[task.targets[0]] for row in rows]
        pieces = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [ids[: ANSWER - 1] + [self._tokenizer.sep_token_id] for ids in pieces]

    def _vocabulary(self, task: Task) -> dict[int, int]:
        """Piece -> place: those of the train file's rows, source and answer, then [UNK] for all others."""
        if task not in self._pieces:
            rows = file_rows(task.source, "train")
            sources = demo.encode(task, self._tokenizer, rows)
            seen = {p for e in sources for p in e["input_ids"]}
            seen.update(p for answer in self._answers(task, rows) for p in answer)
            unknown = self._tokenizer.unk_token_id
            self._pieces[task] = {p: i for i, p in enumerate([*sorted(seen - {unknown}), unknown])}
        return self._pieces[task]

    def _with_answers(
        self, task: Task, rows: Sequence[dict[str, Any]], sources: Sequence[dict[str, list[int]]]
    ) -> list[dict[str, Any]]:
        answers = self._answers(task, rows)
        return [self._row(task, s["input_ids"], answer) for s, answer in zip(sources, answers, strict=True)]

    def _row(self, task: Task, prompt: list[int], answer: list[int]) -> dict[str, Any]:
        """The model reads the answer without its last piece, which is only to be predicted."""
        place = self._vocabulary(task)
        unknown = len(place) - 1
        return {
            "input_ids": prompt + [self._tokenizer.mask_token_id] + answer[:-1],
            "token_type_ids": [0] * len(prompt) + [1] * len(answer),
            "attention_mask": [1] * (len(prompt) + len(answer)),
            "target": [place.get(piece, unknown) for piece in answer],
        }

    @staticmethod
    def _collate(task: Task, examples: Sequence[dict[str, Any]]) -> tuple[dict[str, Tensor], Tensor]:
        inputs = demo.collate(examples)
        if task.kind == "generation":
            inputs["attention_mask"] = prefix_mask(inputs["token_type_ids"], inputs["attention_mask"])
            return inputs, torch.tensor([t for e in examples for t in e["target"]])
        return inputs, demo.collate_targets(task, [e["target"] for e in examples])


def prefix_mask(types: Tensor, mask: Tensor) -> Tensor:
    """Which token sees which.

    Args:
        types: ``(B, S)``, 0 for the source, 1 for the answer.
        mask: ``(B, S)``, 0 for padding, which sees itself alone and is seen by nothing else.

    Returns:
        ``(B, 1, S, S)`` bool, True where the row's token sees the column's.
    """
    size = types.shape[1]
    source, answer = (types == 0) & mask.bool(), (types == 1) & mask.bool()
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    sees = source[:, None, :] & mask.bool()[:, :, None]
    sees = sees | (answer[:, :, None] & answer[:, None, :] & causal)
    return (sees | torch.eye(size, dtype=torch.bool))[:, None]


def _drawn(lengths: Sequence[int], size: int, draw: random.Random) -> Iterator[list[int]]:
    """One epoch in drawn order, every batch of rows of similar length."""
    order = list(range(len(lengths)))
    draw.shuffle(order)
    for start in range(0, len(order), POOL * size):
        pool = order[start : start + POOL * size]
        chunks = [[pool[i] for i in b] for b in demo.batches([lengths[p] for p in pool], size)]
        draw.shuffle(chunks)
        yield from chunks


BASE = TextBase()
