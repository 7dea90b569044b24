"""The scalar formulas of the null-space ratio, written once for every program that needs them.

For one token z with norm2 = ||z||^2 and energy = ||Q_k z||^2:

    omega = sqrt(max(1 - energy / norm2, clamp))          1 for z = 0
    t     = a / (omega norm2)                             0 where omega is at the clamp, z = 0 or a = 0

a is the derivative of the loss in omega; then dL/dz = (t u) z - t Q^T P with u = 1 - omega^2.
All of it is float32. NaN passes through: a comparison that a NaN fails must not replace it.
"""

import triton
import triton.language as tl

# A token with ||z||^2 below 2^-100 counts as zero: beneath it float32 squares lose their digits.
TINY = tl.constexpr(2.0**-100)


@triton.jit
def omega_of(energy, norm2, clamp):
    u = tl.where(norm2 < TINY, 0.0, energy / norm2)
    rest = 1.0 - u
    return tl.sqrt(tl.where(rest < clamp, clamp, rest))


@triton.jit
def scale_of(a, omega, norm2, clamp):
    """t. omega came out of a rounded square root, so the clamp is recognised with 4 float32 ulps to spare."""
    flat = (omega * omega <= clamp * 1.0000005) | (norm2 < TINY) | (a == 0.0)
    return tl.where(flat, 0.0, a / (omega * norm2))


@triton.jit
def load_scales(a_ptr, omega_ptr, at, mask, norm2, clamp):
    """t and t u of one column of the ratio; 0 where masked."""
    a = tl.load(a_ptr + at, mask=mask, other=0.0)
    omega = tl.load(omega_ptr + at, mask=mask, other=1.0)
    t = scale_of(a, omega, norm2, clamp)
    return t, t * (1.0 - omega * omega)
