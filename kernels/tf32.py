"""Rounding to tf32, the 19-bit format in which NVIDIA's matrix units multiply float32 numbers.

The units themselves cut the low 13 bits of a float32 off, which makes every factor too small by 3.5e-4 on
average: the share u = ||P||^2 / ||z||^2 would come out 1.4e-3 too low whatever the dimension, and 1 - u, of
which the ratio is the root, is the small number. Rounded to nearest, the errors of a sum over d cancel.

Operands that pass through registers are rounded there. The other one, the small factor Q or C, is rounded
ahead of the launch: asynchronous matrix instructions read it from shared memory as it is, and in this format
only with unit stride along the contracted dimension, which the same copy provides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Half a unit in the last place of tf32, and the bits that it keeps.
_HALF, _KEPT = 1 << 12, -(1 << 13)
_HALF_BITS, _KEPT_BITS = tl.constexpr(_HALF), tl.constexpr(_KEPT)


@triton.jit
def as_operand(x, PRECISION: tl.constexpr):
    """x as the matrix units are to read it: rounded to tf32, ties away from zero, where float32 meets them
    as tf32; otherwise x. NaN and infinities stay what they are."""
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = (x.to(tl.int32, bitcast=True) + _HALF_BITS) & _KEPT_BITS
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x


def factor_operand(factor: Tensor, contracted: int, precision: str) -> Tensor:
    """The factor of a product as the programs read it: for float32 in "tf32" a rounded copy with unit stride
    along the dimension ``contracted``, otherwise the factor itself."""
    if precision != "tf32" or factor.dtype != torch.float32:
        return factor
    factor = factor.contiguous() if contracted == 1 else factor.T.contiguous().T
    bits = (factor.view(torch.int32) + _HALF) & _KEPT
    return torch.where(factor.isnan(), factor, bits.view(torch.float32))
