"""The launch choices are plain functions; what they promise."""

import pytest
import torch
from nsc_fast.kernels.launch import (
    RANK_BINS,
    TARGETS,
    Launch,
    expand_choice,
    has_tf32,
    project_choice,
    rank_bin,
)

from nsc_fast.kernels import launch

KNOWN = [*TARGETS, "sm_86", "sm_89", "sm_121", "sm_103", "sm_75", "gfx90a", "gfx1201", "gaudi"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("target", KNOWN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rank_has_a_legal_choice(target, dtype):
    for rank in range(1, 513):
        for ratio in (True, False):
            choice = project_choice(rank, dtype, target, ratio=ratio)
            assert choice.block_r * choice.parts >= rank
            assert choice == project_choice(rank_bin(rank), dtype, target, ratio=ratio)
            for size in (choice.block_n, choice.block_d, choice.block_r):
                assert size >= 16 and size & (size - 1) == 0
        steps = ("input_gradient", "low_rank_output", "ratio_backward")
        for step in steps:
            choice = expand_choice(rank, dtype, target, step=step)
            assert choice == expand_choice(rank_bin(rank), dtype, target, step=step)
            for made in (project_choice(rank, dtype, target), choice):
                assert made.num_warps in (4, 8)
                assert made.maxnreg is None or target.startswith("sm_")


@pytest.mark.parametrize("target", KNOWN)
def test_tf32_is_a_choice_of_its_own_where_the_device_has_it(target):
    for rank in RANK_BINS:
        for choose, how in (
            (project_choice, {"ratio": True}),
            (project_choice, {"ratio": False}),
            (expand_choice, {"step": "input_gradient"}),
            (expand_choice, {"step": "ratio_backward"}),
        ):
            ieee = choose(rank, torch.float32, target, **how)
            tf32 = choose(rank, torch.float32, target, precision="tf32", **how)
            # float32's small tiles serve the ordinary arithmetic units; AMD's have no tf32.
            assert (tf32 != ieee) == has_tf32(target)
            assert tf32.prefetch == (how == {"ratio": True}) or choose is expand_choice
            half = choose(rank, torch.float16, target, **how)
            assert choose(rank, torch.float16, target, precision="tf32", **how) == half
    assert has_tf32(target) == (target.startswith("sm_") and target != "sm_75")
    with pytest.raises(ValueError, match="precision is 'fp16'"):
        project_choice(16, torch.float32, target, precision="fp16")


def test_columns_of_a_stack_are_copied_where_that_brings_back_wide_accesses():
    stack = torch.randn(8, 64)
    assert launch.coordinates(stack[:, 16:48]).data_ptr() == stack[:, 16:48].data_ptr()
    for lost in (stack[:, 3:19], torch.randn(8, 37)[:, :16]):
        assert launch.is_aligned(launch.coordinates(lost)) and not launch.is_aligned(lost)
        assert torch.equal(launch.coordinates(lost), lost)
    odd = stack[:, 3:10]
    assert launch.coordinates(odd).data_ptr() == odd.data_ptr()


@pytest.mark.parametrize("target", KNOWN)
def test_float32_never_squares_by_the_diagonal(target):
    """That form exists for the asynchronous matrix units; in float32 it would only double the work."""
    for rank in RANK_BINS:
        assert project_choice(rank, torch.float32, target).prefetch


def test_half_precision_norms_avoid_the_shared_memory_race():
    """Asynchronous matrix units: either the diagonal, or Z never sits in a multi-buffered shared tile."""
    for target in ("sm_90", "sm_100"):
        for rank in RANK_BINS:
            assert project_choice(rank, torch.bfloat16, target).prefetch == (rank == 128)


@pytest.mark.parametrize("rank", [0, 513])
def test_ranks_out_of_range(rank):
    with pytest.raises(ValueError, match="1..512"):
        rank_bin(rank)


def test_options_name_fused_multiply_add():
    assert Launch(32, 32, 32, 4, 2).options() == {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    assert Launch(32, 32, 32, 4, 2, maxnreg=128).options()["maxnreg"] == 128


def test_matrices_are_copied_only_when_they_must_be():
    wide = torch.randn(8, 40)
    assert launch.rows(wide[:, 3:20]).data_ptr() == wide[:, 3:20].data_ptr()
    assert launch.rows(wide.T).stride(1) == 1
    assert launch.matrix(wide.T).data_ptr() == wide.data_ptr()
    assert launch.matrix(wide[:, ::2]).stride(1) == 1
    one = torch.randn(5, 1).expand(5, 1)
    assert launch.rows(one).shape == (5, 1)
