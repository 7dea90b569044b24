"""A device that is not the CPU, for machines without one.

Its tensors keep their numbers in the host's memory and say that they are somewhere else; its operations are
the CPU's, with what a real device insists on:

 - tensors of two devices do not meet, except as numbers without dimensions, in copies, and as indices;
 - ``numpy`` does not reach its memory;
 - a number that the host wants, or a shape that depends on values, makes the host wait.

The last are counted in :data:`WAITS`, and the bytes that cross over in :data:`CROSSED`. torch has one place
for a device from outside; taking it cannot be undone, so these tests have a process of their own.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

NAME = "standin"

WAITS: Counter[str] = Counter()
"""Operation -> how often the host waited for it."""

CROSSED: Counter[str] = Counter()
""""there" and "back" -> bytes."""

RAN: Counter[str] = Counter()
"""Operation -> how often it ran on the device."""

_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}
_WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "_unique2",
    "unique_dim",
)


def available() -> bool:
    """Whether this torch takes a device that is written in Python."""
    from torch.utils import backend_registration

    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


class There(Tensor):
    """A tensor on the device; ``here`` holds its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            layout=here.layout,
            device=torch.device(NAME, 0),
        )
        made.here = here
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, dict(kwargs or {}))

    def __repr__(self, **_: Any) -> str:
        return f"There({Tensor.__repr__(self.here)})"

    def __reduce_ex__(self, protocol: int) -> Any:
        """As a checkpoint that is read with ``map_location="cpu"`` gives it back."""
        return self.here.__reduce_ex__(protocol)

    def tolist(self) -> Any:
        WAITS["tolist"] += 1
        return self.here.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu() first.")

    def data_ptr(self) -> int:
        """A number, as of any device."""
        return self.here.data_ptr()


def here(value: Any) -> Any:
    """The numbers of a tensor of the device; anything else as it is."""
    return value.here if isinstance(value, There) else value


def _run(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    name = operation.overloadpacket.__name__
    RAN[name] += 1
    if operation in _COPIES:
        return _copy(operation, args, kwargs)
    checked = tree_leaves((args[0], *args[2:])) if operation in _INDEXED else tensors
    if len({isinstance(x, There) for x in checked if isinstance(x, Tensor) and x.ndim}) > 1:
        shapes = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tensors)
        raise RuntimeError(f"{name}: expected all tensors to be on the same device ({shapes})")
    if operation in _INDEXED:
        _count_indices(args[1])
    if name in _WAITING:
        WAITS[name] += 1
    there = True
    if (device := kwargs.get("device")) is not None:
        there = torch.device(device).type == NAME
        kwargs["device"] = torch.device("cpu")
    out = operation(*tree_map(here, args), **tree_map(here, kwargs))
    # What an operation works on in place stays the tensor that it was.
    known = {id(x.here): x for x in tensors if isinstance(x, There)}

    def answer(value: Any) -> Any:
        if not isinstance(value, Tensor) or not there:
            return value
        return known[id(value)] if id(value) in known else There(value)

    return tree_map(answer, out)


def _count_indices(indices: Any) -> None:
    for index in tree_leaves(indices):
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            WAITS["boolean index"] += 1
        elif isinstance(index, Tensor) and not isinstance(index, There):
            CROSSED["there"] += index.nbytes


def _copy(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    if operation is _aten.copy_.default:
        return _copy_from(args[1], args[0])
    (source,) = args
    there = torch.device(kwargs.get("device") or source.device).type == NAME
    _count_copy(source, there)
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    out = operation(here(source), **kwargs)
    return There(out) if there else out


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _count_copy(source, isinstance(target, There))
    here(target).copy_(here(source))
    return target


def _count_copy(source: Tensor, there: bool) -> None:
    if there != isinstance(source, There):
        CROSSED["there" if there else "back"] += source.nbytes
        if not there:
            WAITS["copy to the host"] += 1


def _number(tensor: There) -> Any:
    WAITS["_local_scalar_dense"] += 1
    return tensor.here.item()


class _Module(ModuleType):
    """What ``torch.cuda`` is for CUDA."""

    def __init__(self) -> None:
        super().__init__(f"torch.{NAME}")

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Random numbers come from the CPU's generator."""

    def device(self, device: Any) -> Any:
        return nullcontext()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _factory(operation: Any) -> Any:
    def made(*args: Any, **kwargs: Any) -> There:
        own = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "layout")}
        return There(operation(*args, **own, device="cpu"))

    return made


def install() -> torch.library.Library:
    """Adds the device to torch, for the rest of the process; the answer must be kept alive."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    kernels = {
        "_copy_from": _copy_from,
        "_local_scalar_dense": _number,
        "empty.memory_format": _factory(_aten.empty.memory_format),
        "empty_strided": _factory(_aten.empty_strided.default),
        "arange": _factory(_aten.arange.default),
        "arange.start": _factory(_aten.arange.start),
        "arange.start_step": _factory(_aten.arange.start_step),
        "eye": _factory(_aten.eye.default),
        "eye.m": _factory(_aten.eye.m),
    }
    for name, kernel in kernels.items():
        library.impl(name, kernel, "PrivateUse1")
    return library
