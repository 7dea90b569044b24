"""The fused steps as Triton launches: the functions of ``torch_steps``, done by the programs in ``kernels/``.

The factors are kept in float32 and rounded here to the dtype of the activations, in which the matrix units
multiply; sums are formed in float32. float32 itself is multiplied as float32, unless the user allowed torch
tf32 (``precision``). Importing this module imports triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import coefficient_grads as _coefficient_grads
from ..kernels import expand as _expand
from ..kernels import launch as _launch
from ..kernels import project as _project
from ..kernels import ratio_backward as _ratio_backward
from .precision import tf32_allowed
from .torch_steps import CoefficientGrads, Projection

__all__ = ["coefficient_grads", "input_gradient", "low_rank_output", "project", "ratio_backward"]


def project(
    z: Tensor,
    q: Tensor,
    segment: Tensor,
    num_segments: int,
    *,
    task: Tensor | None = None,
    clamp: float,
    ratio: bool = True,
    siblings: int = 1,
) -> Projection:
    """See :func:`nsc_fast.ops.torch_steps.project`; P comes in the dtype of z."""
    out = _project.project(
        z,
        q.to(z.dtype),
        segment,
        num_segments,
        task=task,
        siblings=siblings,
        clamp=clamp,
        ratio=ratio,
        precision=_precision(z.dtype, z.device),
    )
    return Projection(out.p, out.norm2, out.omega)


def ratio_backward(
    z: Tensor,
    q: Tensor,
    p: Tensor,
    norm2: Tensor,
    omega: Tensor,
    grad_omega: Tensor,
    segment: Tensor,
    *,
    clamp: float,
) -> Tensor:
    """See :func:`nsc_fast.ops.torch_steps.ratio_backward`."""
    return _ratio_backward.ratio_backward(
        z,
        q.to(z.dtype),
        p,
        norm2,
        omega,
        grad_omega,
        segment,
        omega.shape[1],
        clamp=clamp,
        precision=_precision(z.dtype, z.device),
    )


def input_gradient(
    dp: Tensor,
    q: Tensor,
    *,
    row_scale: Tensor | None = None,
    z: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`nsc_fast.ops.torch_steps.input_gradient`."""
    precision = _precision(dtype, dp.device)
    return _expand.input_gradient(dp.to(dtype), q.to(dtype), row_scale=row_scale, z=z, precision=precision)


def low_rank_output(
    p: Tensor, c: Tensor, coef: Tensor | None, *, bias: Tensor | None = None, dtype: torch.dtype
) -> Tensor:
    """See :func:`nsc_fast.ops.torch_steps.low_rank_output`."""
    precision = _precision(dtype, p.device)
    coef = _ones(p) if coef is None else coef.to(torch.float32)
    return _expand.low_rank_output(p.to(dtype), c.to(dtype), coef, bias=bias, precision=precision)


def coefficient_grads(
    g: Tensor | None,
    c: Tensor,
    p: Tensor,
    coef: Tensor | None,
    segment: Tensor,
    num_segments: int,
    *,
    task: Tensor | None = None,
    a: Tensor | None = None,
    omega: Tensor | None = None,
    norm2: Tensor | None = None,
    clamp: float,
    per_segment: bool,
    want_dp: bool = True,
    want_dcoef: bool = True,
    out: Tensor | None = None,
) -> CoefficientGrads:
    """See :func:`nsc_fast.ops.torch_steps.coefficient_grads`."""
    if g is None and a is None:
        return CoefficientGrads(None, None, None)
    ratio = {} if a is None else {"a": a.contiguous(), "omega": omega, "norm2": norm2}
    coef = _ones(p) if coef is None else coef.to(torch.float32)
    done = _coefficient_grads.coefficient_grads(
        None if g is None else g.to(p.dtype),
        None if g is None else c.to(p.dtype),
        p,
        None if g is None else coef,
        segment=segment,
        num_segments=num_segments,
        task=None if a is None else task,
        clamp=clamp,
        per_segment=per_segment,
        out=out,
        precision=_precision(p.dtype, p.device),
        **ratio,
    )
    return CoefficientGrads(
        done.dp if want_dp else None, done.dcoef if want_dcoef else None, done.row_scale if want_dp else None
    )


def _ones(p: Tensor) -> Tensor:
    return torch.ones(p.shape[1], dtype=torch.float32, device=p.device)


def _precision(dtype: torch.dtype, device: torch.device) -> str:
    """How the kernels multiply: "tf32" for float32 where it was asked for and the device has it."""
    if dtype != torch.float32 or not tf32_allowed():
        return "ieee"
    return "tf32" if _launch.has_tf32(_launch.current_target(device)) else "ieee"
