"""What we are compared with, written the straightforward way in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["EagerLayer", "GramRatio", "MaterialisedLayer", "eager_steps", "forward_backward", "taken"]


class GramRatio:
    """The ratio as published: two products with the cached Gram inverse, a square and a square root."""

    def __init__(self, down: Tensor) -> None:
        self.down = down
        self.gram_inverse = torch.linalg.inv(down.double() @ down.double().T).to(down.dtype)

    def __call__(self, z: Tensor) -> Tensor:
        p = z @ self.down.T
        inside = ((p @ self.gram_inverse) * p).sum(-1)
        return (1.0 - inside / z.square().sum(-1)).clamp(min=1e-6).sqrt()


class EagerLayer(nn.Module):
    """Frozen base plus concatenated adapters under autograd: ``base(z) + ((z A^T) * c) B^T``."""

    def __init__(
        self, base: nn.Module, downs: Sequence[Tensor], ups: Sequence[Tensor], coefficients: Tensor
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.register_buffer("down", torch.cat(list(downs)))
        self.register_buffer("up", torch.cat(list(ups), dim=1))
        self.register_buffer("index", torch.cat([torch.full((len(a),), k) for k, a in enumerate(downs)]))
        self.coefficients = nn.Parameter(coefficients.clone())

    def forward(self, z: Tensor) -> Tensor:
        scaled = (z @ self.down.T) * self.coefficients[self.index.to(z.device)]
        return self.base(z) + scaled @ self.up.T


class MaterialisedLayer(nn.Module):
    """``z (W0 + sum_k c_k B_k A_k)^T`` with the merged weight formed under autograd."""

    def __init__(
        self, base: nn.Linear, downs: Sequence[Tensor], ups: Sequence[Tensor], coefficients: Tensor
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.downs, self.ups = list(downs), list(ups)
        self.coefficients = nn.Parameter(coefficients.clone())

    def forward(self, z: Tensor) -> Tensor:
        weight = self.base.weight
        for c, a, b in zip(self.coefficients, self.downs, self.ups, strict=True):
            weight = weight + c * (b @ a)
        return nn.functional.linear(z, weight, self.base.bias)


def eager_steps(
    model: nn.Module,
    batches: Mapping[int, Mapping[str, Tensor]],
    ratios: Mapping[str, Sequence[GramRatio]],
) -> Tensor:
    """One step of the eager loop: task after task through the whole model, ratios from hooks, backward.

    Args:
        model: with :class:`EagerLayer` in it.
        batches: task -> model inputs without padding.
        ratios: target module -> ratio of every task.
    """
    total = torch.zeros(())
    for task, batch in batches.items():
        seen: list[Tensor] = []
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, own=own: seen.append(own[task](args[0]).mean())  # noqa: B023
            )
            for name, own in ratios.items()
        ]
        model(**batch)
        for handle in handles:
            handle.remove()
        loss = torch.stack(seen).mean() / len(batches)
        loss.backward()
        total = total + loss.detach().cpu()
    return total


def forward_backward(layer: nn.Module, z: Tensor, g: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that runs the layer on z and back from g, and returns the output and the gradient of z."""

    def run() -> tuple[Tensor, Tensor]:
        y = layer(z)
        y.backward(g)
        return y, taken(z)

    return run


def taken(z: Tensor) -> Tensor:
    """The gradient of z, gone from z: freed with a call's result, in the time of the call that made it."""
    grad, z.grad = z.grad, None
    return grad
