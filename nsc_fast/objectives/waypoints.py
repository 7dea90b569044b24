"""Waypoints: the states that leave the blocks on the way to the last ones, compared in few directions.

The distance of the last states says little about what a block low in the model should do. The adapter alone
says it at every block. With ``h_b`` the states that leave block b (``h_b*`` under the adapter alone, ``h_b0``
under the base model), the way of a merge is

    mean_b  E |F_b^T (h_b - h_b*)|^2 / E |F_b^T (h_b0 - h_b*)|^2

over the blocks below the last one. ``F F^T`` stands for the metric W of :mod:`nsc_fast.objectives.anchors`:
``F = [U s^(1/4), c G]`` with the largest eigenvalues s of ``E[(h_b* - h_b0)(h_b* - h_b0)^T]``, their vectors
U, and random directions G in place of what W adds to all. So a token is kept as a few numbers a block, not d.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import compute_dtype
from ..memory import blocks_of
from ..targets import tokens_of
from .metric import FLOOR
from .states import leaving

__all__ = ["DIRECTIONS", "Passing", "candidates", "directions", "project"]

_MAIN = _RANDOM = 64

DIRECTIONS = _MAIN + _RANDOM
"""Numbers that a token keeps of a block at most."""


def candidates(model: nn.Module, modules: Iterable[str]) -> tuple[str, ...]:
    """Paths of the blocks of every stack with an adapted module; in an encoder-decoder, of the decoder alone.

    Args:
        modules: adapted modules.
    """
    pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return tuple(n for n in blocks_of(model, modules) if not pair or tokens_of(n) == "decoder")


class Passing:
    """States that leave blocks in one pass, copied to the CPU."""

    def __init__(self) -> None:
        self._seen: dict[str, Tensor] = {}
        self._again: set[str] = set()

    def see(self, block: str, _: Any, output: Any) -> None:
        """To be called after each block, as :func:`nsc_fast.objectives.running.watched` does."""
        if block in self._seen:
            self._again.add(block)
        if (states := leaving(output)) is not None:
            self._seen[block] = states.cpu()

    def below(self, last: Tensor) -> dict[str, Tensor]:
        """Those below the last block, of the stack that ran last and of the tokens that the last states have.

        Blocks that ran several times are left out.

        Args:
            last: ``(..., d)``, the last states.
        """
        stack = next(reversed(self._seen), "").rpartition(".")[0]
        own = [name for name in self._seen if name.rpartition(".")[0] == stack][:-1]
        fit = [name for name in own if self._seen[name].shape[:-1] == last.shape[:-1]]
        return {name: self._seen[name] for name in fit if name not in self._again}


def directions(moved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """F of every block, ``(d, m)`` float32 with m up to :data:`DIRECTIONS`.

    Scaled so that the base model has distance 1. Blocks whose states do not move are left out, and so are
    those where they are not finite, which the last states are not then either.

    Args:
        moved: block -> ``(N, d)``, how far the adapter moves the states of some tokens.
    """
    out = {}
    for name, shift in moved.items():
        shift = shift.to(torch.float32)
        energy = float(shift.square().sum())
        if 0 < energy < math.inf:
            out[name] = _directions(shift)
    return out


def _directions(shift: Tensor) -> Tensor:
    count, d = shift.shape
    # Sketches are drawn from torch's own generator: the caller's stays as it is.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, singular, vectors = torch.svd_lowrank(shift, q=min(_MAIN, count, d), niter=4)
        random = torch.randn(d, min(_RANDOM, d))
    # S has eigenvalues s = singular^2 / N.
    root = (singular / math.sqrt(count)).clamp(min=0)
    floor = FLOOR * root.sum() / d
    f = torch.cat([vectors * root.sqrt(), random * (floor / random.shape[1]).sqrt()], 1)
    return f / ((shift @ f).square().sum() / count).sqrt()


def project(states: Tensor, f: Tensor) -> Tensor:
    """``states F``, ``(N, m)``, in float32 at least; differentiable in ``states (N, d)``."""
    wide = compute_dtype(states.dtype)
    return states.to(wide) @ f.to(states.device, wide)
