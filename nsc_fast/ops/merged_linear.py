"""Linear layers merged with K adapters, without the merged weights.

    P = Z Q^T,    Y = Z W0^T + bias + (P * c) C^T,    omega_n = sqrt(1 - ||P_n[own block]||^2 / ||z_n||^2)

C = [C_1 ... C_K] and Q = [Q_1; ...; Q_K] are the stacked canonical factors, c the merge coefficients spread
over the stacked columns, and the ratio of each token is that of its own task. Backward, with G = dL/dY and
``t = (dL/domega) / (omega ||z||^2)``:

    H = G C,    dL/dc_j = sum_n P_nj H_nj,    dP = H * c - [own block] t P,    dZ = G W0 + dP Q + (t u) Z

The projection P may enter a loss as well; its gradient is one more term of dP.

Instead of c there may be a core X ``(R, R)``, of which ``diag(c)`` is a special case: P X^T takes the place
of P * c, and ``dL/dX = H^T P``, ``dP = H X - ...``.

Siblings are layers that receive the same Z (queries, keys and values; gate and up). Their Q are stacked once
more: one read of Z projects it for all, and all their products accumulate onto one dZ.

No ``d_out x d_in`` gradient or update exists. What is kept for the backward: P, and two scalars a token and
a reference to Z where the ratio is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..reference import CLAMP
from . import dispatch
from .merged_steps import Sibling, backward, gradients, outputs, project, save, unflatten
from .torch_steps import dense_rows

__all__ = ["Merged", "Sibling", "low_rank_update", "merged_linear", "merged_siblings"]


class Merged(NamedTuple):
    """Output of a merged layer.

    Attributes:
        y: ``(..., d_out)`` in the dtype of z, or of the base layer's output where that is given.
        omega: ``(N,)`` null-space ratio of every token under its own task, in float32 (float64 for float64
            input), or None.
        p: ``(N, R)`` projection ``Z Q^T``, in the stacked order; in float32 (float64 for float64 input) in
            plain torch, in the dtype of z from a kernel.
    """

    y: Tensor
    omega: Tensor | None
    p: Tensor


def merged_linear(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    basis: Tensor,
    columns: Tensor,
    segment: Tensor,
    coefficients: Tensor,
    *,
    num_tasks: int,
    task: Tensor | None = None,
    clamp: float = CLAMP,
    impl: str = "auto",
) -> Merged:
    """``z W0^T + bias + ((z Q^T) * c) C^T`` and the own-task null-space ratio of every token.

    Args:
        z: ``(..., d_in)``; differentiable.
        weight, bias, columns, segment, coefficients: see :class:`Sibling`.
        basis: Q, ``(R, d_in)``, orthonormal rows within a task.
        num_tasks: K.
        task: ``(N,)`` int32, segment of each token's own task, -1 for none; None: no ratio is formed.
        clamp: see :func:`nsc_fast.ops.null_space_ratio`.
        impl: "auto", "triton" or "torch".

    Returns:
        y, omega (None without ``task``) and the projection, all differentiable; see :class:`Merged`.
    """
    layer = Sibling(columns, segment, coefficients, weight, bias)
    how = {"num_tasks": num_tasks, "task": task, "clamp": clamp, "impl": impl}
    return merged_siblings(z, basis, segment, (layer,), **how)[0]


def low_rank_update(
    y: Tensor,
    z: Tensor,
    basis: Tensor,
    columns: Tensor,
    segment: Tensor,
    coefficients: Tensor,
    *,
    num_tasks: int,
    task: Tensor | None = None,
    clamp: float = CLAMP,
    impl: str = "auto",
) -> Merged:
    """``y + ((z Q^T) * c) C^T`` for a base layer of any kind whose output ``y (..., d_out)`` is given.

    Arguments and results as in :func:`merged_linear`; differentiable in ``y`` as well.
    """
    layer = Sibling(columns, segment, coefficients, y=y)
    how = {"num_tasks": num_tasks, "task": task, "clamp": clamp, "impl": impl}
    return merged_siblings(z, basis, segment, (layer,), **how)[0]


def merged_siblings(
    z: Tensor,
    basis: Tensor,
    segment: Tensor,
    layers: Sequence[Sibling],
    *,
    num_tasks: int,
    task: Tensor | None = None,
    clamp: float = CLAMP,
    impl: str = "auto",
) -> list[Merged]:
    """:func:`merged_linear` or :func:`low_rank_update` for S layers that receive the same ``z``.

    Args:
        z: ``(..., d_in)``; differentiable.
        basis: the Q of all layers, one below the other, ``(R_1 + ... + R_S, d_in)``.
        segment: ``s * K + k`` for each row of the basis, int32: layer s, task k.
        layers: the rest of each.
        num_tasks: K, the same tasks in the same order at all layers.
        task: ``(N,)`` int32 as in :func:`merged_linear`, for all layers; None: no ratios are formed.
        clamp, impl: as in :func:`merged_linear`.
    """
    kind, layers = z.device.type, list(layers)
    cast = kind != "meta" and torch.is_autocast_enabled(kind)
    if cast or torch.compiler.is_compiling():
        layers = [_with_output(one) for one in layers]
    given = next((one.y for one in layers if isinstance(one.y, Tensor)), None)
    if cast and any(one.weight is not None for one in layers):
        z = z.to(torch.get_autocast_dtype(kind))
        layers = [one if one.weight is None else _rounded(one, z.dtype) for one in layers]
    elif given is not None:
        z = z.to(given.dtype)
    leading, z = z.shape[:-1], dense_rows(z.reshape(-1, z.shape[-1]))
    how = num_tasks, task, clamp, dispatch.resolve(impl, z.device, z.dtype, basis.shape[0])
    ranks = [one.columns.shape[1] for one in layers]
    if torch.compiler.is_compiling():
        bases = basis.split(ranks)
        done = [_op(z, q, *one, *how) for q, one in zip(bases, layers, strict=True)]
        parts = [(y, omega, p) for y, omega, p, _ in done]
    else:
        flat = [tensor for one in layers for tensor in one._replace(bias=None, y=None)]
        *stand_ins, omega, p, _ = _MergedLinear.apply(z, basis, segment, *how, *flat)
        layers = [_with_output(one) for one in layers]
        ys = _Outputs.apply((z, p, layers, how[-1]), *stand_ins, *(one.y for one in layers))
        omegas = omega.unbind(1) if omega.ndim == 2 else (omega,) * len(layers)
        parts = zip(ys, omegas, p.split(ranks, dim=1) if len(layers) > 1 else (p,), strict=True)
    return [
        Merged(y.view(*leading, y.shape[-1]), None if task is None else omega, p) for y, omega, p in parts
    ]


def _with_output(layer: Sibling) -> Sibling:
    """With the base layer's output as a matrix, made now if it waits to be."""
    if layer.y is None:
        return layer
    y = layer.y if isinstance(layer.y, Tensor) else layer.y()
    return layer._replace(y=y.reshape(-1, y.shape[-1]))


