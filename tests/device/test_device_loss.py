"""NSCLoss and merged layers in a loop of one's own, on another device than the CPU."""

import pytest
import stand_in
import tiny
import torch
from torch import nn

from nsc_fast import NSCLoss
from nsc_fast.layers import install, remove
from nsc_fast.siblings import share

RANKS = {"a": 2, "b": 3}


def adapted(dtype=torch.float64):
    torch.manual_seed(0)
    model = tiny.tiny_llama(dtype, blocks=2)
    names = tiny.linear_names(model, ["q_proj", "k_proj", "v_proj"])
    return model, tiny.canonical_adapters(tiny.random_adapters(model, names, RANKS))


@pytest.mark.parametrize("device", ["cpu", stand_in.NAME])
@pytest.mark.parametrize("how", ["watch", "dict"])
def test_loss(device, how):
    model, updates = adapted()
    expected = reference_loss(model, updates)
    downs = {task: {m: update.basis for m, update in own.items()} for task, own in updates.items()}
    loss = NSCLoss(downs).to(device)
    loss.load_state_dict(NSCLoss(downs).state_dict())
    batch = {key: value.to(device) for key, value in tiny.token_batch(2, 6, 0, padding=2).items()}
    model = model.to(device)
    if how == "watch":
        # The mask may lie on the host: that is where batches come from.
        with loss.watch(model, "a", mask=batch["attention_mask"].cpu()) as seen:
            model(**batch)
        found = seen.loss
    else:
        inputs = tiny.module_inputs(model, updates["a"], batch)
        found = loss(inputs, task="a", mask=batch["attention_mask"])
    assert found.device.type == device
    assert float(found.detach()) == pytest.approx(expected, rel=1e-9)


def reference_loss(model, updates):
    batch = tiny.token_batch(2, 6, 0, padding=2)
    inputs = tiny.module_inputs(model, updates["a"], batch)
    keep = batch["attention_mask"] > 0
    ratios = []
    for module, update in updates["a"].items():
        z = inputs[module].detach()[keep]
        inside = (z @ update.basis.to(z).T).square().sum(1) / z.square().sum(1)
        ratios.append((1 - inside).sqrt().mean())
    return float(torch.stack(ratios).mean())


@pytest.mark.parametrize(("impl", "dtype"), [("torch", torch.float64), ("auto", torch.float32)])
def test_layers_and_siblings(impl, dtype):
    """The coefficients' gradients in a training loop; "auto" takes the kernels."""
    found = {}
    for device in ("cpu", stand_in.NAME):
        model, updates = adapted(dtype)
        model = model.to(device)
        batch = {key: value.to(device) for key, value in tiny.token_batch(2, 6, 0).items()}
        installed = install(model, updates, granularity="module", init=0.4, impl=impl)
        groups = share(model, lambda model=model, batch=batch: model(**batch))
        assert groups
        model(**batch).logits.float().square().mean().backward()
        found[device] = {m: p.grad.cpu() for m, p in installed.coefficients.values.items()}
        remove(model)
    limit = 1e-9 if dtype == torch.float64 else 1e-4
    here, there = found.values()
    for module, gradient in here.items():
        torch.testing.assert_close(there[module], gradient, rtol=limit, atol=limit * gradient.abs().max())


def test_what_is_on_two_devices_is_refused_by_the_device():
    """The stand-in does what it is for."""
    layer = nn.Linear(3, 4).to(stand_in.NAME)
    with pytest.raises(RuntimeError, match="same device"):
        layer(torch.ones(2, 3))
    with pytest.raises(TypeError, match="numpy"):
        layer.weight.detach().numpy()
    layer(torch.ones(2, 3, device=stand_in.NAME)).sum().backward()
    assert layer.weight.grad.device.type == stand_in.NAME
    assert stand_in.CROSSED["there"] == 4 * (3 * 4 + 4)
