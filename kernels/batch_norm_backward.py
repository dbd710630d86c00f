"""Backward of batch_norm.py and, without BatchNorm, of activation + dropout.

    dy     = activation'(y) · g · multiplier        y and the multiplier recomputed from z and the key
    dbeta  = Σ_m dy              dgamma = Σ_m dy · xhat,      xhat = (z - mean) · rstd
    dz     = gamma · rstd · (dy - dbeta/M - xhat · dgamma/M)        batch statistics
    dz     = gamma · rstd · dy                                      running statistics
    dz     = dy                                                     no BatchNorm
    dbias  = Σ_m dz: exact zeros for batch statistics (what eager sums there is rounding noise, which Adam
             would turn into drift), gamma · rstd · dbeta or dbeta else

Accesses of (M, N) in device memory:
    columns  R g, R z, W dz             the second pass is served by L2 or by registers
    split    R g, R z | R g, R z, W dz  two launches
"""

import triton
import triton.language as tl

from .batch_norm import NORM_BATCH, NORM_NONE, NORM_RUNNING, RUNTIME_ARGUMENTS, normalise
from .casts import column_sum, to_stored
from .dropout import dropout_multiplier, load_key
from .partials import load_partials
from .tiles import aligned, load_columns, load_tile, tile_offsets