def _rounded(layer: Sibling, dtype: torch.dtype) -> Sibling:
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return layer._replace(weight=layer.weight.to(dtype), bias=bias)


class _MergedLinear(torch.autograd.Function):
    """Eager mode: any number of siblings, without the dispatcher's toll.

    Keeps what the backward pass needs and does all of it, but leaves the outputs to :class:`_Outputs`, for
    which empty ones of their shape stand in. A checkpointed block is computed again up to the last tensor
    that is kept: the products of its last layer come after that, and are not.
    """

    # One method instead of setup_context: torch inspects the signature anew on each call of the latter.
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        q: Tensor,
        segment: Tensor,
        num_tasks: int,
        task: Tensor | None,
        clamp: float,
        impl: str,
        *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:
        layers = unflatten(flat)
        omega, p, norm2 = project(z, q, segment, len(layers), num_tasks, task, clamp, impl)
        ctx.mark_non_differentiable(norm2)
        save(ctx, z, q, layers, num_tasks, task, clamp, impl, omega, p, norm2)
        return *(z.new_empty(1).expand(len(z), len(one.columns)) for one in layers), omega, p, norm2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *grad_ys, grad_omega, grad_p, _ = grads
        dz, dcoefs = gradients(ctx, grad_ys, grad_omega, grad_p, backward)
        flat = [g for dc in dcoefs for g in (None, None, dc, None, None, None)]
        return dz, None, None, None, None, None, None, *flat


