"""The repaired interpreter computes bfloat16 as a device does; without the repair these fail."""

import torch
import triton
import triton.language as tl


@triton.jit
def _products(a_ptr, b_ptr, dot_ptr, sum_ptr, cast_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(dot_ptr + at, tl.dot(a, tl.trans(b)))
    tl.store(sum_ptr + at, a + b)
    tl.store(cast_ptr + at, (a.to(tl.float32) * 1.2345).to(tl.bfloat16))


def test_products_sums_and_casts():
    a, b = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16()
    dot, total, cast = torch.empty(32, 32), torch.empty_like(a), torch.empty_like(a)
    _products[(1,)](a, b, dot, total, cast, BLOCK=32)
    assert torch.allclose(dot, a.float() @ b.float().T, rtol=1e-5, atol=1e-5)
    assert torch.equal(total, a + b)
    assert torch.equal(cast, (a.float() * 1.2345).bfloat16())
