"""NSCLoss: the null-space ratio as a drop-in loss for existing merge code.

    L_k = 1/|J_k| sum_{m in J_k} sum_n w_n omega_k^m(z_n) / sum_n w_n

for one task k at a time, over the modules J_k it adapts and the tokens n of its unlabeled batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .factors import row_basis
from .ops import null_space_ratio
from .targets import matches, tokens_of

if TYPE_CHECKING:
    from .adapters import Adapter

__all__ = ["NSCLoss", "Watch"]

_PEFT_PREFIX = "base_model.model."
_WRAPPED = ("_orig_mod", "module")  # of torch.compile and DistributedDataParallel


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

    The activations may stand on any device, and on several; bases and masks are copied to them, the bases
    once. Inside ``torch.compile`` the values of a mask cannot be looked at: a fully masked batch gives NaN
    there, and no error.
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
        self._moved: dict[tuple[str, torch.device], tuple[Tensor, int, Tensor]] = {}

    @classmethod
    def from_adapters(
        cls,
        adapters: Mapping[str, str | os.PathLike[str] | Adapter],
        *,
        modules: str | Sequence[str] | None = None,
        impl: str = "auto",
    ) -> NSCLoss:
        """From PEFT folders, hub ids or :class:`Adapter` objects, one per task.

        Only the down projections are used: modules that were trained whole, such as heads, are left out.

        Args:
            modules: names of the modules to use, compared with the end of the module path at a dot
                ("v_proj"). Default: all adapted modules.
        """
        from .adapters import read_adapter

        read = {
            task: read_adapter(source, name=task, modules_to_save="drop")
            if isinstance(source, str | os.PathLike)
            else source
            for task, source in adapters.items()
        }
        return cls(_select({t: a.modules for t, a in read.items()}, modules), impl=impl)

    @classmethod
    def from_peft_model(
        cls, model: nn.Module, *, modules: str | Sequence[str] | None = None, impl: str = "auto"
    ) -> NSCLoss:
        """From the LoRA adapters that a live ``PeftModel`` holds; the adapter names are the tasks.

        Modules that were trained whole, such as heads, are left out.
        """
        from .adapters import from_peft_model

        read = from_peft_model(model, modules_to_save="drop")
        return cls(_select({t: a.modules for t, a in read.items()}, modules), impl=impl)

    def forward(
        self,
        activations: Tensor | Mapping[str, Tensor],
        *,
        task: str,
        mask: Tensor | None = None,
        module: str | None = None,
        decoder_mask: Tensor | None = None,
    ) -> Tensor:
        """Loss of one task; scalar, differentiable in the activations.

        Args:
            activations: the *input* of a module, ``(..., d_in)``, or module path -> input. Modules that
                receive the same tensor object (q, k and v) share one read of it.
            task: whose batch this is.
            mask: attention mask or weights of the tokens, ``(...)`` as the activations or ``(B, 1, 1, S)``;
                where one of the two is flat, of any shape with as many entries.
            module: which module a single tensor belongs to; may be left out if the task adapts one only.
            decoder_mask: of the decoder's tokens, in place of ``mask``, for a dict of activations of an
                encoder-decoder model. None: all of them count, if this loss knows modules of an encoder.

        Raises:
            KeyError: unknown task or module.
            ValueError: an empty or fully masked batch, or shapes that do not fit.
        """
        if isinstance(activations, Tensor):
            masks = _Masks(mask)
        else:
            known = [name for names in self.modules_of.values() for name in names]
            masks = _Masks(mask, decoder_mask, decoder_mask is not None or _encodes(known))
        means = self._means(activations, task, masks, module)
        self.breakdown = {name: mean.detach() for name, mean in means.items()}
        return _average(list(means.values()))

    def _means(
        self,
        activations: Tensor | Mapping[str, Tensor],
        task: str,
        masks: _Masks,
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
            bases = [self._basis(task, name, z.device) for name in names]
            try:
                weight, check = masks.of(z, names[0])
                means = null_space_ratio(
                    z,
                    bases[0] if len(bases) == 1 else torch.cat(bases),
                    ranks=[b.shape[0] for b in bases],
                    weight=weight,
                    impl=self.impl,
                    check=check,
                )
            except ValueError as error:
                raise ValueError(f"task {task!r}, module {names[0]!r}: {error}") from error
            out.update(zip(names, means.unbind(), strict=True))
        return out

    def _basis(self, task: str, name: str, device: torch.device) -> Tensor:
        """A module's basis on a device; copies are kept for as long as the basis is the same."""
        key = self._buffer[task, name]
        basis = getattr(self, key)
        if basis.device == device:
            return basis
        version = 0 if basis.is_inference() else basis._version
        source, copied, found = self._moved.get((key, device), (None, -1, basis))
        if source is not basis or copied != version:
            # Made in inference mode, it could not be used in training.
            with torch.inference_mode(False):
                found = basis.to(device)
            self._moved[key, device] = basis, version, found
        return found

    @contextmanager
    def watch(
        self,
        model: nn.Module,
        task: str,
        mask: Tensor | None = None,
        *,
        decoder_mask: Tensor | None = None,
    ) -> Iterator[Watch]:
        """Collects the inputs of the task's modules while ``model`` runs; the loss is there afterwards.

        The ratios are formed when the ``with`` block ends, outside the model, so the model may use activation
        checkpointing, if it is not reentrant. A module that runs several times counts with the mean of its
        calls.

        Args:
            model: any model that holds the modules.
            task: whose batch runs.
            mask: as for :meth:`forward`. It holds for the tokens of the text, or of the encoder: not for the
                decoder beside an encoder, and not for towers of images and sound, all of whose tokens count.
            decoder_mask: of the decoder's tokens, where the model has an encoder and a decoder. Default: all
                of them count.

        Raises:
            KeyError: unknown task, or a module of the task that the model does not have.
            ValueError: a module of the task did not run, or a mask does not fit its activations.
            RuntimeError: the model runs with gradients, but a module of the task does not, as in reentrant
                checkpointing.
        """
        if task not in self.modules_of:
            raise KeyError(f"unknown task {task!r}; this NSCLoss knows {', '.join(self.tasks)}")
        present = dict(model.named_modules())
        calls: list[tuple[str, Tensor]] = []
        grads = _Grads()
        handles = [model.register_forward_pre_hook(grads.enter)]
        try:
            for name in self.modules_of[task]:
                layer = present.get(name, present.get(_PEFT_PREFIX + name))
                if layer is None:
                    inside = next((f", but its {n} may" for n in _WRAPPED if n in model._modules), "")
                    raise KeyError(f"{type(model).__name__} has no module {name!r} of task {task!r}{inside}")
                collect = _collector(name, calls, grads)
                handles.append(layer.register_forward_pre_hook(collect, with_kwargs=True))
            seen = Watch()
            yield seen
        finally:
            for handle in handles:
                handle.remove()
        silent = [name for name in self.modules_of[task] if name not in {n for n, _ in calls}]
        if silent:
            raise ValueError(f"module {silent[0]!r} of task {task!r} did not run inside the with block")
        if grads.lost:
            raise RuntimeError(
                f"module {grads.lost[0]!r} of task {task!r} ran without gradients inside a model that runs "
                "with them, so its loss has none: use checkpointing with use_reentrant=False, or "
                "torch.no_grad() around the model if no gradients are needed"
            )
        masks = _Masks(mask, decoder_mask, decoder_mask is not None or _encodes(present), text_only=True)
        parts: dict[str, list[Tensor]] = {}
        for round_ in _rounds(calls):
            for name, mean in self._means(round_, task, masks).items():
                parts.setdefault(name, []).append(mean)
        means = {name: _average(values) for name, values in parts.items()}
        seen.loss = _average(list(means.values()))
        self.breakdown = seen.breakdown = {name: mean.detach() for name, mean in means.items()}

    def extra_repr(self) -> str:
        counts = ", ".join(f"{t}: {len(m)} modules" for t, m in self.modules_of.items())
        return f"{counts}, impl={self.impl!r}"