@triton.jit
def gradient_tile(
    g_ptr, z_ptr, row, end, N, col, mean, rstd, scale, shift, act_a, act_b, key, threshold, keep_scale,
    ACTIVATION_BACKWARD: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr, MASK_ROWS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dy and xhat of one tile; dy is 0 in rows that do not exist (g is), xhat meaningless without BatchNorm."""
    g = load_tile(g_ptr, row, end, N, col, MASK_ROWS, ROWS, COLS)
    z = load_tile(z_ptr, row, end, N, col, MASK_ROWS, ROWS, COLS)
    xhat = z
    if NORM != NORM_NONE:
        xhat = (z - mean[None, :]) * rstd[None, :]
        z = normalise(z, mean[None, :], scale[None, :], shift[None, :])
    if DROPOUT:
        g = g * dropout_multiplier(key, row, col, threshold, keep_scale, ROWS, COLS)
    return ACTIVATION_BACKWARD(g, z, act_a, act_b), xhat


@triton.jit
def store_dz(
    dy, xhat, dz_ptr, row, end, N, col, scale, mean_dy, mean_dy_xhat,
    NORM: tl.constexpr, MASK_ROWS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    dz = dy
    if NORM == NORM_BATCH:
        dz = dy - mean_dy[None, :] - xhat * mean_dy_xhat[None, :]
    if NORM != NORM_NONE:
        dz = dz * scale[None, :]
    first, offsets, mask = tile_offsets(row, end, N, col, MASK_ROWS, ROWS, COLS)
    tl.store(dz_ptr + first + offsets, to_stored(dz, dz_ptr.dtype.element_ty), mask=mask)


@triton.jit
def stream_sums(
    g_ptr, z_ptr, begin, end, N, col, mean, rstd, scale, shift, act_a, act_b, key, threshold, keep_scale,
    ACTIVATION_BACKWARD: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Column sums of dy and dy · xhat over rows [begin, end): one accumulator per slot of the tile, then a tree."""
    sum_dy = tl.zeros((ROWS, COLS), tl.float32)
    sum_dy_xhat = tl.zeros((ROWS, COLS), tl.float32)
    full = (end - begin) // ROWS
    for tile in range(full):
        dy, xhat = gradient_tile(g_ptr, z_ptr, begin + tile * ROWS, end, N, col, mean, rstd, scale, shift,
                                 act_a, act_b, key, threshold, keep_scale,
                                 ACTIVATION_BACKWARD, NORM, DROPOUT, False, ROWS, COLS)  # fmt: skip
        sum_dy += dy
        sum_dy_xhat += dy * xhat
    dy, xhat = gradient_tile(g_ptr, z_ptr, begin + full * ROWS, end, N, col, mean, rstd, scale, shift,
                             act_a, act_b, key, threshold, keep_scale,
                             ACTIVATION_BACKWARD, NORM, DROPOUT, True, ROWS, COLS)  # fmt: skip
    return column_sum(sum_dy + dy), column_sum(sum_dy_xhat + dy * xhat)


@triton.jit
def stream_dz(
    g_ptr, z_ptr, dz_ptr, begin, end, N, col, mean, rstd, scale, shift, mean_dy, mean_dy_xhat,
    act_a, act_b, key, threshold, keep_scale,
    ACTIVATION_BACKWARD: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    full = (end - begin) // ROWS
    for tile in range(full):
        row = begin + tile * ROWS
        dy, xhat = gradient_tile(g_ptr, z_ptr, row, end, N, col, mean, rstd, scale, shift, act_a, act_b, key,
                                 threshold, keep_scale, ACTIVATION_BACKWARD, NORM, DROPOUT, False,
                                 ROWS, COLS)  # fmt: skip
        store_dz(dy, xhat, dz_ptr, row, end, N, col, scale, mean_dy, mean_dy_xhat, NORM, False, ROWS, COLS)
    row = begin + full * ROWS
    if row < end:
        dy, xhat = gradient_tile(g_ptr, z_ptr, row, end, N, col, mean, rstd, scale, shift, act_a, act_b, key,
                                 threshold, keep_scale, ACTIVATION_BACKWARD, NORM, DROPOUT, True,
                                 ROWS, COLS)  # fmt: skip
        store_dz(dy, xhat, dz_ptr, row, end, N, col, scale, mean_dy, mean_dy_xhat, NORM, True, ROWS, COLS)


@triton.jit
def load_norm(stats_ptr, gamma_ptr, beta_ptr, cols, N):
    """mean, rstd, rstd · gamma and beta of the forward; 0, 1, 1, 0 where there is no BatchNorm."""
    mean = load_columns(stats_ptr, cols, N, 0.0)
    rstd = load_columns(None, cols, N, 1.0)
    if stats_ptr is not None:
        rstd = load_columns(stats_ptr + N, cols, N, 1.0)
    return mean, rstd, rstd * load_columns(gamma_ptr, cols, N, 1.0), load_columns(beta_ptr, cols, N, 0.0)


@triton.jit
def store_column(ptr, values, cols, N):
    if ptr is not None:
        tl.store(ptr + cols, to_stored(values, ptr.dtype.element_ty), mask=cols < N)


@triton.jit
def store_parameter_gradients(
    dgamma_ptr, dbeta_ptr, dbias_ptr, sum_dy, sum_dy_xhat, scale, cols, N, NORM: tl.constexpr
):
    store_column(dgamma_ptr, sum_dy_xhat, cols, N)
    store_column(dbeta_ptr, sum_dy, cols, N)
    if NORM == NORM_BATCH:
        store_column(dbias_ptr, tl.zeros_like(sum_dy), cols, N)
    elif NORM == NORM_RUNNING:
        store_column(dbias_ptr, sum_dy * scale, cols, N)
    else:
        store_column(dbias_ptr, sum_dy, cols, N)


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def columns_backward_kernel(
    g_ptr, z_ptr,  # (M, N)
    dz_ptr,  # (M, N)
    stats_ptr,  # (2, N) fp32: mean, rstd; None without BatchNorm
    gamma_ptr, beta_ptr,  # (N,) or None
    dgamma_ptr, dbeta_ptr, dbias_ptr,  # (N,) or None
    seed_ptr,  # () int64 or None
    seed: tl.uint64, M, N, act_a, act_b, threshold, keep_scale,
    ACTIVATION_BACKWARD: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr,
    ONE_TILE: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One program, COLS whole columns: sums, then dz, from registers if the column is one tile."""
    N = aligned(N, VEC)
    col = tl.program_id(0) * COLS
    cols = col + tl.arange(0, COLS)
    key = load_key(seed_ptr, seed)
    mean, rstd, scale, shift = load_norm(stats_ptr, gamma_ptr, beta_ptr, cols, N)
    if ONE_TILE:
        dy, xhat = gradient_tile(g_ptr, z_ptr, 0, M, N, col, mean, rstd, scale, shift, act_a, act_b, key, threshold,
                                 keep_scale, ACTIVATION_BACKWARD, NORM, DROPOUT, True, ROWS, COLS)  # fmt: skip
        sum_dy, sum_dy_xhat = column_sum(dy), column_sum(dy * xhat)
        store_dz(dy, xhat, dz_ptr, 0, M, N, col, scale, sum_dy / M, sum_dy_xhat / M, NORM, True, ROWS, COLS)
    else:
        sum_dy, sum_dy_xhat = stream_sums(g_ptr, z_ptr, 0, M, N, col, mean, rstd, scale, shift, act_a, act_b, key,
                                          threshold, keep_scale, ACTIVATION_BACKWARD, NORM, DROPOUT,
                                          ROWS, COLS)  # fmt: skip
        stream_dz(g_ptr, z_ptr, dz_ptr, 0, M, N, col, mean, rstd, scale, shift, sum_dy / M, sum_dy_xhat / M,
                  act_a, act_b, key, threshold, keep_scale, ACTIVATION_BACKWARD, NORM, DROPOUT,
                  ROWS, COLS)  # fmt: skip
    store_parameter_gradients(dgamma_ptr, dbeta_ptr, dbias_ptr, sum_dy, sum_dy_xhat, scale, cols, N, NORM)


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def split_sums_kernel(
    g_ptr, z_ptr,  # (M, N)
    stats_ptr,  # (2, N) fp32: mean, rstd; None without BatchNorm
    gamma_ptr, beta_ptr,  # (N,) or None
    partials_ptr,  # (chunks, 2, N) fp32: Σ dy, Σ dy · xhat
    seed_ptr,  # () int64 or None
    seed: tl.uint64, M, N, rows_per_chunk, act_a, act_b, threshold, keep_scale,
    ACTIVATION_BACKWARD: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr,
    VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The column sums of one chunk of rows."""
    N = aligned(N, VEC)
    col, chunk = tl.program_id(0) * COLS, tl.program_id(1)
    cols = col + tl.arange(0, COLS)
    key = load_key(seed_ptr, seed)
    mean, rstd, scale, shift = load_norm(stats_ptr, gamma_ptr, beta_ptr, cols, N)
    begin = chunk * rows_per_chunk
    sum_dy, sum_dy_xhat = stream_sums(g_ptr, z_ptr, begin, tl.minimum(begin + rows_per_chunk, M), N, col, mean, rstd,
                                      scale, shift, act_a, act_b, key, threshold, keep_scale, ACTIVATION_BACKWARD,
                                      NORM, DROPOUT, ROWS, COLS)  # fmt: skip
    store_column(partials_ptr + 2 * chunk * N, sum_dy, cols, N)
    store_column(partials_ptr + (2 * chunk + 1) * N, sum_dy_xhat, cols, N)


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def split_dz_kernel(
    g_ptr, z_ptr,  # (M, N)
    dz_ptr,  # (M, N)
    stats_ptr,  # (2, N) fp32: mean, rstd; None without BatchNorm
    gamma_ptr, beta_ptr,  # (N,) or None
    partials_ptr,  # (chunks, 2, N) fp32: Σ dy, Σ dy · xhat
    dgamma_ptr, dbeta_ptr, dbias_ptr,  # (N,) or None
    seed_ptr,  # () int64 or None
    seed: tl.uint64,
    total_ptr,  # (N,) fp32: rows of all processes that share the statistics; None if it is one alone
    M, N, chunks, rows_per_chunk, act_a, act_b, threshold, keep_scale,
    ACTIVATION_BACKWARD: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr,
    CHUNKS: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dz of one chunk of rows from the sums of all chunks; the first chunk's programs store the sums."""
    N = aligned(N, VEC)
    col, chunk = tl.program_id(0) * COLS, tl.program_id(1)
    cols = col + tl.arange(0, COLS)
    key = load_key(seed_ptr, seed)
    mean, rstd, scale, shift = load_norm(stats_ptr, gamma_ptr, beta_ptr, cols, N)
    sum_dy = column_sum(load_partials(partials_ptr, 0, 2, chunks, N, cols, CHUNKS))
    sum_dy_xhat = column_sum(load_partials(partials_ptr, 1, 2, chunks, N, cols, CHUNKS))
    total = M
    if total_ptr is not None:
        total = load_columns(total_ptr, cols, N, 1.0)
    begin = chunk * rows_per_chunk
    stream_dz(g_ptr, z_ptr, dz_ptr, begin, tl.minimum(begin + rows_per_chunk, M), N, col, mean, rstd, scale, shift,
              sum_dy / total, sum_dy_xhat / total, act_a, act_b, key, threshold, keep_scale,
              ACTIVATION_BACKWARD, NORM, DROPOUT, ROWS, COLS)  # fmt: skip
    if chunk == 0:
        store_parameter_gradients(dgamma_ptr, dbeta_ptr, dbias_ptr, sum_dy, sum_dy_xhat, scale, cols, N, NORM)
