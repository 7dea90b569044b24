"""A linear layer merged with K adapters, without the merged weight.

    P = Z Q^T,    Y = Z W0^T + bias + (P * c) C^T,    omega_n = sqrt(1 - ||P_n[own block]||^2 / ||z_n||^2)

C = [C_1 ... C_K] and Q = [Q_1; ...; Q_K] are the stacked canonical factors, c the merge coefficients spread
over the stacked columns, and the ratio of each token is that of its own task. Backward, with G = dL/dY and
``t = (dL/domega) / (omega ||z||^2)``:

    H = G C,    dL/dc_j = sum_n P_nj H_nj,    dP = H * c - [own block] t P,    dZ = G W0 + dP Q + (t u) Z

The projection P may enter a loss as well; its gradient is one more term of dP.

No ``d_out x d_in`` gradient or update exists. What is kept for the backward: P, and two scalars a token and
a reference to Z where the ratio is wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import CLAMP
from . import dispatch
from .torch_steps import compute_dtype, dense_rows

__all__ = ["Merged", "low_rank_update", "merged_linear"]


class Merged(NamedTuple):
    """Output of a merged layer.

    Attributes:
        y: ``(..., d_out)`` in the dtype of z.
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
        weight: W0, ``(d_out, d_in)``, frozen; a transposed view is fine (GPT-2's Conv1D).
        bias: ``(d_out,)`` or None, frozen.
        basis: Q, ``(R, d_in)``, orthonormal rows within a task.
        columns: C, ``(d_out, R)``.
        segment: ``(R,)`` int32, index of the task of each stacked column.
        coefficients: ``(K,)`` per task or ``(R,)`` per singular direction; differentiable.
        num_tasks: K.
        task: ``(N,)`` int32, segment of each token's own task, -1 for none; None: no ratio is formed.
        clamp: see :func:`nsc_fast.ops.null_space_ratio`.
        impl: "auto", "triton" or "torch".

    Returns:
        y, omega (None without ``task``) and the projection, all differentiable; see :class:`Merged`.
    """
    if torch.is_autocast_enabled(z.device.type):
        dtype = torch.get_autocast_dtype(z.device.type)
        z, weight = z.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    return _call(z, None, weight, bias, basis, columns, segment, coefficients, num_tasks, task, clamp, impl)


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
    return _call(
        z.to(y.dtype), y, None, None, basis, columns, segment, coefficients, num_tasks, task, clamp, impl
    )


def _call(
    z: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    basis: Tensor,
    columns: Tensor,
    segment: Tensor,
    coefficients: Tensor,
    num_tasks: int,
    task: Tensor | None,
    clamp: float,
    impl: str,
) -> Merged:
    flat = z.reshape(-1, z.shape[-1])
    flat_y = None if y is None else y.reshape(-1, y.shape[-1])
    impl = dispatch.resolve(impl, z.device, z.dtype, basis.shape[0])
    run = _op if torch.compiler.is_compiling() else _MergedLinear.apply
    out, omega, p, _ = run(
        flat, flat_y, weight, bias, basis, columns, segment, coefficients, num_tasks, task, clamp, impl
    )
    return Merged(out.view(*z.shape[:-1], columns.shape[0]), None if task is None else omega, p)


def _forward(
    z: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    q: Tensor,
    c: Tensor,
    segment: Tensor,
    coefficients: Tensor,
    num_tasks: int,
    task: Tensor | None,
    clamp: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y ``(N, d_out)``, omega ``(N,)``, P ``(N, R)``, norm2 ``(N,)``; empty where no ratio is wanted."""
    steps = dispatch.steps(impl)
    with torch.autocast(z.device.type, enabled=False):
        projection = steps.project(
            dense_rows(z), q, segment, num_tasks, task=task, clamp=clamp, ratio=task is not None
        )
        out = steps.low_rank_output(projection.p, c, _spread(coefficients, segment), bias=bias, dtype=z.dtype)
        # The product with the frozen weight is the large one: it accumulates onto the small one.
        if weight is not None:
            out.addmm_(z, weight.t())
        if y is not None:
            out.add_(y)
    if task is None:
        return out, z.new_empty(0), projection.p, z.new_empty(0)
    return out, projection.omega, projection.p, projection.norm2


def _backward(
    g: Tensor | None,
    grad_omega: Tensor | None,
    grad_p: Tensor | None,
    z: Tensor | None,
    weight: Tensor | None,
    q: Tensor,
    c: Tensor,
    segment: Tensor,
    coefficients: Tensor,
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
    """dZ ``(N, d_in)`` and the coefficients' gradient; empty where not wanted."""
    steps = dispatch.steps(impl)
    with torch.autocast(p.device.type, enabled=False):
        dp, dcoef, row_scale = steps.coefficient_grads(
            g,
            c,
            p,
            _spread(coefficients, segment),
            segment,
            num_tasks,
            task=task,
            a=grad_omega if task is not None and want_dz else None,
            omega=omega,
            norm2=norm2,
            clamp=clamp,
            per_segment=coefficients.shape != segment.shape,
            want_dp=want_dz,
            want_dcoef=want_dcoef,
        )
        if dcoef is None:
            dcoef = coefficients.new_zeros(coefficients.shape if want_dcoef else 0)
        if want_dz and grad_p is not None:
            dp = grad_p.to(p.dtype) if dp is None else dp + grad_p
        dtype = z.dtype if z is not None else (g.dtype if g is not None else p.dtype)
        if not want_dz or dp is None:
            empty = (p.shape[0] if want_dz else 0, q.shape[1])
            return p.new_zeros(empty, dtype=dtype), dcoef.to(coefficients.dtype)
        dz = steps.input_gradient(
            dp, q, row_scale=row_scale, z=None if row_scale is None else dense_rows(z), dtype=dtype
        )
        if weight is not None and g is not None:
            dz.addmm_(g.to(dtype), weight)
    return dz, dcoef.to(coefficients.dtype)


def _spread(coefficients: Tensor, segment: Tensor) -> Tensor:
    """One coefficient a stacked column, ``(R,)``."""
    if coefficients.shape == segment.shape:
        return coefficients
    return coefficients.index_select(0, segment)


_op = torch.library.custom_op("nsc_fast::merged_linear", _forward, mutates_args=())
_backward_op = torch.library.custom_op("nsc_fast::merged_linear_backward", _backward, mutates_args=())


@_op.register_fake
def _(z, y, weight, bias, q, c, segment, coefficients, num_tasks, task, clamp, impl):
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
    g, grad_omega, grad_p, z, weight, q, c, segment, coefficients, num_tasks, task, p, omega, norm2, clamp,
    impl, want_dz, want_dcoef,
):  # fmt: skip
    dtype = z.dtype if z is not None else (g.dtype if g is not None else p.dtype)
    return (
        p.new_empty((p.shape[0] if want_dz else 0, q.shape[1]), dtype=dtype),
        torch.empty_like(coefficients) if want_dcoef else coefficients.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    z, y, weight, _, q, c, segment, coefficients, ctx.num_tasks, task, ctx.clamp, ctx.impl = inputs
    _, omega, p, norm2 = output
    ctx.set_materialize_grads(False)
    ctx.want_dz, ctx.want_dy = z.requires_grad, y is not None and y.requires_grad
    ctx.want_dcoef = coefficients.requires_grad
    # Z is needed for the ratio's term alone.
    kept = z if task is not None and ctx.want_dz else None
    ctx.save_for_backward(kept, weight, q, c, segment, coefficients, task, p, omega, norm2)


def _grad(
    ctx: Any,
    g: Tensor | None,
    grad_omega: Tensor | None,
    grad_p: Tensor | None,
    run: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor | None, ...]:
    z, weight, q, c, segment, coefficients, task, p, omega, norm2 = ctx.saved_tensors
    dz = dcoef = None
    grads = (g, grad_omega, grad_p)
    if any(grad is not None for grad in grads) and (ctx.want_dz or ctx.want_dcoef):
        dz, dcoef = run(
            *grads, z, weight, q, c, segment, coefficients, ctx.num_tasks, task, p, omega, norm2,
            ctx.clamp, ctx.impl, ctx.want_dz, ctx.want_dcoef,
        )  # fmt: skip
    dy = g if ctx.want_dy else None
    return (
        dz if ctx.want_dz else None,
        dy,
        None,
        None,
        None,
        None,
        None,
        dcoef if ctx.want_dcoef and g is not None else None,
        None,
        None,
        None,
        None,
    )


_op.register_autograd(lambda ctx, *grads: _grad(ctx, *grads[:3], _backward_op), setup_context=_save)


class _MergedLinear(torch.autograd.Function):
    """The same operation without the dispatcher's toll, for eager mode."""

    # One method instead of setup_context: torch inspects the signature anew on each call of the latter.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = _forward(*inputs)
        ctx.mark_non_differentiable(output[3])
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _grad(ctx, *grads[:3], _backward)
