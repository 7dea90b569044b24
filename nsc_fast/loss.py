"""NSCLoss: the null-space ratio as a drop-in loss for existing merge code.

    L_k = 1/|J_k| sum_{m in J_k} sum_n w_n omega_k^m(z_n) / sum_n w_n

for one task k at a time, over the modules J_k it adapts and the tokens n of its unlabeled batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .factors import row_basis
from .ops import null_space_ratio

if TYPE_CHECKING:
    from .adapters import Adapter

__all__ = ["NSCLoss", "Watch"]

_PEFT_PREFIX = "base_model.model."


@dataclass
class Watch:
    """What :meth:`NSCLoss.watch` saw: the loss, and its part per module."""

    loss: Tensor | None = None
    breakdown: dict[str, Tensor] = field(default_factory=dict)


class NSCLoss(nn.Module):
    """Mean null-space ratio of one task's activations over the modules that the task adapts.

    Args:
        downs: task -> module path -> down projection A, ``(r, d_in)``. Scaling does not matter: the null
            space of A is that of any multiple of it.
        impl: "auto", "triton" or "torch".

    The row bases are computed once, in float64, and kept as buffers (float32), so ``.to()``, ``state_dict``
    and ``deepcopy`` behave as for any module.

    Example::

        nsc = NSCLoss.from_adapters({"vqa": "org/vqa-lora", "ocr": "org/ocr-lora"}, modules="v_proj")
        loss = nsc(activations, task="vqa", mask=attention_mask)      # tensors, or a dict of them
        with nsc.watch(model, "vqa", mask=attention_mask) as seen:    # or let it watch a model
            model(**batch)
        seen.loss.backward()
    """

    def __init__(self, downs: Mapping[str, Mapping[str, Tensor]], *, impl: str = "auto") -> None:
        super().__init__()
        if not downs or not any(downs.values()):
            raise ValueError("NSCLoss needs at least one task with one down projection")
        self.impl = impl
        self.tasks = tuple(downs)
        self.modules_of = {task: tuple(_plain(name) for name in modules) for task, modules in downs.items()}
        self._buffer: dict[tuple[str, str], str] = {}
        for task, modules in downs.items():
            for name, down in modules.items():
                try:
                    basis, _ = row_basis(down)
                except ValueError as error:
                    raise ValueError(f"task {task!r}, module {name!r}: {error}") from error
                key = f"basis_{len(self._buffer)}"
                self._buffer[task, _plain(name)] = key
                self.register_buffer(key, basis.to(torch.float32))
        self.breakdown: dict[str, Tensor] = {}

    @classmethod
    def from_adapters(
        cls,
        adapters: Mapping[str, str | os.PathLike[str] | Adapter],
        *,
        modules: str | Sequence[str] | None = None,
        impl: str = "auto",
    ) -> NSCLoss:
        """From PEFT folders, hub ids or :class:`Adapter` objects, one per task.

        Args:
            modules: names of the modules to use, compared with the end of the module path at a dot
                ("v_proj"). Default: all adapted modules.
        """
        from .adapters import read_adapter

        read = {
            task: read_adapter(source, name=task) if isinstance(source, str | os.PathLike) else source
            for task, source in adapters.items()
        }
        return cls(_select({t: a.modules for t, a in read.items()}, modules), impl=impl)

    @classmethod
    def from_peft_model(
        cls, model: nn.Module, *, modules: str | Sequence[str] | None = None, impl: str = "auto"
    ) -> NSCLoss:
        """From the LoRA adapters that a live ``PeftModel`` holds; the adapter names are the tasks."""
        from .adapters import from_peft_model

        read = from_peft_model(model)
        return cls(_select({t: a.modules for t, a in read.items()}, modules), impl=impl)

    def forward(
        self,
        activations: Tensor | Mapping[str, Tensor],
        *,
        task: str,
        mask: Tensor | None = None,
        module: str | None = None,
    ) -> Tensor:
        """Loss of one task; scalar, differentiable in the activations.

        Args:
            activations: the *input* of a module, ``(..., d_in)``, or module path -> input. Modules that
                receive the same tensor object (q, k and v) share one read of it.
            task: whose batch this is.
            mask: ``(...)`` attention mask or weights of the tokens.
            module: which module a single tensor belongs to; may be left out if the task adapts one only.

        Raises:
            KeyError: unknown task or module.
            ValueError: an empty or fully masked batch, or shapes that do not fit.
        """
        means = self._means(activations, task, mask, module)
        self.breakdown = {name: mean.detach() for name, mean in means.items()}
        return _average(list(means.values()))

    def _means(
        self,
        activations: Tensor | Mapping[str, Tensor],
        task: str,
        mask: Tensor | None,
        module: str | None = None,
    ) -> dict[str, Tensor]:
        """Module -> mean ratio, differentiable."""
        if task not in self.modules_of:
            raise KeyError(f"unknown task {task!r}; this NSCLoss knows {', '.join(self.tasks)}")
        own = self.modules_of[task]
        if isinstance(activations, Tensor):
            if module is None and len(own) > 1:
                raise ValueError(f"task {task!r} adapts {len(own)} modules: say which one with module=")
            activations = {own[0] if module is None else module: activations}
        used: dict[str, Tensor] = {}
        for name, z in activations.items():
            name = _plain(name)
            if not any(name in names for names in self.modules_of.values()):
                raise KeyError(f"unknown module {name!r}; the tasks adapt {_some(own)}")
            if name in own:
                used[name] = z
        if not used:
            raise ValueError(f"none of the activations belongs to a module of task {task!r}: {_some(own)}")
        out: dict[str, Tensor] = {}
        for z, names in _shared(used):
            bases = [getattr(self, self._buffer[task, name]) for name in names]
            weight = torch.ones(z.shape[:-1], device=z.device) if mask is None else mask
            if weight.shape != z.shape[:-1] and weight.numel() == z.shape[:-1].numel():
                weight = weight.reshape(z.shape[:-1])
            try:
                means = null_space_ratio(
                    z,
                    bases[0] if len(bases) == 1 else torch.cat(bases),
                    ranks=[b.shape[0] for b in bases],
                    weight=weight,
                    impl=self.impl,
                )
            except ValueError as error:
                raise ValueError(f"task {task!r}, module {names[0]!r}: {error}") from error
            out.update(zip(names, means.unbind(), strict=True))
        return out

    @contextmanager
    def watch(self, model: nn.Module, task: str, mask: Tensor | None = None) -> Iterator[Watch]:
        """Collects the inputs of the task's modules while ``model`` runs; the loss is there afterwards.

        The ratios are formed when the ``with`` block ends, outside the model, so the model may use activation
        checkpointing. A module that runs several times counts with the mean of its calls.

        Raises:
            KeyError: unknown task, or a module of the task that the model does not have.
            ValueError: a module of the task did not run.
        """
        if task not in self.modules_of:
            raise KeyError(f"unknown task {task!r}; this NSCLoss knows {', '.join(self.tasks)}")
        present = dict(model.named_modules())
        calls: list[tuple[str, Tensor]] = []
        handles = []
        try:
            for name in self.modules_of[task]:
                layer = present.get(name, present.get(_PEFT_PREFIX + name))
                if layer is None:
                    raise KeyError(f"{type(model).__name__} has no module {name!r} of task {task!r}")
                handles.append(layer.register_forward_pre_hook(_collector(name, calls), with_kwargs=True))
            seen = Watch()
            yield seen
        finally:
            for handle in handles:
                handle.remove()
        silent = [name for name in self.modules_of[task] if name not in {n for n, _ in calls}]
        if silent:
            raise ValueError(f"module {silent[0]!r} of task {task!r} did not run inside the with block")
        parts: dict[str, list[Tensor]] = {}
        for round_ in _rounds(calls):
            for name, mean in self._means(round_, task, mask).items():
                parts.setdefault(name, []).append(mean)
        means = {name: _average(values) for name, values in parts.items()}
        seen.loss = _average(list(means.values()))
        self.breakdown = seen.breakdown = {name: mean.detach() for name, mean in means.items()}

    def extra_repr(self) -> str:
        counts = ", ".join(f"{t}: {len(m)} modules" for t, m in self.modules_of.items())
        return f"{counts}, impl={self.impl!r}"


def _collector(
    name: str, calls: list[tuple[str, Tensor]]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def collect(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((name, args[0] if args else next(iter(kwargs.values()))))

    return collect


def _average(values: Sequence[Tensor]) -> Tensor:
    """Mean of scalars, which may stand on several devices."""
    return torch.stack([value.to(values[0].device) for value in values]).mean()


def _rounds(calls: Sequence[tuple[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Calls in order, split wherever a module runs again."""
    rounds: list[dict[str, Tensor]] = []
    for name, z in calls:
        free = next((r for r in rounds if name not in r), None)
        if free is None:
            rounds.append({name: z})
        else:
            free[name] = z
    return rounds


def _shared(activations: Mapping[str, Tensor]) -> list[tuple[Tensor, list[str]]]:
    """Modules grouped by the tensor that they receive."""
    groups: dict[int, tuple[Tensor, list[str]]] = {}
    for name, z in activations.items():
        groups.setdefault(id(z), (z, []))[1].append(name)
    return list(groups.values())


def _select(
    adapters: Mapping[str, Mapping[str, Any]], modules: str | Sequence[str] | None
) -> dict[str, dict[str, Tensor]]:
    from .targets import matches

    out = {
        task: {name: f.down for name, f in own.items() if modules is None or matches(name, modules)}
        for task, own in adapters.items()
    }
    for task, own in out.items():
        if not own:
            names = sorted({name.rpartition(".")[2] for name in adapters[task]})
            raise ValueError(
                f"task {task!r} adapts no module named {modules!r}; it adapts {', '.join(names)}"
            )
    return out


def _plain(name: str) -> str:
    return name.removeprefix(_PEFT_PREFIX)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
