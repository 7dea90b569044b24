"""How the batches of a step go through the model: joined, packed or one after another, whole or in parts.

Packed, the sequences of all tasks stand one after another in a single row, without padding, and the
positions start again at every sequence. transformers' decoders read from such positions that the sequences
must not see each other: flash attention runs over the single sequences, the other implementations get a
block-diagonal mask of ``N x N`` entries. Whether a model does so is not taken for granted but tried
(:func:`obstacle`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .batches import GRIDS, PATCHES, Batch, cut, image_ends, join, patches, rows, token_batch, token_mask
from .errors import MergeError
from .monitor import TokenBatch, Whole

__all__ = [
    "Pass",
    "Passes",
    "backbone",
    "check_length",
    "check_positions",
    "divisible",
    "forward_options",
    "obstacle",
    "pack",
    "parts",
    "passes",
    "positions",
    "whole_of",
]

Pass = tuple[dict[str, Tensor], TokenBatch]

_PACKABLE = {"input_ids", "attention_mask"}
# Inputs with a mask of their own, or whose encoder makes fewer tokens of them.
_UNDIVIDED = ("decoder_", "input_features")
_UNPACKED = (
    "it has to hold token ids and a mask alone, (B, S), of 0 and 1 with the tokens of a sequence side by side"
)
# Lengths of the two sequences that a model is tried with.
_PROBE = (12, 9)


def passes(
    batches: Mapping[int, Batch],
    device: torch.device,
    *,
    together: str = "auto",
    micro_batch: int | None = None,
    packed: bool = False,
    insist: bool = False,
    wholes: Mapping[int, Whole] | None = None,
) -> list[Pass]:
    """Inputs and task ids of every forward pass of one step.

    Args:
        batches: task index -> batch of the task, on ``device``.
        together: "auto" joins the tasks' batches where that saves time, "always" insists, "never" does not.
        micro_batch: sequences of each task in a pass at most. Default: all of the batch. The tokens of a part
            count as they do in the whole batch, so that losses and gradients of the passes add up to it.
        packed: joins without padding where that is possible.
        insist: refuses ``packed`` batches that cannot be packed, instead of padding them.
        wholes: where the batches are parts already: task index -> :func:`whole_of` the whole batch.

    Raises:
        MergeError: batches that cannot be joined or packed though they must.
    """
    pieces = {k: parts(batch, micro_batch) for k, batch in batches.items()}
    if wholes is None and any(len(own) > 1 for own in pieces.values()):
        wholes = {k: whole_of(batch) for k, batch in batches.items()}
    out: list[Pass] = []
    for i in range(max(map(len, pieces.values()))):
        now = {k: own[i] for k, own in pieces.items() if i < len(own)}
        row = pack(now) if packed else None
        if packed and insist and row is None:
            raise MergeError(f"a batch cannot be packed: {_UNPACKED}; set packing to 'auto' or 'never'")
        found = _joined(now, device, together) if row is None else [row]
        out += [(inputs, replace(tokens, whole=wholes)) for inputs, tokens in found]
    return out


def _joined(batches: Mapping[int, Batch], device: torch.device, together: str) -> list[Pass]:
    joined = None
    if together != "never" and len(batches) > 1:
        joined = join(batches, max_padding=1.5 if together == "auto" else None)
        if joined is None and together == "always":
            raise MergeError(
                "the tasks' batches cannot go through the model together (different inputs or shapes); "
                "set batching to 'auto' or 'never'"
            )
    if joined is not None:
        return [joined]
    return [(dict(batch), token_batch(batch, k, device)) for k, batch in batches.items()]


def parts(batch: Batch, micro_batch: int | None) -> list[dict[str, Tensor]]:
    """The batch in parts of at most ``micro_batch`` sequences, each with its images.

    Raises:
        MergeError: it has to be divided and cannot be, or its parts would not count as the whole does.
    """
    count = rows(batch)
    if micro_batch is None or micro_batch >= count:
        return [dict(batch)]
    key = _undivided(batch)
    if key is not None:
        raise MergeError(
            f"micro_batch={micro_batch} divides batches of token ids or images, and it is not known which "
            f"part of {key!r} belongs to which sequence; leave micro_batch out and give smaller batches"
        )
    return cut(batch, [*range(0, count, micro_batch), count])


def divisible(batch: Batch) -> bool:
    """Whether a batch may be cut into parts whose tokens count as in the whole."""
    return _undivided(batch) is None


def _undivided(batch: Batch) -> str | None:
    """An input that cannot be divided, or None."""
    count, own = rows(batch), () if image_ends(batch) is None else (PATCHES, GRIDS)
    for key, value in batch.items():
        if key.startswith(_UNDIVIDED) or (key not in own and (value.ndim == 0 or value.shape[0] != count)):
            return key
    return None


def whole_of(batch: Batch) -> Whole:
    """Weight of the tokens of a batch, its number of sequences, and the patches of its images."""
    mask = token_mask(batch)
    if mask is not None:
        return Whole(float(mask.sum()), rows(batch), patches(batch))
    sequence = batch.get("input_ids", batch.get("inputs_embeds"))
    length = 1 if sequence is None else sequence.shape[1]
    return Whole(float(rows(batch) * length), rows(batch), patches(batch))


def pack(batches: Mapping[int, Batch]) -> Pass | None:
    """One row of all sequences without padding; None where a batch holds anything but padded token ids.

    Padding may stand on either side of a sequence; positions count from its first token.

    Args:
        batches: task index -> batch.

    Returns:
        ``input_ids`` and ``position_ids`` ``(1, N)``, and the task of each of the N tokens ``(1, N)``.
    """
    ids, positions, tasks = [], [], []
    for k, batch in batches.items():
        if "input_ids" not in batch or not set(batch) <= _PACKABLE or batch["input_ids"].ndim != 2:
            return None
        own = batch["input_ids"]
        mask = batch.get("attention_mask")
        if mask is not None and (mask.shape != own.shape or not _stretches(mask)):
            return None
        keep = torch.ones_like(own, dtype=torch.bool) if mask is None else mask.bool()
        ids.append(own[keep])
        positions.append((keep.cumsum(1) - 1)[keep])
        tasks.append(torch.full_like(ids[-1], k, dtype=torch.int64))
    inputs = {"input_ids": torch.cat(ids)[None], "position_ids": torch.cat(positions)[None]}
    return inputs, TokenBatch(torch.cat(tasks)[None])


def _stretches(mask: Tensor) -> bool:
    """Whether a mask ``(B, S)`` is 0 and 1, with one unbroken stretch of ones in a row at most."""
    keep = mask.bool()
    begins = keep[:, 1:] & ~keep[:, :-1]
    return not bool(((mask != keep).any(1) | (begins.sum(1) + keep[:, 0] > 1)).any())


def obstacle(runner: nn.Module, options: Mapping[str, Any], batches: Sequence[Batch]) -> str | None:
    """Why packed sequences cannot go through a model, or None.

    Two short sequences are run both ways, as the last test.

    Args:
        runner: the model or its backbone.
        options: arguments of its forward pass beside the inputs.
        batches: of which the tokens are taken.
    """
    config = getattr(runner, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder and a decoder"
    if "position_ids" not in inspect.signature(runner.forward).parameters:
        return "it takes no position ids"
    found = []
    for batch in batches:
        if not set(batch) <= _PACKABLE or "input_ids" not in batch:
            return f"the batches hold {', '.join(sorted(set(batch)))}, not token ids and a mask alone"
        row = pack({0: batch})
        if row is None:
            return f"a batch does not fit ({_UNPACKED})"
        # Packed rows hold no padding.
        found.append(row[0]["input_ids"][0, : sum(_PROBE)])
    tokens = torch.cat(found).unique()
    if len(tokens) < 2:
        return "the data are too few to try it"
    ids = tokens.repeat(-(-sum(_PROBE) // len(tokens)))[: sum(_PROBE)]
    ids = ids.flip(0).split(_PROBE)
    device = next(runner.parameters()).device
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    single = {k: {"input_ids": own[None]} for k, own in enumerate(ids)}
    inputs, _ = pack(single)
    with torch.no_grad():
        want = _states(runner(input_ids=padded.to(device), attention_mask=mask.to(device), **options))
        got = _states(runner(**{key: value.to(device) for key, value in inputs.items()}, **options))
    if want is None or got is None or got.shape[:2] != (1, sum(_PROBE)):
        return "its output has no states to compare"
    want = torch.cat([want[k, :n] for k, n in enumerate(_PROBE)]).double()
    if not bool(want.isfinite().all()):
        return "its states are not finite; load it in float32"
    size = want.norm(dim=1)
    # A state may be zero: that of a token without an embedding.
    size = size.clamp(min=max(1e-3 * float(size.max()), torch.finfo(size.dtype).tiny))
    difference = float(((got[0].double() - want).norm(dim=1) / size).max())
    limit = {torch.float64: 1e-9, torch.float32: 1e-3}.get(got.dtype, 0.1)
    if not difference <= limit:
        return f"packed sequences see each other (their states change by {difference:.2g})"
    return None


def _states(output: Any) -> Tensor | None:
    found = getattr(output, "last_hidden_state", None)
    if found is None:
        found = getattr(output, "logits", None)
    return found


@dataclass
class Passes:
    """The forward passes of every step; see :func:`passes` for how batches are joined and divided.

    Attributes:
        runner: the model or its backbone.
        options: arguments of its forward pass beside the inputs.
        limit: longest sequence that the model takes; None for any.
        packing: "auto" joins batches without padding if the model keeps packed sequences apart, "always"
            insists, "never" does not.
        on_notice: is told what the user should know.
        packed: whether batches are packed; None until the first step has decided.
    """

    runner: nn.Module
    options: Mapping[str, Any]
    limit: int | None = None
    together: str = "auto"
    micro_batch: int | None = None
    packing: str = "never"
    on_notice: Callable[[str], None] | None = None
    packed: bool | None = None

    def __call__(
        self,
        batches: Mapping[str, Batch],
        tasks: Sequence[str],
        device: torch.device,
        wholes: Mapping[str, Whole] | None = None,
    ) -> list[Pass]:
        """Passes of one step; ``wholes`` as for :func:`passes`, by the names of the tasks.

        Raises:
            MergeError: a sequence longer than the model takes, or batches that cannot go through it as asked.
        """
        moved = {}
        for task, batch in batches.items():
            check_length(task, batch, self.limit)
            moved[tasks.index(task)] = {key: value.to(device) for key, value in batch.items()}
        if self.packed is None:
            self.packed = self.packing != "never" and self._packs(list(moved.values()))
        return passes(
            moved,
            device,
            together=self.together,
            micro_batch=self.micro_batch,
            packed=self.packed,
            insist=self.packing == "always",
            wholes=None if wholes is None else {tasks.index(task): one for task, one in wholes.items()},
        )

    def _packs(self, batches: Sequence[Batch]) -> bool:
        reason = obstacle(self.runner, self.options, batches)
        if reason is not None and self.packing == "always":
            raise MergeError(f"the batches cannot be packed: {reason}; set packing to 'auto' or 'never'")
        if reason is not None and self.on_notice is not None:
            self.on_notice(f"batches were padded, not packed: {reason}")
        return reason is None


def check_positions(model: nn.Module, data: Mapping[str, Any]) -> None:
    """Whether every sequence is within the positions that the model was made for.

    Args:
        model: the base model.
        data: task -> batches; looked through where they are a list or a tuple.

    Raises:
        MergeError: a longer sequence; names the task.
    """
    limit = positions(model)
    for task, batches in data.items() if limit is not None else ():
        for batch in batches if isinstance(batches, list | tuple) else ():
            check_length(task, batch, limit)


def check_length(task: str, batch: Batch, limit: int | None) -> None:
    """See :func:`check_positions`."""
    ids = batch.get("input_ids")
    if limit is None or not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] <= limit:
        return
    raise MergeError(
        f"task {task!r}: a sequence of {ids.shape[1]} tokens is longer than the {limit} positions of the "
        f"model; cut it (data.max_length: {limit})"
    )


def positions(model: nn.Module) -> int | None:
    """Longest sequence of a model, as its config says; None where it does not."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    for name, module in model.named_modules():
        # RoBERTa counts its positions from behind the padding index.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return limit - module.padding_idx - 1
    return limit


def forward_options(model: nn.Module) -> dict[str, Any]:
    """Arguments of a forward pass beside the batch.

    A cache of keys and values serves generation; here it would only cost memory.
    """
    accepted = inspect.signature(model.forward).parameters
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    # Models of images with texts hand it on to their language model without naming it.
    handed_on = any(p.kind is p.VAR_KEYWORD for p in accepted.values()) and hasattr(text, "use_cache")
    return {"use_cache": False} if "use_cache" in accepted or handed_on else {}


def backbone(model: nn.Module, targets: Sequence[str] | Mapping[str, Any]) -> nn.Module:
    """The part of a transformers model without its head, if all targets stand inside it."""
    prefix = getattr(model, "base_model_prefix", "")
    inner = getattr(model, prefix, None) if prefix else None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and not model.can_generate():
        # A classifier makes the decoder's inputs itself.
        return model
    if isinstance(inner, nn.Module) and all(t.startswith(prefix + ".") for t in targets):
        return inner
    return model
