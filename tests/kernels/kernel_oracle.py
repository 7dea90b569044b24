"""float64 truth for the kernels, one function per program, in plain torch: whole matrices, no blocks.

Every function takes the tensors that the kernel takes (any dtype) and lifts them to float64.
"""

import torch
from torch import Tensor


def _own(segment: Tensor, task: Tensor | int | None, siblings: int, segments: int, n: int) -> Tensor:
    """(N, columns, R) mask: does rank column j belong to the segment of column c of token n?"""
    if task is None:
        return (segment[None, :] == torch.arange(segments)[:, None]).expand(n, -1, -1)
    task = torch.full((n,), task) if isinstance(task, int) else task.long()
    wanted = task[:, None] + torch.arange(siblings) * (segments // siblings)
    mask = segment[None, None, :] == wanted[:, :, None]
    return mask & (task >= 0)[:, None, None]


def project(z, q, segment=None, segments=1, task=None, siblings=1, weight=None, clamp=0.0):
    """p (N, R), norm2 (N,), omega (N, columns), loss (segments,)"""
    z, q = z.double(), q.double()
    segment = torch.zeros(len(q), dtype=torch.long) if segment is None else segment.long()
    p, norm2 = z @ q.T, z.square().sum(1)
    own = _own(segment, task, siblings, segments, len(z))
    energy = torch.einsum("ncr,nr->nc", own.double(), p.square())
    u = torch.where(norm2[:, None] > 0, energy / norm2[:, None], 0.0)
    omega = (1 - u).clamp(min=clamp).sqrt()
    loss = None
    if task is not None:
        task = torch.full((len(z),), task) if isinstance(task, int) else task.long()
        omega = torch.where((task >= 0)[:, None], omega, 1.0)
    if weight is not None:
        term = weight.double()[:, None] * omega
        loss = torch.zeros(segments, dtype=torch.float64)
        if task is None:
            loss = term.sum(0)
        else:
            for s in range(siblings):
                at = task + s * (segments // siblings)
                loss.index_add_(0, at[task >= 0], term[task >= 0, s])
    return p, norm2, omega, loss


def scales(a, omega, norm2, task=None, clamp=0.0):
    """t (N, columns) and row_scale (N,)"""
    n = len(norm2)
    a, omega, norm2 = a.double().view(n, -1), omega.double().view(n, -1), norm2.double()
    flat = (omega.square() <= clamp * (1 + 1e-6)) | (norm2 == 0)[:, None]
    if isinstance(task, Tensor):
        flat = flat | (task < 0)[:, None]
    t = torch.where(flat, 0.0, a / (omega * norm2[:, None]))
    return t, (t * (1 - omega.square())).sum(1)


def coefficient_grads(
    g,
    c_mat,
    p,
    coef,
    a=None,
    omega=None,
    norm2=None,
    segment=None,
    segments=1,
    task=None,
    siblings=1,
    clamp=0.0,
):
    """dp (N, R), dcoef (R,) or None, row_scale (N,) or None"""
    p = p.double()
    dp, dcoef, row_scale = torch.zeros_like(p), None, None
    if g is not None:
        h = g.double() @ c_mat.double()
        dcoef = (p * h).sum(0)
        dp = h * coef.double()
    if a is not None:
        segment = torch.zeros(p.shape[1], dtype=torch.long) if segment is None else segment.long()
        t, row_scale = scales(a, omega, norm2, task, clamp)
        own = _own(segment, task, siblings, segments, len(p)).double()
        dp = dp - torch.einsum("nc,ncr->nr", t, own) * p
    return dp, dcoef, row_scale


def expand(x, m, scale=None, bias=None, row_scale=None, z=None, base=None):
    out = (x.double() if scale is None else x.double() * scale.double()) @ m.double()
    if z is not None:
        out = out + row_scale.double()[:, None] * z.double()
    if bias is not None:
        out = out + bias.double()
    return out if base is None else out + base.double()


def ratio_backward(z, q, p, norm2, omega, a, segment=None, segments=1, task=None, siblings=1, clamp=0.0):
    dp, _, row_scale = coefficient_grads(
        None, None, p, None, a, omega, norm2, segment, segments, task, siblings, clamp
    )
    return expand(dp, q, row_scale=row_scale, z=z)


def ratio_gradient(z, q, a, segment=None, segments=1, task=None, siblings=1, weight=None, clamp=0.0):
    """dZ by autograd through the textbook formula: independent of t and row_scale."""
    z = z.double().requires_grad_()
    norm2 = z.square().sum(1)
    segment = torch.zeros(len(q), dtype=torch.long) if segment is None else segment.long()
    own = _own(segment, task, siblings, segments, len(z)).double()
    energy = torch.einsum("ncr,nr->nc", own, (z @ q.double().T).square())
    safe = torch.where(norm2 > 0, norm2, 1.0)[:, None]
    rest = 1 - energy / safe
    omega = torch.where(rest > clamp, rest, clamp).sqrt()
    (omega * a.double().view(len(z), -1)).sum().backward()
    return z.grad
