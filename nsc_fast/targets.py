"""Which adapted modules enter the loss, chosen by block range and by name, and whose tokens they see.

The paper takes all adapted modules of the last quarter of the blocks (its LLaVA runs: only ``v_proj``). In a
model with several lists of blocks (encoder and decoder, vision tower and language model) a range counts in
each of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from .coefficients import block_of

__all__ = ["matches", "routed", "select_targets", "tokens_of"]

_LAST = re.compile(r"^last_(\d+)$")
_RANGE = re.compile(r"^(\d+)(?:-(\d+))?$")
_EXPERT = re.compile(r"(^|\.)(experts|local_experts)\.\d+(\.|$)")
# Parts of a path below which other things than the tokens of the text are processed.
_OTHER_INPUT = re.compile(
    r"(^|[._])(vision|visual|image|img|video|audio|speech|projector|connector|merger|resampler|perceiver|"
    r"qformer)([._]|$)"
)
_CROSSING = re.compile(r"(cross|enc_?dec|encoder_).*att", re.IGNORECASE)
_FROM_ENCODER = ("k", "v", "kv", "k_proj", "v_proj", "kv_proj", "key", "value")


def routed(modules: Iterable[str]) -> tuple[str, ...]:
    """Modules inside the experts of a mixture: each sees the tokens that were routed to it.

    They are merged like all others, but cannot enter the loss: nobody knows which tokens, of which task,
    those are.
    """
    return tuple(module for module in modules if _EXPERT.search(module))


def tokens_of(module: str) -> Literal["input", "decoder", "encoder", "other"]:
    """Whose tokens a module receives, by its path.

    "other" for vision and audio towers and what connects them to a language model; in the decoder of an
    encoder-decoder model "decoder", except the keys and values of the cross-attention, which are "encoder".
    """
    if _OTHER_INPUT.search(module):
        return "other"
    parts = module.split(".")
    if "decoder" not in parts:
        return "input"
    crossing = any(_CROSSING.search(part) for part in parts[parts.index("decoder") + 1 :])
    return "encoder" if crossing and parts[-1] in _FROM_ENCODER else "decoder"


def matches(module: str, names: str | Sequence[str]) -> bool:
    """Whether the module path ends in one of ``names``, compared at dots: "v_proj", "self.value"."""
    names = [names] if isinstance(names, str) else names
    return any(module == name or module.endswith("." + name) for name in names)


def select_targets(
    modules: Iterable[str],
    *,
    layers: str = "last_quarter",
    names: str | Sequence[str] | None = None,
    all_modules: Iterable[str] | None = None,
) -> tuple[str, ...]:
    """Target modules J among the adapted ``modules``, in their order; never those that are ``routed``.

    Args:
        modules: adapted module paths, in the order of the model.
        layers: "last_quarter", "last_N", "all", or block numbers such as "24-31" or "5", counted in every
            list of blocks ("model.layers") by itself.
        names: ends of module paths to keep ("v_proj", or a list). None: all.
        all_modules: module paths of the whole model, which tell how many blocks a list has. Default: the
            adapted ones.

    Raises:
        ValueError: a pattern that matches nothing, or an unreadable range; names what there is instead.
    """
    modules = list(modules)
    chosen = modules if names is None else [m for m in modules if matches(m, names)]
    if not chosen:
        ends = sorted({m.rpartition(".")[2] for m in modules})
        raise ValueError(f"no adapted module ends in {names!r}; the adapters adapt {', '.join(ends)}")
    experts = set(routed(chosen))
    chosen = [m for m in chosen if m not in experts]
    if not chosen:
        raise ValueError(
            f"the only modules to look at are experts of a mixture ({sorted(experts)[0]!r}, ...), and which "
            "tokens are routed to them is not known; adapt the attention too, or use a method without a "
            "null-space ratio"
        )
    if layers == "all":
        return tuple(chosen)
    stacks = list(dict.fromkeys(block[0] for m in chosen if (block := block_of(m)) is not None))
    if not stacks:
        raise ValueError(
            f"layers={layers!r}: the adapted modules stand in no numbered blocks; use layers='all'"
        )
    counts = dict.fromkeys(stacks, 0)
    for module in modules if all_modules is None else all_modules:
        if (block := block_of(module)) is not None and block[0] in counts:
            counts[block[0]] = max(counts[block[0]], block[1] + 1)
    ranges = {stack: _range(layers, count) for stack, count in counts.items()}
    kept = [
        m for m in chosen if (b := block_of(m)) is not None and ranges[b[0]][0] <= b[1] <= ranges[b[0]][1]
    ]
    if not kept:
        told = " and ".join(
            f"blocks {first} to {last} of {stack!r}" for stack, (first, last) in ranges.items()
        )
        have = ", ".join(f"{stack!r} has blocks 0 to {count - 1}" for stack, count in counts.items())
        raise ValueError(f"layers={layers!r} selects {told}, where no chosen module is adapted; {have}")
    return tuple(kept)


def _range(layers: str, count: int) -> tuple[int, int]:
    if layers == "last_quarter":
        return count - max(-(-count // 4), 1), count - 1
    if found := _LAST.match(layers):
        return max(count - int(found[1]), 0), count - 1
    if found := _RANGE.match(layers):
        return int(found[1]), int(found[2] or found[1])
    raise ValueError(f"layers={layers!r}: use 'last_quarter', 'last_N', 'all', or a range such as '24-31'")
