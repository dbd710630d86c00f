"""Linear + BatchNorm + activation + dropout of a whole batch in one launch, for training steps that launches bound.

    z = x Wᵀ + bias;  then batch_norm.py's forward on z as stored

x (M, K), W (N, K), z and out (M, N). A program owns COLS columns of all M rows, so their statistics are its own and z
never leaves its registers; the price is that every program reads all of x, which L2 serves after the first. As in
linear.py, x, W and bias are rounded to the dtype of out.

Saved for the backward: z, and mean and rstd as (2, N) fp32. Accesses of (M, N) in device memory: W z, W out.
"""

import triton
import triton.language as tl

from .batch_norm import NORM_BATCH, RUNTIME_ARGUMENTS, apply_tile, keep_statistics, tile_statistics
from .casts import rounded, to_stored
from .dropout import load_key
from .linear import product_tile
from .tiles import aligned, load_columns, tile_offsets


@triton.jit(do_not_specialize=[*RUNTIME_ARGUMENTS, "K"])
def whole_batch_forward_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,) or None
    z_ptr,  # (M, N), or None where no backward follows
    out_ptr,  # (M, N)
    gamma_ptr, beta_ptr,  # (N,) or None
    stats_ptr,  # (2, N) fp32: mean, rstd
    running_mean_ptr, running_var_ptr,  # (N,) or None
    batches_ptr,  # () int64 or None
    seed_ptr,  # () int64 or None
    seed: tl.uint64, M, N, K, momentum, eps, act_a, act_b, threshold, keep_scale,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, CUMULATIVE: tl.constexpr, PRECISION: tl.constexpr,
    VEC: tl.constexpr, VEC_K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    N, K = aligned(N, VEC), aligned(K, VEC_K)
    col = tl.program_id(0) * COLS
    cols = col + tl.arange(0, COLS)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    product = product_tile(x_ptr, weight_ptr, 0, col, M, N, K, dtype, PRECISION, False, ROWS, COLS, DEPTH)
    stored = to_stored(product + rounded(load_columns(bias_ptr, cols, N, 0.0), dtype)[None, :], dtype)
    if z_ptr is not None:
        _, offsets, mask = tile_offsets(0, M, N, col, True, ROWS, COLS)
        tl.store(z_ptr + offsets, stored, mask=mask)
    # Rows past the end hold products of wrapped rows, which the statistics must not see.
    z = tl.where(tl.arange(0, ROWS)[:, None] < M, stored.to(tl.float32), 0.0)
    mean, m2 = tile_statistics(z, 0, M, ROWS, COLS)
    scale, shift = keep_statistics(mean, m2, gamma_ptr, beta_ptr, stats_ptr, running_mean_ptr, running_var_ptr,
                                   batches_ptr, cols, M, N, momentum, eps, CUMULATIVE)  # fmt: skip
    key = load_key(seed_ptr, seed)
    apply_tile(z, out_ptr, 0, M, N, col, mean, scale, shift, act_a, act_b, key, threshold, keep_scale,
               ACTIVATION, NORM_BATCH, DROPOUT, True, ROWS, COLS)  # fmt: skip
