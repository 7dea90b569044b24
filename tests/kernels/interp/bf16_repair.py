"""Makes bfloat16 right in Triton's interpreter.

The interpreter keeps bfloat16 blocks as their raw 16-bit patterns. Its arithmetic, sums and products work on
those patterns as if they were integers, and its casts cut the lower half off instead of rounding. Here every
operation lifts such blocks to float32 first, and casts round to nearest even, as devices do.
"""

import functools

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_LIFTED = ("binary_op", "unary_op", "ternary_op", "create_fma", "create_dot", "create_rsqrt")


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values to bfloat16 patterns, nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    odd = (bits >> 16) & 1
    rounded = ((bits + 0x7FFF + odd) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bfloat16(x: object) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16 and x.data.dtype == np.uint16


def _lift(x: object) -> object:
    return TensorHandle(to_float32(x.data), tl.float32) if _is_bfloat16(x) else x


def _lifted(original):
    @functools.wraps(original)
    def wrapper(self, *args):
        if not any(_is_bfloat16(a) for a in args):
            return original(self, *args)
        result = original(self, *[_lift(a) for a in args])
        wants_bfloat16 = not any(isinstance(a, TensorHandle) and a.dtype.scalar == tl.float32 for a in args)
        if wants_bfloat16 and result.data.dtype == np.float32:
            return TensorHandle(to_bfloat16(result.data), tl.bfloat16)
        return result

    return wrapper


def _cast(original):
    def cast_impl(self, source, destination):
        target = destination.scalar
        if target == tl.bfloat16:
            if _is_bfloat16(source):
                return TensorHandle(source.data.copy(), target)
            return TensorHandle(to_bfloat16(source.data.astype(np.float32)), target)
        if _is_bfloat16(source) and target == tl.float32:
            return _lift(source)
        return original(self, _lift(source), destination)

    return cast_impl


def install() -> None:
    """Repairs the interpreter of this process; a second call does nothing."""
    if getattr(InterpreterBuilder, "_bf16_repaired", False):
        return
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    for name in _LIFTED:
        setattr(InterpreterBuilder, name, _lifted(getattr(InterpreterBuilder, name)))
    reduce_sum = interpreter.ReduceOps.sum

    def checked_sum(self, block, *args, **kwargs):
        inner = block[0] if isinstance(block, tuple) else block
        if _is_bfloat16(inner.handle):
            raise TypeError("sum of a bfloat16 block: lift it to float32 in the kernel")
        return reduce_sum(self, block, *args, **kwargs)

    interpreter.ReduceOps.sum = checked_sum
    InterpreterBuilder._bf16_repaired = True