@dataclass
class _Grads:
    """Modules that ran without gradients while the model ran with them."""

    enabled: bool = False
    lost: list[str] = field(default_factory=list)

    def enter(self, *_: Any) -> None:
        self.enabled = torch.is_grad_enabled()


@dataclass
class _Masks:
    """Which mask holds for which module."""

    mask: Tensor | None
    decoder: Tensor | None = None
    # Whether a decoder has tokens of its own, beside an encoder; whether towers of images have no mask.
    beside: bool = False
    text_only: bool = False
    _moved: dict[tuple[bool, torch.device], Tensor] = field(default_factory=dict)
    _checked: set[bool] = field(default_factory=set)

    def of(self, z: Tensor, module: str) -> tuple[Tensor, bool]:
        """Weights of the tokens of ``z``, ``z.shape[:-1]``, and whether nobody has looked at them yet."""
        kind = tokens_of(module)
        ours = self.beside and kind == "decoder"
        mask = self.decoder if ours else self.mask
        leading = z.shape[:-1]
        if mask is None or (self.text_only and kind == "other"):
            return torch.ones(leading, device=z.device), False
        if (ours, z.device) not in self._moved:
            self._moved[ours, z.device] = mask.to(z.device)
        mask = self._moved[ours, z.device]
        check = ours not in self._checked
        self._checked.add(ours)
        if mask.shape == leading:
            return mask, check
        flat = max(mask.shape, default=1) == mask.numel() or max(leading, default=1) == leading.numel()
        sizes = [[n for n in shape if n != 1] for shape in (mask.shape, leading)]
        if mask.numel() == leading.numel() and (flat or sizes[0] == sizes[1]):
            return mask.reshape(leading), check
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)} and the activations {tuple(z.shape)}; expected a mask "
            f"{tuple(leading)}, with the dimensions in the same order"
        )


def _encodes(modules: Iterable[str]) -> bool:
    """Whether there is an encoder of text among the modules, so that a decoder has tokens of its own."""
    return any("encoder" in name.split(".") and tokens_of(name) == "input" for name in modules)


def _collector(
    name: str, calls: list[tuple[str, Tensor]], grads: _Grads
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def collect(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if grads.enabled and not torch.is_grad_enabled():
            grads.lost.append(name)
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
    adapted = [module for own in adapters.values() for module in own]
    for name in modules if isinstance(modules, list | tuple) else ():
        if not any(matches(module, name) for module in adapted):
            raise ValueError(f"no task adapts a module named {name!r}: {_some(adapted)}")
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
