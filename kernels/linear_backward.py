"""Both gradients of a Linear, and its bias's, in one launch, for training steps that launches bound.

    dx = g W        dW = gᵀ x        dbias = Σ_m g

g (M, N) the gradient of x Wᵀ + bias, x and dx (M, K), W and dW (N, K), dbias (N,). x and W are rounded to the dtype of
g as they are read, and each gradient to that of its tensor as it is written. The first programs make tiles of dW,
those of its first columns sum g's columns as they pass; the others make tiles of dx. Each sums its whole depth itself:
no atomics, the same bits in every run.
"""

import triton
import triton.language as tl

from .casts import column_sum, dot_operand, to_stored
from .tiles import aligned


@triton.jit
def load_part(ptr, row, col, rows, cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS) of a (rows, cols) matrix at (row, col), 0 outside, as it is stored."""
    r, c = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
    mask = (r < rows)[:, None] & (c < cols)[None, :]
    return tl.load(ptr + r.to(tl.int64)[:, None] * stride + c[None, :], mask=mask, other=0.0)


@triton.jit
def store_part(ptr, values, row, col, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    r, c = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
    mask = (r < rows)[:, None] & (c < cols)[None, :]
    tl.store(ptr + r.to(tl.int64)[:, None] * cols + c[None, :], to_stored(values, ptr.dtype.element_ty), mask=mask)


@triton.jit
def input_gradient_tile(
    dz_ptr, weight_ptr, dx_ptr, row, col, M, N, K,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((ROWS, COLS), tl.float32)
    for n in range(0, N, DEPTH):
        g = load_part(dz_ptr, row, n, M, N, N, ROWS, DEPTH)
        w = load_part(weight_ptr, n, col, N, K, K, DEPTH, COLS)
        total = tl.dot(dot_operand(g, g.dtype), dot_operand(w, g.dtype), total, input_precision=PRECISION)
    store_part(dx_ptr, total, row, col, M, K, ROWS, COLS)


@triton.jit
def weight_gradient_tile(
    dz_ptr, x_ptr, dweight_ptr, dz_sum_ptr, row, col, M, N, K,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((ROWS, COLS), tl.float32)
    sums = tl.zeros((DEPTH, ROWS), tl.float32)
    for m in range(0, M, DEPTH):
        g = load_part(dz_ptr, m, row, M, N, N, DEPTH, ROWS)
        x = load_part(x_ptr, m, col, M, K, K, DEPTH, COLS)
        total = tl.dot(tl.trans(dot_operand(g, g.dtype)), dot_operand(x, g.dtype), total, input_precision=PRECISION)
        if dz_sum_ptr is not None:
            sums += g.to(tl.float32)
    store_part(dweight_ptr, total, row, col, N, K, ROWS, COLS)
    if dz_sum_ptr is not None:
        if col == 0:
            n = row + tl.arange(0, ROWS)
            tl.store(dz_sum_ptr + n, to_stored(column_sum(sums), dz_sum_ptr.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["M", "N", "K"])
def linear_backward_kernel(
    dz_ptr,  # (M, N)
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
    dx_ptr,  # (M, K) or None
    dweight_ptr,  # (N, K)
    dz_sum_ptr,  # (N,), the bias's gradient, or None
    M, N, K, PRECISION: tl.constexpr, VEC: tl.constexpr, VEC_K: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    N, K = aligned(N, VEC), aligned(K, VEC_K)
    col_tiles = tl.cdiv(K, COLS)
    row, col = tl.program_id(0) // col_tiles * ROWS, tl.program_id(0) % col_tiles * COLS
    rows_of_dw = tl.cdiv(N, ROWS) * ROWS
    if row < rows_of_dw:
        weight_gradient_tile(dz_ptr, x_ptr, dweight_ptr, dz_sum_ptr, row, col, M, N, K,
                             PRECISION, ROWS, COLS, DEPTH)  # fmt: skip
    elif dx_ptr is not None:
        input_gradient_tile(dz_ptr, weight_ptr, dx_ptr, row - rows_of_dw, col, M, N, K, PRECISION, ROWS, COLS, DEPTH)
