"""SOAP: Adam in the eigenbases of the gradients' second moments (Vyas et al. 2024, arXiv 2409.11321).

For a matrix with gradient G, and running means of G G^T and G^T G with eigenvectors U and V,

    G' = U^T G V,     step = U Adam(G') V^T.

Adam scales each number of a core between stacked factors by itself, so that its steps depend on the bases in
which rows and columns are written, which say nothing about the tasks. SOAP finds bases in which they do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SOAP", "SQUARE"]

SHIFT = 1e-3
"""Added to the running means before a decomposition, in parts of their mean eigenvalue."""

SQUARE = 8
"""Numbers that a square matrix takes for each of its entries: itself, its gradient and the state."""


class SOAP(torch.optim.Optimizer):
    """SOAP for matrices, AdamW for vectors and numbers.

    U and V follow the running means by rounds of orthogonal iteration (a product and a QR decomposition): one
    from the identity before the first step, one after each of the first ``refresh`` steps, and one after
    every ``refresh``-th. All gradients but the first enter the means after their own step: in a basis of its
    own a gradient would look larger than others do.

    The state of an m x n matrix is ``2 m n + 2 m^2 + 2 n^2`` numbers of its dtype, on its device. In float32
    and float64.

    Args:
        params: parameters, all of at most two dimensions.
        lr: learning rate.
        betas: decay of the first moment, and of all second moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, as AdamW has it.
        refresh: steps between two rounds.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        refresh: int = 5,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "refresh": refresh}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step with the gradients that are there; parameters without one stay as they are."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient, state, (slow, fast) = parameter.grad, self.state[parameter], group["betas"]
        if not state:
            state["step"] = 0
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            for side, own in enumerate(_products(gradient)):
                identity = torch.eye(len(own), dtype=own.dtype, device=own.device)
                state[f"moment{side}"], state[f"basis{side}"] = own, identity
                _refine(state, side)
        state["step"] = step = state["step"] + 1
        state["mean"].lerp_(gradient, 1 - slow)
        turned = _turned(state, gradient)
        state["square"].mul_(fast).addcmul_(turned, turned, value=1 - fast)
        scale = (state["square"] / (1 - fast**step)).sqrt().add_(group["eps"])
        move = _turned(state, _turned(state, state["mean"] / (1 - slow**step)) / scale, back=True)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(move, alpha=-group["lr"])
        for side, own in enumerate(_products(gradient)):
            state[f"moment{side}"].lerp_(own, 1 - fast)
            if step <= group["refresh"] or step % group["refresh"] == 0:
                _refine(state, side)


def _products(gradient: Tensor) -> tuple[Tensor, ...]:
    """G G^T and G^T G of a matrix."""
    return (gradient @ gradient.T, gradient.T @ gradient) if gradient.ndim == 2 else ()


def _turned(state: dict[str, Any], value: Tensor, *, back: bool = False) -> Tensor:
    """U^T M V, or U M V^T; anything but a matrix as it is."""
    if value.ndim != 2:
        return value
    left, right = state["basis0"], state["basis1"]
    return left @ value @ right.T if back else left.T @ value @ right


def _refine(state: dict[str, Any], side: int) -> None:
    """One round of orthogonal iteration, largest eigenvalue first; the second moment follows the order."""
    basis = state[f"basis{side}"]
    product = state[f"moment{side}"] @ basis
    seen = (basis * product).sum(0)
    order = seen.argsort(descending=True)
    # Directions that no gradient has seen stay what they were, instead of what rounding makes of them.
    product += SHIFT * seen.mean() * basis
    state["square"] = state["square"].index_select(side, order)
    product = product.index_select(1, order)
    # Metal has no QR decomposition in many versions of torch.
    where = torch.device("cpu") if product.device.type == "mps" else product.device
    state[f"basis{side}"] = torch.linalg.qr(product.to(where)).Q.to(product.device)
