"""Rounding to stored dtypes bit by bit, and the helpers that lead the interpreter."""

import pytest
import torch
import triton
import triton.language as tl

from fastnn.kernels import casts
from fastnn.kernels.tiles import LAUNCH_OPTIONS


@triton.jit
def store_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, casts.to_stored(tl.load(x_ptr + at), out_ptr.dtype.element_ty))


@triton.jit
def column_sum_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    cols = tl.arange(0, COLS)
    x = tl.load(x_ptr + tl.arange(0, ROWS)[:, None] * COLS + cols[None, :])
    tl.store(out_ptr + cols, casts.column_sum(x))


def hard_values() -> torch.Tensor:
    """Random bits, ties between two bf16 values, the largest finite numbers, denormals, NaN with any payload."""
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (4096,), dtype=torch.int64)
    bits[:1024] = bits[:1024] & ~0xFFFF | 0x8000
    edges = [0x7F7FFFFF, 0x7F7F8000, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x7FC00000, 1, 0x8000]
    bits[1024:1040] = torch.tensor(edges + [edge | 1 << 31 for edge in edges])
    return bits.to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_stored_values_are_rounded_to_nearest_even(dtype, device):
    x = hard_values().to(device)
    out = torch.empty(4096, dtype=dtype, device=device)
    store_kernel[(1,)](x, out, 4096, **LAUNCH_OPTIONS)
    expected = x.to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(out[numbers], expected[numbers])


@pytest.mark.parametrize("rows", [1, 2, 64, 1024])
def test_column_sums_are_as_accurate_as_a_tree(rows, device):
    """A chain of 1024 additions would be off by 1e-6 of the norm of the terms."""
    x = torch.randn(rows, 16, device=device)
    out = torch.empty(16, device=device)
    column_sum_kernel[(1,)](x, out, rows, 16, **LAUNCH_OPTIONS)
    error = (out.double() - x.double().sum(0)).norm() / x.norm()
    assert error <= torch.finfo(torch.float32).eps
