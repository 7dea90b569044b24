"""The null-space ratio as a differentiable operation with a hand-written backward.

    omega_g(z) = ||Proj_N(A_g) z|| / ||z|| = sqrt(1 - ||Q_g z||^2 / ||z||^2)
    d omega_g / dz = (u_g z - Q_g^T Q_g z) / (omega_g ||z||^2),      u_g = ||Q_g z||^2 / ||z||^2

for the stacked orthonormal row bases Q_g of any number of adapters: one read of z serves all of them.
Source: "Label-Free Cross-Task LoRA Merging with Null-Space Compression" (CVPR 2026); with an orthonormal
basis the Gram inverse of the paper's formula is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..reference import CLAMP
from . import dispatch
from .torch_steps import dense_rows

__all__ = ["null_space_ratio"]


def null_space_ratio(
    z: Tensor,
    basis: Tensor,
    *,
    ranks: Sequence[int] | None = None,
    weight: Tensor | None = None,
    clamp: float = CLAMP,
    impl: str = "auto",
    check: bool = True,
) -> Tensor:
    """Null-space ratio of every token, or its weighted mean; differentiable in ``z``.

    Args:
        z: activations, ``(..., d)``; float64, float32, bfloat16 or float16, any strides.
        basis: ``(R, d)``, orthonormal rows (``nsc_fast.factors.row_basis``); several adapters stacked.
        ranks: ranks of the stacked adapters, summing to R. None: one adapter.
        weight: weights of the tokens, shape ``z.shape[:-1]``, an attention mask for example. When given, the
            result is ``sum_n w_n omega_n / sum_n w_n``.
        clamp: lower bound of ``1 - u``; at the bound omega is ``sqrt(clamp)`` and its gradient 0.
        impl: "auto", "triton" or "torch".
        check: whether to refuse weights that sum to zero. A GPU has to be waited for to know it; without the
            check, and always inside ``torch.compile``, the result is NaN then.

    Returns:
        omega in float32 (float64 for float64 input): ``(...)`` for one adapter, ``(..., G)`` for G stacked
        ones; without the leading shape when ``weight`` is given. ``z = 0`` gives 1 with gradient 0.

    Raises:
        ValueError: shapes that do not fit, no token to average over, or weights that sum to zero.
    """
    _check(z, basis, ranks)
    sizes = [basis.shape[0]] if ranks is None else list(ranks)
    flat = z.reshape(-1, z.shape[-1])
    # Graphs hold constants of their own, and other kinds of tensors (fake ones) must not be kept.
    plain = not torch.compiler.is_compiling() and type(z) in (Tensor, torch.nn.Parameter)
    segment = (_kept_segment if plain else _segment)(tuple(sizes), z.device)
    impl = dispatch.resolve(impl, z.device, z.dtype, basis.shape[0])
    run = _op if torch.compiler.is_compiling() else _NullSpaceRatio.apply
    omega, _, _ = run(flat, basis.detach(), segment, len(sizes), float(clamp), impl)
    shape = z.shape[:-1] if ranks is None else (*z.shape[:-1], len(sizes))
    if weight is None:
        return omega.view(shape)
    return _weighted_mean(omega, weight, z.shape[:-1], check).view(shape[len(z.shape) - 1 :])


def _segment(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """``(R,)`` int32: which adapter a row of the basis belongs to."""
    columns = [g for g, rank in enumerate(ranks) for _ in range(rank)]
    return torch.tensor(columns, dtype=torch.int32, device=device)


@lru_cache(maxsize=256)
def _kept_segment(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    # Copied to a device once, not at every call. Made in inference mode, it could not be used in training.
    with torch.inference_mode(False):
        return _segment(ranks, device)


def _weighted_mean(omega: Tensor, weight: Tensor, leading: torch.Size, check: bool) -> Tensor:
    """``(N, G)`` ratios to ``(G,)`` means."""
    if weight.shape != leading:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected one weight a token, {tuple(leading)}"
        )
    w = weight.reshape(-1, 1).to(omega.dtype)
    total = w.sum()
    if not torch.compiler.is_compiling() and (w.numel() == 0 or (check and not bool(total > 0))):
        if bool((w < 0).any()):
            raise ValueError(
                "the weights are negative, as in a mask that is added to attention scores; pass 1 for real "
                "tokens and 0 for padding"
            )
        raise ValueError(
            "the weights sum to zero: the batch is empty or fully masked; pass at least one real token"
        )
    # Tokens of weight 0 are excluded rather than multiplied: padding may hold NaN.
    return torch.where(w != 0, omega * w, 0.0).sum(0) / total


def _check(z: Tensor, basis: Tensor, ranks: Sequence[int] | None) -> None:
    if z.ndim < 1 or basis.ndim != 2 or z.shape[-1] != basis.shape[1]:
        raise ValueError(
            f"z has shape {tuple(z.shape)} and the basis {tuple(basis.shape)}; "
            "expected (..., d) and (R, d) with the same d"
        )
    if not z.is_floating_point() or not basis.is_floating_point():
        raise ValueError(f"z and the basis must be floating point, got {z.dtype} and {basis.dtype}")
    if ranks is not None and (sum(ranks) != basis.shape[0] or min(ranks, default=-1) < 0):
        raise ValueError(f"ranks {list(ranks)} do not sum to the {basis.shape[0]} rows of the basis")


def _forward(
    z: Tensor, q: Tensor, segment: Tensor, num_segments: int, clamp: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(z.device.type, enabled=False):
        out = dispatch.steps(impl).project(dense_rows(z), q, segment, num_segments, clamp=clamp)
    return out.omega, out.p, out.norm2


def _backward(
    grad_omega: Tensor,
    z: Tensor,
    q: Tensor,
    p: Tensor,
    norm2: Tensor,
    omega: Tensor,
    segment: Tensor,
    clamp: float,
    impl: str,
) -> Tensor:
    with torch.autocast(z.device.type, enabled=False):
        return dispatch.steps(impl).ratio_backward(
            dense_rows(z), q, p, norm2, omega, grad_omega.contiguous(), segment, clamp=clamp
        )


_op = torch.library.custom_op("nsc_fast::null_space_ratio", _forward, mutates_args=())
_backward_op = torch.library.custom_op("nsc_fast::null_space_ratio_backward", _backward, mutates_args=())


@_op.register_fake
def _(z, q, segment, num_segments, clamp, impl):
    n, wide = z.shape[0], compute_dtype(z.dtype)
    p_dtype = wide if impl == "torch" else z.dtype
    return (
        z.new_empty((n, num_segments), dtype=wide),
        z.new_empty((n, q.shape[0]), dtype=p_dtype),
        z.new_empty((n,), dtype=wide),
    )


@_backward_op.register_fake
def _(grad_omega, z, q, p, norm2, omega, segment, clamp, impl):
    return z.new_empty(z.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, q, segment, _, ctx.clamp, ctx.impl = inputs
    omega, p, norm2 = output
    ctx.save_for_backward(z, q, p, norm2, omega, segment)


def _grad(ctx: Any, grad_omega: Tensor, run: Callable[..., Tensor]) -> tuple[Tensor | None, ...]:
    z, q, p, norm2, omega, segment = ctx.saved_tensors
    dz = run(grad_omega, z, q, p, norm2, omega, segment, ctx.clamp, ctx.impl)
    return dz, None, None, None, None, None


_op.register_autograd(lambda ctx, g, *_: _grad(ctx, g, _backward_op), setup_context=_save)


class _NullSpaceRatio(torch.autograd.Function):
    """The same operation without the dispatcher's toll, for eager mode."""

    # One method instead of setup_context: torch inspects the signature anew on each call of the latter.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _forward(*inputs)
        ctx.mark_non_differentiable(*output[1:])
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_omega: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return _grad(ctx, grad_omega, _backward)
