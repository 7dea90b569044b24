"""project against the float64 oracle: every output, dtype, way of asking, edge value and memory layout."""

import kernel_oracle as oracle
import pytest
import torch
from interp_support import DTYPES, TARGETS, basis, close, ids, segments
from nsc_fast.kernels.launch import project_choice
from nsc_fast.kernels.project import low_rank_input, project

CLAMP = 1e-6


def compare(z, q, segment, num_segments, target="sm_90", **how):
    choice = project_choice(q.shape[0], z.dtype, target)
    out = project(z, q, segment, num_segments, clamp=CLAMP, choice=choice, **how)
    p, norm2, omega, loss = oracle.project(z, q, segment, num_segments, clamp=CLAMP, **how)
    close("p", out.p, p, floor=1e-6)
    close("norm2", out.norm2, norm2, floor=0, unit=1e-6)
    close("omega", out.omega, omega.view(out.omega.shape), floor=0, unit=2e-6)
    if loss is not None:
        close("loss", out.loss_partials.double().sum(0), loss, floor=1e-6)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "n, d, ranks",
    [
        (1, 16, [1]),
        (130, 136, [16]),
        (77, 200, [5, 7, 9]),
        (150, 48, [16] * 6),
        (20, 300, [100, 100]),
        (9, 640, [300]),
    ],
)
def test_every_segment(n, d, ranks, target, dtype):
    z = torch.randn(n, d).to(dtype)
    compare(z, basis(ranks, d, dtype), segments(ranks), len(ranks), target, weight=torch.rand(n))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("siblings", [1, 3])
def test_own_segment(siblings, target, dtype):
    n, d, ranks = 140, 72, [3, 8, 5] * siblings
    z = torch.randn(n, d).to(dtype)
    task = torch.randint(-1, 3, (n,), dtype=torch.int32)
    how = {"task": task, "siblings": siblings, "weight": torch.rand(n)}
    out = compare(z, basis(ranks, d, dtype), segments(ranks), len(ranks), target, **how)
    assert (out.omega.view(n, -1)[task < 0] == 1).all()


def test_a_token_without_a_task_has_ratio_one_whatever_it_holds():
    ranks, z = [4, 4], torch.randn(6, 32)
    z[2] = float("nan")
    task = torch.tensor([0, 1, -1, -1, 0, 1], dtype=torch.int32)
    out = project(z, basis(ranks, 32, torch.float32), segments(ranks), 2, task=task, weight=torch.ones(6))
    assert out.omega[2:4].tolist() == [1, 1] and out.loss_partials.isfinite().all()


def test_more_tasks_than_one_block_of_partials():
    ranks = [1] * 20
    z, task = torch.randn(70, 64), torch.randint(0, 20, (70,), dtype=torch.int32)
    compare(z, basis(ranks, 64, torch.float32), segments(ranks), 20, task=task, weight=torch.rand(70))


@pytest.mark.parametrize("task", [0, 1, 2])
def test_one_task_for_the_launch(task):
    ranks = [4, 2, 6]
    z = torch.randn(40, 56)
    compare(z, basis(ranks, 56, torch.float32), segments(ranks), 3, task=task, weight=torch.rand(40))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_zero_tokens_and_tokens_inside_the_row_space(dtype, target):
    q = basis([8], 32, torch.float32)
    z = torch.randn(24, 32)
    z[::3] = 0
    z[1::3] = torch.randn(8, 8) @ q
    out = project(z.to(dtype), q.to(dtype), clamp=0.25, choice=project_choice(8, dtype, target))
    assert (out.omega[::3] == 1).all()
    assert torch.allclose(out.omega[1::3], torch.tensor(0.5))


def test_nan_is_not_hidden_but_a_masked_token_adds_nothing():
    z = torch.randn(10, 32)
    z[4] = float("nan")
    weight = torch.ones(10)
    out = project(z, basis([4], 32, torch.float32), clamp=CLAMP, weight=weight)
    assert out.omega[4].isnan() and out.loss_partials.sum().isnan()
    weight[4] = 0
    out = project(z, basis([4], 32, torch.float32), clamp=CLAMP, weight=weight)
    assert out.loss_partials.isfinite().all()
    assert out.omega[[0, 1, 2, 3, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_strides(dtype):
    wide = torch.randn(120, 2 * 96 + 3).to(dtype)
    q = basis([6, 6], 96, dtype)
    columns = q.T.contiguous().T  # (R, d) view with unit stride along R
    for z in (wide[::2, 3:99], wide[:, :96], wide[:96, :60].T, wide[:1, :96].expand(60, 96)):
        if z.shape[1] == 96:
            compare(z, columns, segments([6, 6]), 2)
            compare(z, q[:, torch.arange(96)], segments([6, 6]), 2)


def test_only_what_is_asked_for():
    z, q = torch.randn(50, 40), basis([7], 40, torch.float32)
    full = project(z, q)
    assert full.loss_partials is None
    without_p = project(z, q, want_p=False)
    assert without_p.p is None and torch.equal(without_p.omega, full.omega)
    only_p = project(z, q, ratio=False)
    assert only_p.norm2 is None and only_p.omega is None and torch.equal(only_p.p, low_rank_input(z, q))
    close("p", only_p.p, z.double() @ q.double().T, floor=1e-6)


def test_empty():
    q = basis([3, 4], 24, torch.float32)
    out = project(torch.randn(0, 24), q, segments([3, 4]), 2, weight=torch.rand(0))
    assert out.p.shape == (0, 7) and out.omega.shape == (0, 2) and out.loss_partials.shape == (0, 2)


def test_refusals():
    z, q = torch.randn(8, 24), basis([4], 24, torch.float32)
    with pytest.raises(ValueError, match=r"q must have shape \('\*', 24\)"):
        project(z, q[:, :20])
    with pytest.raises(ValueError, match="q is torch.float16"):
        project(z, q.half())
    with pytest.raises(ValueError, match="z is torch.float64"):
        project(z.double(), q.double())
    with pytest.raises(ValueError, match="1..512"):
        project(z, torch.randn(513, 24))
    with pytest.raises(ValueError, match="siblings"):
        project(z, q, segments([2, 2]), 2, siblings=2)
    with pytest.raises(ValueError, match="nothing to compute"):
        project(z, q, ratio=False, want_p=False)
