"""The oracle: textbook formulas in plain torch, with autograd, in the dtype of the inputs.

Nothing here is fast or numerically clever. Tests and benchmarks import it and run it in float64; the fast
paths are compared with it, forward and every gradient. Source: "Label-Free Cross-Task LoRA Merging with
Null-Space Compression" (Lee, Jeong, Yoon; CVPR 2026), whose ratio it follows term by term.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["CLAMP", "TINY", "merged_linear", "null_space_ratio", "ratio_loss"]

CLAMP = 1e-6
"""Smallest value of ``1 - u`` (u: the share of a token's energy inside the row space). One number for every
dtype and backend, just above the rounding of a float32 sum over a few thousand features."""

TINY = 2.0**-100
"""A token with ``||z||^2`` below this counts as zero: beneath it float32 squares lose their digits."""


def null_space_ratio(z: Tensor, down: Tensor, *, clamp: float = CLAMP) -> Tensor:
    """``omega(z) = sqrt(1 - z^T A^T (A A^T)^+ A z / ||z||^2)``.

    Args:
        z: activations, ``(..., d_in)``.
        down: A, ``(r, d_in)``; may be rank-deficient or zero.
        clamp: lower bound of the radicand; there the gradient is 0.

    Returns:
        omega, ``(...)``; 1 (with gradient 0) for ``z = 0``.
    """
    gram_inverse = torch.linalg.pinv(down @ down.T, hermitian=True)
    p = z @ down.T
    inside = ((p @ gram_inverse) * p).sum(-1)
    norm2 = z.square().sum(-1)
    u = torch.where(norm2 > TINY, inside / torch.where(norm2 > TINY, norm2, 1.0), 0.0)
    radicand = 1.0 - u
    return torch.where(radicand > clamp, radicand, clamp).sqrt()


def ratio_loss(z: Tensor, down: Tensor, mask: Tensor | None = None) -> Tensor:
    """Masked mean of the null-space ratio over the tokens of ``z``; scalar."""
    omega = null_space_ratio(z, down)
    if mask is None:
        return omega.mean()
    weight = mask.to(omega.dtype)
    return (omega * weight).sum() / weight.sum()


def merged_linear(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scalings: Sequence[float],
    coefficients: Sequence[Tensor] | Tensor,
) -> Tensor:
    """``z W^T + bias`` with ``W = W0 + sum_k lambda_k s_k B_k A_k`` written out.

    Args:
        z: ``(..., d_in)``.
        weight: W0, ``(d_out, d_in)``.
        bias: ``(d_out,)`` or None.
        downs, ups, scalings: A_k ``(r_k, d_in)``, B_k ``(d_out, r_k)`` and s_k of the K tasks.
        coefficients: lambda_k, K scalars.
    """
    for a, b, s, coefficient in zip(downs, ups, scalings, coefficients, strict=True):
        weight = weight + coefficient * s * (b @ a)
    return torch.nn.functional.linear(z, weight, bias)
