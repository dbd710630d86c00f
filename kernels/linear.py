"""Linear with its epilogue in one launch: GEMM, bias, BatchNorm by running statistics, activation, dropout.

    z   = x Wᵀ + bias
    y   = (z - running_mean) · gamma / sqrt(running_var + eps) + beta      (eval BatchNorm only)
    out = activation(y) · multiplier

x (M, K), W (N, K), z and out (M, N). x, W and bias of another dtype than out are rounded to it as they are read: what
autocast would launch a cast each for. Where a backward follows, z is stored too and out is computed from z as
stored, so that the backward recomputes the very same gate.

Accesses of (M, N) in device memory: W out; W z, W out where z is kept.
"""

import triton
import triton.language as tl

from .batch_norm import NORM_RUNNING, RUNTIME_ARGUMENTS, reciprocal_sqrt
from .casts import dot_operand, rounded, to_stored
from .dropout import dropout_multiplier, load_key
from .tiles import aligned, load_columns

GROUP_ROWS = tl.constexpr(8)  # row tiles that share a column of W tiles while those are in L2


@triton.jit
def grouped_tile(program, row_tiles, col_tiles):
    """Row and column tile of a program, in groups of GROUP_ROWS row tiles (column-major within a group)."""
    group_size = GROUP_ROWS * col_tiles
    first = program // group_size * GROUP_ROWS
    rows = tl.minimum(row_tiles - first, GROUP_ROWS)
    return first + program % group_size % rows, program % group_size // rows


@triton.jit
def product_tile(
    a, b, row, col, a_rows, b_rows, K, DTYPE: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLS) tile at (row, col) of a bᵀ, of a (a_rows, K) and b (b_rows, K) rounded to DTYPE, summed in fp32.

    a and b are addresses, or descriptors by which the tensor memory accelerator copies whole tiles. What a tile has
    beyond the last row is masked at the store.
    """
    total = tl.zeros((ROWS, COLS), tl.float32)
    if DESCRIPTORS:
        for k in range(0, K, DEPTH):
            left, right = dot_operand(a.load([row, k]), DTYPE), dot_operand(b.load([col, k]), DTYPE)
            total = tl.dot(left, right.T, total, input_precision=PRECISION)
    else:
        depth = tl.arange(0, DEPTH)
        # Rows past the end are wrapped to existing ones, so that the loads stay full.
        rows, cols = (row + tl.arange(0, ROWS)) % a_rows, (col + tl.arange(0, COLS)) % b_rows
        a_ptrs = a + rows.to(tl.int64)[:, None] * K + depth[None, :]
        b_ptrs = b + cols.to(tl.int64)[None, :] * K + depth[:, None]
        for k in range(0, K, DEPTH):
            exists = depth < K - k
            left = dot_operand(tl.load(a_ptrs, mask=exists[None, :], other=0.0), DTYPE)
            right = dot_operand(tl.load(b_ptrs, mask=exists[:, None], other=0.0), DTYPE)
            total = tl.dot(left, right, total, input_precision=PRECISION)
            a_ptrs += DEPTH
            b_ptrs += DEPTH
    return total


@triton.jit(do_not_specialize=[*RUNTIME_ARGUMENTS, "K"])
def linear_forward_kernel(
    x,  # (M, K), an address or a descriptor
    weight,  # (N, K), the same
    bias_ptr,  # (N,) or None
    z_ptr,  # (M, N), or None where no backward follows
    out_ptr,  # (M, N)
    gamma_ptr, beta_ptr, running_mean_ptr, running_var_ptr,  # (N,) or None
    seed_ptr,  # () int64 or None
    seed: tl.uint64, M, N, K, eps, act_a, act_b, threshold, keep_scale,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, VEC: tl.constexpr, VEC_K: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    N, K = aligned(N, VEC), aligned(K, VEC_K)
    row_tile, col_tile = grouped_tile(tl.program_id(0), tl.cdiv(M, ROWS), tl.cdiv(N, COLS))
    row, col = row_tile * ROWS, col_tile * COLS
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    y = product_tile(x, weight, row, col, M, N, K, dtype, PRECISION, DESCRIPTORS, ROWS, COLS, DEPTH)
    cols = col + tl.arange(0, COLS)
    bias = rounded(load_columns(bias_ptr, cols, N, 0.0), dtype)
    if NORM == NORM_RUNNING:
        # Subtracted before scaling: scale · mean folded into the shift would cancel at a large mean.
        bias -= load_columns(running_mean_ptr, cols, N, 0.0)
    y += bias[None, :]
    rows = row + tl.arange(0, ROWS)
    offsets = rows.to(tl.int64)[:, None] * N + cols[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    if z_ptr is not None:
        z = to_stored(y, dtype)
        tl.store(z_ptr + offsets, z, mask=mask)
        y = z.to(tl.float32)
    if NORM == NORM_RUNNING:
        rstd = reciprocal_sqrt(load_columns(running_var_ptr, cols, N, 1.0) + eps)
        scale = rstd * load_columns(gamma_ptr, cols, N, 1.0)
        y = y * scale[None, :] + load_columns(beta_ptr, cols, N, 0.0)[None, :]
    value = ACTIVATION(y, act_a, act_b)
    if DROPOUT:
        value = value * dropout_multiplier(load_key(seed_ptr, seed), row, col, threshold, keep_scale, ROWS, COLS)
    tl.store(out_ptr + offsets, to_stored(value, dtype), mask=mask)
