"""Adapters made by PEFT, and the computation that a merge must agree with, written out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nsc_fast import reference
from nsc_fast.adapters import Adapter
from nsc_fast.coefficients import Coefficients
from nsc_fast.driver import Driver
from nsc_fast.layers import install, remove

RANKS = {"a": 2, "b": 3}


def train(model: nn.Module, adapted: Sequence[str] | Mapping, folder: Path, **config: Any) -> dict[str, Path]:
    """Two random adapters of mixed ranks, made and saved by PEFT; task -> folder.

    Args:
        adapted: target_modules, of both tasks or by task.
        config: more of LoraConfig. Modules in ``modules_to_save`` are trained a little.
    """
    from peft import LoraConfig, get_peft_model

    for task, rank in RANKS.items():
        names = adapted[task] if isinstance(adapted, Mapping) else adapted
        pattern = {} if isinstance(names, str) else {names[0]: rank + 1}
        names = names if isinstance(names, str) else list(names)
        lora = LoraConfig(r=rank, lora_alpha=5, rank_pattern=pattern, target_modules=names, **config)
        peft = get_peft_model(copy.deepcopy(model), lora)
        torch.manual_seed(rank)
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_B" in name or ".modules_to_save." in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        peft.save_pretrained(folder / task)
    return {task: folder / task for task in RANKS}


def merged_weights(model: nn.Module, adapters: Mapping[str, Adapter], coefficients: Mapping) -> dict:
    """``W0 + sum_k c_k s_k B_k A_k`` of every adapted module."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for task, adapter in adapters.items():
        for module, f in adapter.modules.items():
            delta = coefficients[module][task] * f.scaling * (f.up.double() @ f.down.double())
            transposed = hasattr(model.get_submodule(module), "nf")
            key = f"{module}.weight"
            weights[key] = weights[key] + (delta.t() if transposed else delta)
    return weights


def eager(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    adapters: Mapping[str, Adapter],
    batches: Mapping[str, dict[str, Tensor]],
    targets: Sequence[str],
    masks: Callable[[str], str | None],
) -> Tensor:
    """The loss, written out: merged weights in full, one task after another, textbook ratio."""
    total = 0.0
    for task, batch in batches.items():
        seen, own = {}, [name for name in targets if name in adapters[task].modules]
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name, seen=seen: seen.update({name: args[0]})
            )
            for name in own
        ]
        functional_call(model, weights, args=(), kwargs=batch)
        for handle in handles:
            handle.remove()
        terms = []
        for name in own:
            key = masks(name)
            mask = None if key is None else batch[key]
            terms.append(reference.ratio_loss(seen[name], adapters[task].modules[name].down.double(), mask))
        total = total + sum(terms) / len(terms) / len(batches)
    return total


def outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """All floating-point outputs."""
    with torch.no_grad():
        out = model(**batch)
    out = (out,) if isinstance(out, Tensor) else out.to_tuple()
    return [value for value in out if isinstance(value, Tensor) and value.is_floating_point()]


def with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with other weights."""
    out = copy.deepcopy(model)
    with torch.no_grad():
        for key, value in weights.items():
            out.get_parameter(key).copy_(value)
    return out


def leaves(modules: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """A coefficient of 0.4 for every module and task, that gathers its gradient."""
    start = torch.tensor(0.4, dtype=torch.float64)
    return {m: {t: start.clone().requires_grad_() for t in RANKS} for m in modules}


def second_step(
    model: nn.Module, updates: Mapping, batches: Mapping, targets: Sequence[str], granularity: str = "module"
) -> tuple[float, Coefficients]:
    """Loss and gradients of one step; the second, because it stops at the last target module."""
    installed = install(model, updates, targets=targets, granularity=granularity)
    driver = Driver(model, installed)
    for _ in range(2):
        installed.coefficients.zero_grad()
        value, _ = driver.losses(batches)
    remove(model)
    return value, installed.coefficients


def check_gradients(coefficients: Coefficients, expected: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Granularity "module": every gradient is that of its leaf, and not all are zero."""
    largest = 0.0
    for module, own in coefficients.values.items():
        tasks = [t for t, leaf in expected[module.replace("/", ".")].items()][: len(own)]
        wanted = [expected[module.replace("/", ".")][t].grad for t in tasks]
        wanted = torch.stack([torch.zeros((), dtype=own.dtype) if g is None else g for g in wanted])
        got = torch.zeros_like(own) if own.grad is None else own.grad
        torch.testing.assert_close(
            got, wanted, rtol=1e-6, atol=1e-10, msg=lambda m, module=module: f"{module}: {m}"
        )
        largest = max(largest, float(got.abs().max()))
    assert largest > 1e-6


def check_reload(
    fresh: nn.Module, folder: Path, expected: nn.Module, base: nn.Module, batch: Mapping
) -> None:
    """PEFT loads the folder into a fresh base and gives the expected outputs, which are not the base's."""
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(fresh, str(folder)).eval()
    changed = False
    for got, wanted, before in zip(
        outputs(loaded, batch), outputs(expected, batch), outputs(base, batch), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
        changed = changed or not torch.allclose(wanted, before, rtol=1e-3)
    assert changed
