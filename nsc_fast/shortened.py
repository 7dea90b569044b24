"""A model with one block of each kind, on tensors without data, and what its blocks leave alive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .memory import LiveBytes, blocks_of

__all__ = ["Growth", "Kinds", "fill", "shorten"]

Kinds = dict[str, tuple[str, int]]
"""Path of a block that is left -> its old path, and how many it stands for."""


def shorten(
    model: nn.Module, ranks: Mapping[str, Mapping[str, int]], targets: Sequence[str]
) -> tuple[Kinds, dict[str, str]]:
    """Leaves one block of each kind in every stack.

    Returns:
        New path of each block left -> (old path, how many it stands for), and old module path -> new one for
        the adapted modules that are left.
    """
    modules = list(dict.fromkeys(m for own in ranks.values() for m in own))
    kinds: Kinds = {}
    moved = {m: m for m in modules}
    stacks: dict[str, list[tuple[str, nn.Module]]] = {}
    adapted = False
    for path, block in blocks_of(model, modules).items():
        stacks.setdefault(path.rpartition(".")[0], []).append((path, block))
    for stack, blocks in stacks.items():
        first: dict[tuple, int] = {}
        chosen: list[tuple[str, nn.Module, int]] = []
        config, layers = _layer_types(model, stack, len(blocks))
        last = max((i for i, (path, _) in enumerate(blocks) if _inside(path, targets)), default=-1)
        for i, (path, block) in enumerate(blocks):
            inside = _inside(path, modules)
            key = (
                type(block),
                tuple((name, p.shape) for name, p in block.named_parameters()),
                tuple((m[len(path) :], tuple(own.get(m) for own in ranks.values())) for m in inside),
                tuple(t[len(path) :] for t in targets if t in inside),
                layers[i] if layers else None,
                # The input of the first adapted block needs no gradient; the last block is left early.
                adapted,
                i == 0,
                i == len(blocks) - 1,
                i > last,
            )
            adapted = adapted or bool(inside)
            if key in first:
                j = first[key]
                chosen[j] = (*chosen[j][:2], chosen[j][2] + 1)
                for m in inside:
                    del moved[m]
                continue
            first[key] = len(chosen)
            new = f"{stack}.{len(chosen)}".lstrip(".")
            chosen.append((path, block, 1))
            for m in inside:
                moved[m] = new + m[len(path) :]
        container = model.get_submodule(stack)
        for own in _configs(model, stack):
            if getattr(own, "num_hidden_layers", None) == len(blocks):
                # States are selected by their number from the end.
                own.num_hidden_layers = len(chosen)
        if layers:
            kept = {id(block) for _, block, _ in chosen}
            config.layer_types = [
                kind for kind, (_, block) in zip(layers, blocks, strict=True) if id(block) in kept
            ]
        for name in [name for name, _ in container.named_children() if name.isdigit()]:
            delattr(container, name)
        for j, (path, block, count) in enumerate(chosen):
            container.add_module(str(j), block)
            kinds[f"{stack}.{j}".lstrip(".")] = path, count
    return kinds, moved


def _layer_types(model: nn.Module, stack: str, count: int) -> tuple[Any, list[str]]:
    """The config that names the kind of each of a stack's blocks, and the kinds; none where none does."""
    for config in _configs(model, stack):
        layers = getattr(config, "layer_types", None)
        if layers is not None and len(layers) == count:
            return config, list(layers)
    return None, []


def _configs(model: nn.Module, stack: str) -> list[Any]:
    """Of the module that owns a stack, and of the modules around it, from the inside."""
    paths = [stack.rsplit(".", k)[0] for k in range(1, stack.count(".") + 1)]
    owners = [*(model.get_submodule(path) for path in paths), model]
    return [owner.config for owner in owners if hasattr(owner, "config")]


def _inside(path: str, modules: Sequence[str]) -> list[str]:
    """Those of the modules that are in the block at ``path``."""
    return [m for m in modules if m.startswith(f"{path}.") or m == path]


def fill(model: nn.Module) -> None:
    """Fake tensors on the CPU in place of those on the meta device, which have no attention of their own."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(new, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class Growth:
    """Notes what every block leaves alive, and counts it once more for each block that it stands for.

    A block's growth is known when the next block of its stack begins.

    Args:
        blocks: path -> block, of the shortened model.
        kinds: path -> (old path, how many it stands for).
        live: what is counted; grows by what the missing blocks would leave.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], kinds: Kinds, live: LiveBytes) -> None:
        self._blocks, self._kinds, self.live = blocks, kinds, live
        self._entered: dict[str, tuple[str, int]] = {}
        self._grown: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Growth:
        for path, block in self._blocks.items():
            enter, leave = self._enter(path), self._leave(path)
            self._handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(block.register_forward_hook(leave))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if path in self._sizes:
                # A shared block runs several times, as it does in the whole model.
                return
            first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            self._sizes[path] = 0 if first is None else first.numel() * first.element_size()
            stack = path.rpartition(".")[0]
            self._close(stack)
            self._entered[stack] = path, self.live.now

        return hook

    def _leave(self, path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            # Of the last block of a stack this is the best that is known.
            stack = path.rpartition(".")[0]
            if stack in self._entered:
                self._grown.setdefault(path, self.live.now - self._entered[stack][1])

        return hook

    def _close(self, stack: str) -> None:
        if stack in self._entered:
            path, before = self._entered[stack]
            self._grown[path] = max(self.live.now - before, 0)
            self.live.now += (self._kinds[path][1] - 1) * self._grown[path]
            self.live.peak = max(self.live.peak, self.live.now)

    def end(self) -> None:
        """The forward pass is over; it may have ended inside of the last block that it needs."""
        for path, before in self._entered.values():
            self._grown.setdefault(path, self.live.now - before)
        self._entered.clear()

    @property
    def inputs(self) -> int:
        """Bytes of the inputs of all blocks that ran."""
        return sum(self._kinds[path][1] * self._sizes[path] for path in self._grown)

    @property
    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Kind of block, named by its first -> (how many there are, bytes that each leaves alive)."""
        return {self._kinds[path][0]: (self._kinds[path][1], size) for path, size in self._grown.items()}
