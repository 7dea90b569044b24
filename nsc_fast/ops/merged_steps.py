"""The algebra of merged layers, forward and backward, on the fused steps of one implementation.

See :mod:`nsc_fast.ops.merged_linear` for the formulas; here they are spelled out for S siblings, of which a
single layer is the case S = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .torch_steps import CoefficientGrads, dense_rows

__all__ = ["Sibling", "backward", "gradients", "outputs", "project", "save", "unflatten"]


class Sibling(NamedTuple):
    """One merged layer, beside the basis that it shares with its siblings.

    Attributes:
        columns: C, ``(d_out, R)``.
        segment: ``(R,)`` int32, index of the task of each stacked column.
        coefficients: ``(K,)`` per task, ``(R,)`` per singular direction, or a core ``(R, R)`` between the
            factors; differentiable.
        weight: W0, ``(d_out, d_in)``, frozen; a transposed view is fine (GPT-2's Conv1D).
        bias: ``(d_out,)``, frozen.
        y: ``(..., d_out)`` output of a base layer of any kind, instead of the weight; differentiable. Or a
            function that makes it: called when all that the backward pass needs is kept.
    """

    columns: Tensor
    segment: Tensor
    coefficients: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    y: Tensor | Callable[[], Tensor] | None = None


def project(
    z: Tensor,
    q: Tensor,
    segment: Tensor,
    siblings: int,
    num_tasks: int,
    task: Tensor | None,
    clamp: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """omega ``(N,)`` or ``(N, S)``, P, norm2 ``(N,)``; omega and norm2 empty where no ratio is wanted.

    z has dense rows, here and in :func:`outputs`.
    """
    wanted = task is not None
    ratio = {"task": task, "clamp": clamp, "ratio": wanted, "siblings": siblings if wanted else 1}
    with _exactly(z):
        found = dispatch.steps(impl).project(z, q, segment, num_tasks * siblings, **ratio)
    if task is None:
        return z.new_empty(0), found.p, z.new_empty(0)
    return found.omega, found.p, found.norm2


def outputs(z: Tensor, p: Tensor, layers: Sequence[Sibling], impl: str) -> list[Tensor]:
    """Y of each layer; the outputs of base layers are tensors here."""
    steps, ys = dispatch.steps(impl), []
    with _exactly(z):
        for layer, own in zip(layers, _columns(p, layers), strict=True):
            if _has_core(layer):
                own = own @ layer.coefficients.to(own.dtype).t()
            dtype = z.dtype if layer.y is None else layer.y.dtype
            out = steps.low_rank_output(own, layer.columns, _spread(layer), bias=layer.bias, dtype=dtype)
            # The product with the frozen weight is the large one: it accumulates onto the small one.
            if layer.weight is not None:
                out.addmm_(z, layer.weight.t())
            if layer.y is not None:
                out.add_(layer.y)
            ys.append(out)
    return ys


def backward(
    grad_ys: Sequence[Tensor | None],
    grad_omega: Tensor | None,
    grad_p: Tensor | None,
    z: Tensor | None,
    q: Tensor,
    layers: Sequence[Sibling],
    num_tasks: int,
    task: Tensor | None,
    p: Tensor,
    omega: Tensor,
    norm2: Tensor,
    clamp: float,
    impl: str,
    want_dz: bool,
    want_dcoef: bool,
) -> tuple[Tensor, list[Tensor]]:
    """dZ ``(N, d_in)`` and the gradients of the coefficients; empty where not wanted."""
    steps, alone = dispatch.steps(impl), len(layers) == 1
    a = grad_omega if task is not None and want_dz else None
    dcoefs, row_scale, scaled = [], None, want_dz and grad_p is not None
    dp = None if alone or not want_dz else torch.empty_like(p)
    with _exactly(p):
        for s, (layer, own_p) in enumerate(zip(layers, _columns(p, layers), strict=True)):
            out = None if dp is None else _columns(dp, layers)[s]
            ratio = {
                "task": task,
                "a": a if a is None or alone else a[:, s],
                "omega": omega if a is None or alone else omega[:, s],
                "norm2": norm2,
                "clamp": clamp,
            }
            own_dp, dcoef, own_scale = _through(
                steps, layer, grad_ys[s], own_p, num_tasks, ratio, want_dz, want_dcoef, out
            )
            if dcoef is None:
                dcoef = layer.coefficients.new_zeros(layer.coefficients.shape if want_dcoef else 0)
            dcoefs.append(dcoef.to(layer.coefficients.dtype))
            if own_scale is not None:
                row_scale = own_scale if row_scale is None else row_scale.add_(own_scale)
            if alone:
                dp = own_dp
            elif out is not None and own_dp is None:
                out.zero_()
            scaled = scaled or own_dp is not None
        grads = [g for g in grad_ys if g is not None]
        dtype = next((t.dtype for t in (z, *grads) if t is not None), p.dtype)
        if not scaled:
            return p.new_zeros((p.shape[0] if want_dz else 0, q.shape[1]), dtype=dtype), dcoefs
        if grad_p is not None:
            dp = grad_p.to(p.dtype) if dp is None else dp.add_(grad_p)
        z = None if row_scale is None else dense_rows(z)
        dz = steps.input_gradient(dp, q, row_scale=row_scale, z=z, dtype=dtype)
        for layer, g in zip(layers, grad_ys, strict=True):
            if layer.weight is not None and g is not None:
                dz.addmm_(g.to(dtype), layer.weight)
    return dz, dcoefs


def _through(
    steps: ModuleType,
    layer: Sibling,
    g: Tensor | None,
    p: Tensor,
    num_tasks: int,
    ratio: dict[str, Any],
    want_dp: bool,
    want_dcoef: bool,
    out: Tensor | None,
) -> CoefficientGrads:
    """Back through a layer's coefficients, in one kernel, or its core: ``dX = H^T P``, ``dP = H X - ...``."""
    common = layer.columns, p, _spread(layer), layer.segment, num_tasks
    if not _has_core(layer):
        each = layer.coefficients.shape == layer.segment.shape
        wanted = {"want_dp": want_dp, "want_dcoef": want_dcoef}
        return steps.coefficient_grads(g, *common, **ratio, per_segment=not each, **wanted, out=out)
    h = steps.coefficient_grads(g, *common, clamp=ratio["clamp"], per_segment=False, want_dcoef=False).dp
    own = CoefficientGrads(None, None, None)
    if want_dp and ratio["a"] is not None:
        own = steps.coefficient_grads(None, *common, **ratio, per_segment=False, out=out)
    if h is None:
        return own
    dcore, core = None, layer.coefficients
    if want_dcoef:
        dcore = h.to(core.dtype).t() @ p.to(core.dtype)
    if not want_dp:
        return CoefficientGrads(None, dcore, None)
    dp = h @ core.to(h.dtype)
    if own.dp is not None:
        dp = own.dp.add_(dp)
    elif out is not None:
        dp = out.copy_(dp)
    return CoefficientGrads(dp, dcore, own.row_scale)


def _has_core(layer: Sibling) -> bool:
    return layer.coefficients.ndim == 2


def _exactly(tensor: Tensor) -> AbstractContextManager:
    """No autocast: what is rounded, and where, is decided here."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _columns(p: Tensor, layers: Sequence[Sibling]) -> Sequence[Tensor]:
    """The part of each layer in ``(N, R_1 + ... + R_S)``."""
    return (p,) if len(layers) == 1 else p.split([one.columns.shape[1] for one in layers], dim=1)


def _spread(layer: Sibling) -> Tensor | None:
    """One coefficient a stacked column, ``(R,)``; None where a core takes their place."""
    if _has_core(layer):
        return None
    if layer.coefficients.shape == layer.segment.shape:
        return layer.coefficients
    return layer.coefficients.index_select(0, layer.segment)


def unflatten(flat: Sequence[Tensor | None]) -> list[Sibling]:
    size = len(Sibling._fields)
    return [Sibling(*flat[i : i + size]) for i in range(0, len(flat), size)]


def save(
    ctx: Any,
    z: Tensor,
    q: Tensor,
    layers: Sequence[Sibling],
    num_tasks: int,
    task: Tensor | None,
    clamp: float,
    impl: str,
    omega: Tensor,
    p: Tensor,
    norm2: Tensor,
) -> None:
    ctx.set_materialize_grads(False)
    ctx.num_tasks, ctx.clamp, ctx.impl = num_tasks, clamp, impl
    ctx.want_dz = z.requires_grad
    ctx.want_dcoef = [one.coefficients.requires_grad for one in layers]
    # Z is needed for the ratio's term alone; the bias and the base layer's output not at all.
    kept = z if task is not None and ctx.want_dz else None
    flat = [tensor for one in layers for tensor in one._replace(bias=None, y=None)]
    ctx.save_for_backward(kept, q, task, omega, p, norm2, *flat)


def gradients(
    ctx: Any,
    grad_ys: Sequence[Tensor | None],
    grad_omega: Tensor | None,
    grad_p: Tensor | None,
    run: Callable[..., tuple[Tensor, list[Tensor]]],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of z and of the coefficients."""
    z, q, task, omega, p, norm2, *flat = ctx.saved_tensors
    layers = unflatten(flat)
    dz, dcoefs = None, [None] * len(layers)
    given = any(g is not None for g in (*grad_ys, grad_omega, grad_p))
    if given and (ctx.want_dz or any(ctx.want_dcoef)):
        wanted = ctx.want_dz, any(ctx.want_dcoef)
        state = layers, ctx.num_tasks, task, p, omega, norm2, ctx.clamp, ctx.impl
        dz, dcoefs = run(grad_ys, grad_omega, grad_p, z, q, *state, *wanted)
    return (
        dz if ctx.want_dz else None,
        [
            dc if wanted and g is not None else None
            for dc, wanted, g in zip(dcoefs, ctx.want_dcoef, grad_ys, strict=True)
        ],
    )
