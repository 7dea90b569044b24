"""The optimiser of cores: against AdamW in bases that are given, the bases it finds, and that it goes on."""

import copy
import math

import pytest
import torch
from compare import error

from nsc_fast import soap
from nsc_fast.soap import SOAP, SQUARE


def _descend(start, loss, steps, optimiser=SOAP, **more):
    """Losses and the last point."""
    point = torch.nn.Parameter(start.clone())
    chosen = optimiser([point], **more)
    values = []
    for step in range(steps):
        chosen.zero_grad()
        value = loss(point, step)
        value.backward()
        chosen.step()
        values.append(float(value.detach()))
    return values, point.detach()


def _problem(rows, columns, seed=0):
    """A noisy quadratic with very unlike curvatures along mixed rows and columns."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    left = torch.linalg.qr(draw(rows, rows)).Q * torch.logspace(0, -2, rows, dtype=torch.float64)
    right = torch.linalg.qr(draw(columns, columns)).Q * torch.logspace(0, -2, columns, dtype=torch.float64)
    noise = 0.01 * draw(40, rows, columns)

    def loss(point, step):
        off = left.T @ (point - 1) @ right
        return off.square().sum() + (left @ noise[step % 40] @ right.T * point).sum()

    return loss, draw(rows, columns), draw


@pytest.mark.parametrize("shape", [(), (1,), (7,)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_vectors_and_numbers_take_the_steps_of_adamw(shape, decay):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    own = {"lr": 0.05, "betas": (0.9, 0.95), "weight_decay": decay}

    def loss(point, step):
        return (point.sin() * (1 + step)).sum() + point.square().sum()

    values, end = _descend(start, loss, 12, **own)
    others, expected = _descend(start, loss, 12, torch.optim.AdamW, **own)
    assert values == pytest.approx(others, rel=1e-12)
    assert error(end, expected) < 1e-12


@pytest.mark.parametrize("rows, columns", [(6, 6), (4, 9), (1, 5)])
def test_in_given_bases_it_is_adamw_of_the_turned_matrix(monkeypatch, rows, columns):
    loss, start, draw = _problem(rows, columns)
    bases = [torch.linalg.qr(draw(size, size)).Q for size in (rows, columns)]
    monkeypatch.setattr(soap, "_refine", lambda state, side: state.update({f"basis{side}": bases[side]}))
    u, v = bases
    more = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    values, end = _descend(start, loss, 23, **more)
    turned = lambda point, step: loss(u @ point @ v.T, step)  # noqa: E731
    expected_values, expected = _descend(u.T @ start @ v, turned, 23, torch.optim.AdamW, **more)
    assert values == pytest.approx(expected_values, rel=1e-9)
    assert error(end, u @ expected @ v.T) < 1e-9


def test_the_bases_become_eigenvectors_of_the_means():
    loss, start, _ = _problem(6, 9)
    point = torch.nn.Parameter(start.clone())
    ours = SOAP([point], lr=1e-6, refresh=1)
    for _ in range(300):
        ours.zero_grad()
        loss(point, 0).backward()
        ours.step()
    state = ours.state[point]
    for side, own in enumerate((point.grad @ point.grad.T, point.grad.T @ point.grad)):
        turned = state[f"basis{side}"].T @ own @ state[f"basis{side}"]
        assert error(turned, turned.diag().diag()) < 1e-3
        assert turned.diag()[0] == pytest.approx(float(torch.linalg.eigvalsh(own)[-1]), rel=1e-6)


def test_mixed_curvatures_are_descended_faster_than_by_adamw():
    loss, start, _ = _problem(12, 12)
    ours = min(sum(_descend(start, loss, 60, lr=lr)[0][-5:]) for lr in (0.02, 0.05, 0.1, 0.2))
    others = min(
        sum(_descend(start, loss, 60, torch.optim.AdamW, lr=lr, betas=(0.9, 0.95))[0][-5:])
        for lr in (0.02, 0.05, 0.1, 0.2)
    )
    assert ours < 0.8 * others


def test_saved_state_goes_on_with_the_same_bits(tmp_path):
    loss, start, _ = _problem(5, 4)
    point, other = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone() + 1)
    ours, theirs = SOAP([point], lr=0.1), SOAP([other], lr=0.3)
    for step in range(14):
        if step == 7:
            torch.save({"point": point.detach(), "optimiser": ours.state_dict()}, tmp_path / "state.pt")
        ours.zero_grad()
        loss(point, step).backward()
        ours.step()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    theirs.load_state_dict(copy.deepcopy(saved["optimiser"]))
    other.data.copy_(saved["point"])
    for step in range(7, 14):
        theirs.zero_grad()
        loss(other, step).backward()
        theirs.step()
    assert torch.equal(point, other)


def test_what_rounding_changes_in_gradients_of_low_rank_stays_small():
    """Processes that divide the rows of a step differ in the last bits of a gradient, and have to agree."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 30, 12, 2, generator=generator, dtype=torch.float64)
    gradients = left @ right.mT
    noise = 1 + 1e-15 * torch.randn(30, 12, 12, generator=generator, dtype=torch.float64)
    start = torch.zeros(12, 12, dtype=torch.float64)
    _, end = _descend(start, lambda p, i: (p * gradients[i]).sum(), 30, lr=0.1)
    _, other = _descend(start, lambda p, i: (p * gradients[i] * noise[i]).sum(), 30, lr=0.1)
    assert error(end, other) < 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 3])
def test_a_gradient_that_is_not_finite_shows_in_the_parameter(bad, at):
    loss, start, _ = _problem(4, 4)
    _, end = _descend(start, lambda p, i: loss(p, i) + (bad * p[1, 2] if i == at else 0), 6, lr=0.1)
    assert not end.isfinite().all()


def test_parameters_without_a_gradient_stay():
    moved, still = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    moved.square().sum().backward()
    SOAP([moved, still], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(still, torch.ones(2, 2))
    assert not torch.equal(moved, torch.ones(2, 2))


def test_a_square_matrix_takes_as_much_memory_as_is_said():
    matrix = torch.nn.Parameter(torch.randn(5, 5))
    matrix.square().sum().backward()
    optimiser = SOAP([matrix], lr=0.1)
    optimiser.step()
    state = [value for value in optimiser.state[matrix].values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.numel() for tensor in (matrix, matrix.grad, *state)) == SQUARE * matrix.numel()