class _Outputs(torch.autograd.Function):
    """The outputs, which keep nothing. Their gradients go to :class:`_MergedLinear` as they are."""

    @staticmethod
    def forward(
        ctx: Any, given: tuple[Tensor, Tensor, Sequence[Sibling], str], *stand_ins_and_ys: Tensor | None
    ) -> tuple[Tensor, ...]:
        # Autograd does not look into the tuple: z, P and the coefficients get no gradient from here.
        ctx.set_materialize_grads(False)
        return tuple(outputs(*given))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1 + len(grads) :]
        dys = (g if need else None for g, need in zip(grads, wanted, strict=True))
        return None, *grads, *dys


# For torch.compile: the same for one layer, as operations that the compiler knows.


def _forward_one(
    z: Tensor,
    q: Tensor,
    c: Tensor,
    segment: Tensor,
    coefficients: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    num_tasks: int,
    task: Tensor | None,
    clamp: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, layer = dense_rows(z), Sibling(c, segment, coefficients, weight, bias, y)
    omega, p, norm2 = project(z, q, segment, 1, num_tasks, task, clamp, impl)
    return outputs(z, p, [layer], impl)[0], omega, p, norm2


def _backward_one(
    g: Tensor | None,
    grad_omega: Tensor | None,
    grad_p: Tensor | None,
    z: Tensor | None,
    q: Tensor,
    c: Tensor,
    segment: Tensor,
    coefficients: Tensor,
    weight: Tensor | None,
    num_tasks: int,
    task: Tensor | None,
    p: Tensor,
    omega: Tensor,
    norm2: Tensor,
    clamp: float,
    impl: str,
    want_dz: bool,
    want_dcoef: bool,
) -> tuple[Tensor, Tensor]:
    layer = Sibling(c, segment, coefficients, weight)
    state = [layer], num_tasks, task, p, omega, norm2, clamp, impl
    dz, (dcoef,) = backward([g], grad_omega, grad_p, z, q, *state, want_dz, want_dcoef)
    return dz, dcoef


_op = torch.library.custom_op("nsc_fast::merged_linear", _forward_one, mutates_args=())
_backward_op = torch.library.custom_op("nsc_fast::merged_linear_backward", _backward_one, mutates_args=())


@_op.register_fake
def _(z, q, c, segment, coefficients, weight, bias, y, num_tasks, task, clamp, impl):
    n, wide = z.shape[0], compute_dtype(z.dtype)
    p_dtype = wide if impl == "torch" else z.dtype
    scalars = 0 if task is None else n
    return (
        z.new_empty((n, c.shape[0])),
        z.new_empty((scalars,), dtype=z.dtype if task is None else wide),
        z.new_empty((n, q.shape[0]), dtype=p_dtype),
        z.new_empty((scalars,), dtype=z.dtype if task is None else wide),
    )


@_backward_op.register_fake
def _(
    g, grad_omega, grad_p, z, q, c, segment, coefficients, weight, num_tasks, task, p, omega, norm2, clamp,
    impl, want_dz, want_dcoef,
):  # fmt: skip
    dtype = next((t.dtype for t in (z, g) if t is not None), p.dtype)
    return (
        p.new_empty((p.shape[0] if want_dz else 0, q.shape[1]), dtype=dtype),
        torch.empty_like(coefficients) if want_dcoef else coefficients.new_empty(0),
    )


def _save_one(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    z, q, *layer, num_tasks, task, clamp, impl = inputs
    layer = Sibling(*layer)
    ctx.want_dy = layer.y is not None and layer.y.requires_grad
    save(ctx, z, q, [layer], num_tasks, task, clamp, impl, *output[1:])


def _grad_one(ctx: Any, g: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    def run(grad_ys, grad_omega, grad_p, z, q, layers, *state):
        c, segment, coefficients, weight, _, _ = layers[0]
        dz, dcoef = _backward_op(*grad_ys, grad_omega, grad_p, z, q, c, segment, coefficients, weight, *state)
        return dz, [dcoef]

    dz, (dcoef,) = gradients(ctx, [g], *grads[:2], run)
    return dz, None, None, None, dcoef, None, None, g if ctx.want_dy else None, None, None, None, None


_op.register_autograd(_grad_one, setup_context=_save_one)
