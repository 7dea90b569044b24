"""What modules that were trained whole differ by from the base, and which of them may be merged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from nsc_fast.adapters.model import Adapter, AdapterError, Problem
from nsc_fast.dtypes import compute_dtype

__all__ = ["dense_updates"]

_HEAD_NAMES = ("classifier", "score", "qa_outputs", "lm_head", "embed_out", "head", "heads", "cls")
_KEEP = (
    "modules_to_save=keep-separate keeps such modules beside the merge, one per adapter; drop leaves them out"
)


def dense_updates(adapters: Iterable[Adapter], model: nn.Module | None) -> dict[str, dict[str, Tensor]]:
    """``W_k - W0`` of every module that the adapters hold whole, by task; empty where none does.

    Args:
        adapters: read with ``modules_to_save="merge-dense"``.
        model: the base model.

    Raises:
        AdapterError: a head, another shape than the base's, a parameter that the base does not have or that
            it ties to another one, or a module that an adapter has LoRA factors for; all at once.
    """
    adapters = list(adapters)
    holders = [adapter for adapter in adapters if adapter.dense]
    if not holders:
        return {}
    if model is None:
        raise AdapterError(
            f"adapter {holders[0].name!r}",
            Problem(
                "modules_to_save = merge-dense",
                "the difference to the base's weights is merged, and there is no base model",
                "give the base model, or choose keep-separate or drop",
            ),
        )
    tied = _tied(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    lora = {module for adapter in adapters for module in adapter.modules}
    heads = _heads(model)
    for adapter in holders:
        problems = [
            problem
            for path, tensor in adapter.dense.items()
            if (problem := _problem(path, tensor, parameters, tied, lora, heads))
        ]
        if problems:
            raise AdapterError(f"adapter {adapter.name!r}", *dict.fromkeys(problems))
    return {
        adapter.name: {path: _difference(own, parameters[path]) for path, own in adapter.dense.items()}
        for adapter in holders
    }


def _difference(trained: Tensor, parameter: Tensor) -> Tensor:
    base = parameter.detach().to(compute_dtype(parameter.dtype))
    return trained.to(base) - base


def _problem(
    path: str,
    tensor: Tensor,
    parameters: Mapping[str, Tensor],
    tied: Mapping[str, str],
    lora: set[str],
    heads: tuple[str, ...],
) -> Problem | None:
    module = path.rpartition(".")[0]
    subject = f"module {module!r} of modules_to_save"
    head = next((h for h in heads if module == h or module.startswith(h + ".")), None)
    if head is not None or any(part in _HEAD_NAMES for part in module.split(".")):
        return Problem(subject, "is a head: what it gives means something else in every task", _KEEP)
    base = parameters.get(path)
    if base is None or not base.is_floating_point():
        what = "is no parameter of the base" if base is None else f"is packed in the base ({base.dtype})"
        return Problem(f"tensor {path!r}", f"{what}, so there is no difference to merge", _KEEP)
    if base.shape != tensor.shape:
        shapes = f"{tuple(tensor.shape)}, in the base {tuple(base.shape)}"
        return Problem(subject, f"has another shape: {path!r} is {shapes}", _KEEP)
    if path in tied:
        return Problem(subject, f"shares {path!r} with {tied[path]!r} in the base", _KEEP)
    if any(name == module or name.startswith(module + ".") for name in lora):
        return Problem(subject, "is adapted by LoRA as well", "train it in one of the two ways")
    return None


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that a model class puts on its base model, and of its output embeddings."""
    prefix = getattr(model, "base_model_prefix", "")
    inner = getattr(model, prefix, None) if prefix else None
    heads = [] if not isinstance(inner, nn.Module) else [n for n, _ in model.named_children() if n != prefix]
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return (*heads, *(name for name, module in model.named_modules() if module is output))


def _tied(model: nn.Module) -> dict[str, str]:
    """Path -> another path of the same parameter."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name:
            tied |= {name: other, other: name}
    return tied
