"""The readers of compiler output see what they are for."""

import torch
import triton
import triton.language as tl
from compile_report import compiled_by, layout_lints, report


@triton.jit
def _race(z_ptr, q_ptr, p_ptr, norm2_ptr, dim, B: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    """The form that must not ship: one pipelined tile feeds wgmma and register arithmetic."""
    n, r, d = tl.arange(0, B), tl.arange(0, R), tl.arange(0, D)
    acc, norm2 = tl.zeros((B, R), tl.float32), tl.zeros((B,), tl.float32)
    for start in range(0, dim, D):
        z = tl.load(z_ptr + n[:, None] * dim + start + d[None, :])
        q = tl.load(q_ptr + r[None, :] * dim + start + d[:, None])
        acc = tl.dot(z, q, acc)
        norm2 += tl.sum(z.to(tl.float32) * z.to(tl.float32), axis=1)
    tl.store(p_ptr + n[:, None] * R + r[None, :], acc)
    tl.store(norm2_ptr + n, norm2)


@triton.jit
def _greedy(x_ptr, y_ptr, B: tl.constexpr):
    """Holds far more numbers than there are registers."""
    i = tl.arange(0, B)
    at = i[:, None] * B + i[None, :]
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    for _ in range(4):
        x, y = tl.dot(x, y), tl.dot(y, x)
    tl.store(x_ptr + at, x + y)


def _compile(target, kernel, *args, **options):
    (only,) = compiled_by(target, lambda: kernel[(1,)](*args, **options), kernel)
    return only


def _race_on(target):
    z, q = torch.zeros(64, 512, dtype=torch.bfloat16), torch.zeros(64, 512, dtype=torch.bfloat16)
    args = (z, q, torch.zeros(64, 64), torch.zeros(64), 512)
    return _compile(target, _race, *args, B=64, R=64, D=64, num_warps=4, num_stages=3)


def test_unequal_buffers_are_found():
    found = layout_lints(_race_on("sm_90").asm["ttgir"])
    assert any("buffered unequally" in lint for lint in found), found


def test_missing_swizzle_is_found():
    found = layout_lints(_race_on("sm_80").asm["ttgir"])
    assert any("not swizzled" in lint for lint in found), found


def test_spills_are_found():
    x = torch.zeros(128, 128)
    found = report(_compile("sm_80", _greedy, x, x.clone(), B=128, num_warps=4), trips=4)
    assert found["spills"] > 0


def test_narrow_accesses_are_found():
    z = torch.zeros(64, 514, dtype=torch.bfloat16)[:, 1:513]  # rows are 4-byte aligned at best
    args = (z, z, torch.zeros(64, 64), torch.zeros(64), 511)
    kernel = _compile("sm_80", _race, *args, B=64, R=64, D=64, num_warps=4, num_stages=3)
    assert report(kernel, trips=8)["wide"] < 0.5
