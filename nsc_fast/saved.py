"""What autograd keeps for the backward pass, in fewer bytes and with the same values.

Some of the kept tensors follow from something smaller, or from what is kept anyway, without a product:

- outputs of SiLU and GELU, gates and RMS norms, whose inputs are kept as well: they are computed again;
- a wider copy (norms work in float32 on a bfloat16 model): the narrow values are kept, which are the same;
- keys and values repeated for all query heads of their group: one of each group is kept.

A block of a Llama keeps 0.7 of its bytes. What is left (inputs of norms, queries, keys, values and outputs of
attention, gate and up) does not follow from the rest without a product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["compact_saved", "kept_once"]

_Later = Callable[[], Tensor]
_ONCE = "nsc_fast: kept once"


def compact_saved() -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which autograd keeps the smaller form of what it saves, and gets the same bits back."""
    # Several operations save the same tensor: its smaller form is made once.
    made: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def pack(tensor: Tensor) -> _Later:
        if tensor.grad_fn is None:
            return _as_it_is(tensor)
        version, later = made.get(tensor, (None, None))
        if version == tensor._version:
            return later
        later = _smaller(tensor)
        if later is None:
            return _as_it_is(tensor)
        made[tensor] = tensor._version, later
        return later

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda later: later())


def kept_once(results: Any) -> None:
    """Marks what a checkpoint returned: what the operations in it keep can be asked for only once."""
    for tensor in tree_leaves(results):
        if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
            tensor.grad_fn.metadata[_ONCE] = True


def _as_it_is(tensor: Tensor) -> _Later:
    # A graph that holds a tensor which knows the graph would never be freed.
    kept, version = tensor.detach(), tensor._version

    def later() -> Tensor:
        # With hooks, autograd does not look.
        if kept._version != version:
            raise RuntimeError(
                f"a tensor of shape {tuple(kept.shape)} that the backward pass needs was changed in place: "
                "its gradient would be wrong"
            )
        return kept

    return later


def _smaller(tensor: Tensor) -> _Later | None:
    """What makes ``tensor`` from a smaller form, by the operation that it comes from; None if nothing."""
    node = tensor.grad_fn
    name = type(node).__name__
    if (again := _again(node)) is not None:
        return again
    if name == "ToCopyBackward0":
        return _widened(tensor, node)
    return _repeated(tensor, node) if name == "UnsafeViewBackward0" else None


def _again(node: Any) -> _Later | None:
    """Makes the output of an operation from what autograd keeps anyway."""
    known = _AGAIN.get(type(node).__name__)
    return None if known is None or _ONCE in node.metadata else known(node)


def _product(node: Any) -> _Later | None:
    (left, _), (right, _) = node.next_functions
    # Each factor is kept for the gradient of the other, where that has one.
    one = _again(left) if right is None else lambda: node._saved_self
    other = _again(right) if left is None else lambda: node._saved_other
    if one is None or other is None:
        return None
    # A number is kept as a tensor in float64.
    dtype = node._input_metadata[0].dtype
    return lambda: (one() * other()).to(dtype)


def _view(node: Any) -> _Later | None:
    source, shape = _again(node.next_functions[0][0]), node._input_metadata[0].shape
    return None if source is None else lambda: source().view(shape)


def _converted(node: Any) -> _Later | None:
    source, wanted = _again(node.next_functions[0][0]), node._input_metadata[0]
    return None if source is None else lambda: source().to(wanted.device, wanted.dtype)


_AGAIN: dict[str, Callable[[Any], _Later | None]] = {
    "SiluBackward0": lambda node: lambda: F.silu(node._saved_self),
    "GeluBackward0": lambda node: lambda: F.gelu(node._saved_self, approximate=node._saved_approximate),
    "MulBackward0": _product,
    "ViewBackward0": _view,
    "ToCopyBackward0": _converted,
}
"""Operations whose output their own kept inputs give, or those of the operations before them."""


def _widened(tensor: Tensor, node: Any) -> _Later | None:
    source, place = node.next_functions[0]
    dtype = source._input_metadata[place].dtype
    if not dtype.is_floating_point or dtype.itemsize >= tensor.dtype.itemsize:
        return None
    narrow, wide = tensor.detach().to(dtype), tensor.dtype
    return lambda: narrow.to(wide)


def _repeated(tensor: Tensor, node: Any) -> _Later | None:
    """``x.expand(...).reshape(...)``, as transformers' ``repeat_kv`` does it."""
    copied = node.next_functions[0][0]
    if type(copied).__name__ != "CloneBackward0":
        return None
    expanded = copied.next_functions[0][0]
    if type(expanded).__name__ != "ExpandBackward0":
        return None
    shape, before, full = tensor.shape, expanded._saved_self_sym_sizes, node._saved_self_sym_sizes
    if len(before) != len(full):
        return None
    first = tensor.detach().view(full)
    for dim, (old, new) in enumerate(zip(before, full, strict=True)):
        if old != new:
            first = first.narrow(dim, 0, 1)
    first = first.clone()
    return lambda: first.expand(full).reshape(shape)
