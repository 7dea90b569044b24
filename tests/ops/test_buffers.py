"""Memory of large results that later results take over."""

from __future__ import annotations

import copy
import gc
import random
import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nsc_fast.factors import canonical, row_basis, stack
from nsc_fast.layers import MergedLinear, install, remove
from nsc_fast.ops import buffers, null_space_ratio

ROWS, COLUMNS = 32, 16
SIZE = 4 * ROWS * COLUMNS
LIKE = torch.empty(0)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(buffers, "_SMALLEST_BYTES", SIZE // 2)
    monkeypatch.setattr(buffers, "_IDLE_BYTES", 4 * SIZE)
    buffers.release()
    yield
    buffers.release()


def _take(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return buffers.empty(LIKE, rows, COLUMNS, dtype)


def test_memory_is_taken_over_when_the_last_reference_is_gone() -> None:
    first = _take()
    place, part = first.data_ptr(), first[3:, 1]
    del first
    assert _take().data_ptr() != place
    later = part.detach().numpy()
    del part
    assert _take().data_ptr() != place
    del later
    gc.collect()
    held = [_take() for _ in range(3)]
    assert place in [one.data_ptr() for one in held]
    assert len({one.data_ptr() for one in held}) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_like_any_other_tensor(dtype: torch.dtype) -> None:
    one = _take(dtype=dtype)
    assert (one.shape, one.dtype, one.is_contiguous()) == ((ROWS, COLUMNS), dtype, True)
    assert one.data_ptr() % 64 == 0
    assert not one._is_view()
    one.fill_(2.0)
    twin = copy.deepcopy(one)
    one.zero_()
    assert bool((twin == 2.0).all())


def test_what_lies_idle_is_bounded_and_other_sizes_give_way() -> None:
    held = [_take() for _ in range(6)]
    held.clear()
    assert buffers._idle_bytes() == 4 * SIZE
    other = _take(ROWS + 1)
    del other
    assert list(buffers._idle) == [SIZE + 4 * COLUMNS]
    buffers.release()
    assert buffers._idle_bytes() == 0


def test_small_and_huge_results_and_other_kinds_of_tensors_are_not_kept() -> None:
    for rows in (1, 5 * ROWS):
        _take(rows)
    with FakeTensorMode():
        fake = buffers.empty(torch.empty(0), ROWS, COLUMNS, torch.float32)
        assert fake.shape == (ROWS, COLUMNS)
        del fake
    assert buffers.empty(torch.empty(0, device="meta"), ROWS, COLUMNS, torch.float32).is_meta
    assert buffers._idle_bytes() == 0


def test_the_default_device_is_another() -> None:
    with torch.device("meta"):
        one = _take()
    assert one.device.type == "cpu"
    assert one.fill_(1.0).sum() == ROWS * COLUMNS


def test_from_inference_to_training() -> None:
    with torch.inference_mode():
        place = _take().data_ptr()
    one = _take()
    assert one.data_ptr() == place
    assert not one.is_inference()


def test_no_two_threads_get_the_same_memory() -> None:
    wrong = []

    def work(own: int) -> None:
        order, held = random.Random(own), []
        for i in range(400):
            one = _take(order.choice([ROWS - 1, ROWS, ROWS + 1]))
            held.append((one.fill_(1000 * own + i), 1000 * own + i))
            if len(held) > 4:
                earlier, value = held.pop(order.randrange(4))
                wrong.extend([value] * int((earlier != value).any()))

    threads = [threading.Thread(target=work, args=(own,)) for own in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 0 < buffers._idle_bytes() <= buffers._IDLE_BYTES


def test_gradients_are_right_in_memory_that_held_others() -> None:
    z = torch.randn(ROWS, COLUMNS, requires_grad=True)
    basis = row_basis(torch.randn(4, COLUMNS))[0].float()
    null_space_ratio(z, basis).sum().backward()
    expected = z.grad.clone()
    place = z.grad.data_ptr()
    z.grad.fill_(torch.nan)
    z.grad = None
    null_space_ratio(z, basis).sum().backward()
    assert z.grad.data_ptr() == place
    assert torch.equal(z.grad, expected)


def test_a_model_may_change_outputs_in_place_and_removal_releases() -> None:
    model = nn.Sequential(nn.Linear(COLUMNS, COLUMNS))
    update = canonical(torch.randn(2, COLUMNS), torch.randn(COLUMNS, 2))
    z = torch.randn(ROWS, COLUMNS, requires_grad=True)
    weight = model[0].weight + update.columns @ update.basis
    expected = (2 * (z @ weight.t().float() + model[0].bias)).detach()
    stacked, one = stack([("a", update)]), nn.Parameter(torch.ones(1))
    y = MergedLinear(model[0], stacked, lambda: one)(z)
    y.mul_(2.0)
    torch.testing.assert_close(y.detach(), expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert z.grad.isfinite().all() and one.grad.isfinite().all()
    del y
    z.grad = None
    assert buffers._idle_bytes() > 0
    install(model, {"a": {"0": update}}, targets=["0"])
    remove(model)
    assert buffers._idle_bytes() == 0
