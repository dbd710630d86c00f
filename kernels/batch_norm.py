"""Training forward of BatchNorm + activation + dropout over an (M, N) activation z, each part optional.

    mean_n = 1/M Σ_m z_mn        var_n = 1/M Σ_m (z_mn - mean_n)²        rstd_n = 1 / sqrt(var_n + eps)
    y      = (z - mean) · (rstd · gamma) + beta
    out    = activation(y) · multiplier                      (dropout.py; 1 without dropout)
    running_mean <- (1 - f) · running_mean + f · mean
    running_var  <- (1 - f) · running_var + f · var · M/(M-1),          f = momentum, or 1/num_batches_tracked

(Ioffe & Szegedy, "Batch Normalization", 2015, algorithm 1.) Statistics are Welford's, one running mean and centred
sum of squares for every slot of the tile, combined once at the end (Chan, Golub & LeVeque 1983). They are
never E[z²] - E[z]², which loses everything at mean 1e4 and spread 1.

Saved for the backward: mean and rstd, (2, N) fp32. Recomputed there: y, the gate, the mask.

Accesses of (M, N) in device memory:
    columns  R z, W out       a program owns whole columns; a second read of z is served by L2 or by registers
    split    R z | R z W out  two launches: partial statistics per chunk of rows, then apply
"""

import triton
import triton.language as tl

from .casts import column_sum, to_stored
from .dropout import dropout_multiplier, load_key
from .partials import load_statistics, store_statistics
from .tiles import aligned, load_columns, load_tile, tile_offsets

NORM_NONE, NORM_BATCH, NORM_RUNNING = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Sizes and the key change from call to call; specialising on them would recompile.
RUNTIME_ARGUMENTS = ["M", "N", "seed", "threshold", "chunks", "rows_per_chunk"]


@triton.jit
def reciprocal_sqrt(x):
    """1 / sqrt(x) to half an ulp or so: the hardware's 2 ulp would stand in every element; one Newton step mends them.

    The correctly rounded division and root are subroutine calls, around which sm_100 spills.
    """
    r = tl.rsqrt(x)
    refined = tl.fma(0.5 * r, tl.fma(-x * r, r, tl.full(x.shape, 1.0, tl.float32)), r)
    return tl.where((r > 0) & (r < float("inf")), refined, r)


@triton.jit
def normalise(z, mean, scale, shift):
    """One rounding after z - mean, in forward and backward alike, or their ReLU gates would differ near 0."""
    return tl.fma(z - mean, tl.broadcast_to(scale, z.shape), tl.broadcast_to(shift, z.shape))


@triton.jit
def combine(total, count, mean, m2):
    """Chan's combination along axis 0 of groups with count (may be 0; total in all), mean and centred sum of squares.

    Returns the mean, what it lost by rounding, and the sum of squares. A mean of 1e4 rounds by 5e-4, which in the next
    combination would stand in the variance, twice the distance of the means times over.
    """
    pooled = column_sum(mean * count) / total
    deviation = mean - pooled[None, :]
    return pooled, column_sum(count * deviation) / total, column_sum(m2 + count * deviation * deviation)


@triton.jit
def tile_statistics(z, row, end, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Mean and centred sum of squares of the rows of one tile that exist."""
    exists = tl.broadcast_to(row + tl.arange(0, ROWS)[:, None] < end, (ROWS, COLS))
    pooled = column_sum(z) / (end - row)
    deviation = tl.where(exists, z - pooled[None, :], 0.0)
    return pooled, column_sum(deviation * deviation)


@triton.jit
def stream_statistics(z_ptr, begin, end, N, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Mean, its rounding and centred sum of squares of rows [begin, end), by tiles; full ones without a row mask."""
    mean = tl.zeros((ROWS, COLS), tl.float32)
    m2 = tl.zeros((ROWS, COLS), tl.float32)
    seen = 0.0
    full = (end - begin) // ROWS
    for tile in range(full):
        z = load_tile(z_ptr, begin + tile * ROWS, end, N, col, False, ROWS, COLS)
        seen += 1.0
        delta = z - mean
        mean += delta * (1.0 / seen)
        m2 += delta * (z - mean)
    row = begin + full * ROWS
    exists = tl.broadcast_to(row + tl.arange(0, ROWS)[:, None] < end, (ROWS, COLS))
    z = load_tile(z_ptr, row, end, N, col, True, ROWS, COLS)
    delta = tl.where(exists, z - mean, 0.0)
    count = seen + exists.to(tl.float32)
    mean += delta / tl.where(exists, count, 1.0)
    m2 += delta * (z - mean)
    return combine(end - begin, count, mean, m2)


@triton.jit
def apply_tile(
    z, out_ptr, row, end, N, col, mean, scale, shift, act_a, act_b, key, threshold, keep_scale,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr, MASK_ROWS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out = dropout(activation(normalise(z))) for one tile."""
    if NORM:
        z = normalise(z, mean[None, :], scale[None, :], shift[None, :])
    value = ACTIVATION(z, act_a, act_b)
    if DROPOUT:
        value = value * dropout_multiplier(key, row, col, threshold, keep_scale, ROWS, COLS)
    first, offsets, mask = tile_offsets(row, end, N, col, MASK_ROWS, ROWS, COLS)
    tl.store(out_ptr + first + offsets, to_stored(value, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def apply_stream(
    z_ptr, out_ptr, begin, end, N, col, mean, scale, shift, act_a, act_b, key, threshold, keep_scale,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    full = (end - begin) // ROWS
    for tile in range(full):
        row = begin + tile * ROWS
        z = load_tile(z_ptr, row, end, N, col, False, ROWS, COLS)
        apply_tile(z, out_ptr, row, end, N, col, mean, scale, shift, act_a, act_b, key, threshold, keep_scale,
                   ACTIVATION, NORM, DROPOUT, False, ROWS, COLS)  # fmt: skip
    row = begin + full * ROWS
    if row < end:
        z = load_tile(z_ptr, row, end, N, col, True, ROWS, COLS)
        apply_tile(z, out_ptr, row, end, N, col, mean, scale, shift, act_a, act_b, key, threshold, keep_scale,
                   ACTIVATION, NORM, DROPOUT, True, ROWS, COLS)  # fmt: skip


@triton.jit
def save_statistics(mean, rstd, stats_ptr, cols, N):
    """For the backward; only one program per column calls it."""
    tl.store(stats_ptr + cols, mean, mask=cols < N)
    tl.store(stats_ptr + N + cols, rstd, mask=cols < N)


@triton.jit
def move_running_statistics(
    mean, m2, running_mean_ptr, running_var_ptr, batches_ptr, cols, M, N, momentum, CUMULATIVE: tl.constexpr
):
    """Only one program per column calls it."""
    exists = cols < N
    if running_mean_ptr is not None:
        factor = momentum
        if CUMULATIVE:
            factor = 1.0 / tl.load(batches_ptr).to(tl.float32)
        old_mean = load_columns(running_mean_ptr, cols, N, 0.0)
        old_var = load_columns(running_var_ptr, cols, N, 0.0)
        new_mean = (1.0 - factor) * old_mean + factor * mean
        new_var = (1.0 - factor) * old_var + factor * (m2 / (M - 1))
        tl.store(running_mean_ptr + cols, to_stored(new_mean, running_mean_ptr.dtype.element_ty), mask=exists)
        tl.store(running_var_ptr + cols, to_stored(new_var, running_var_ptr.dtype.element_ty), mask=exists)


@triton.jit
def count_batch(batches_ptr):
    if batches_ptr is not None:
        tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit
def count_batch_kernel(batches_ptr):  # () int64
    """num_batches_tracked += 1 in a launch of its own, where the next launch reads it in every program."""
    count_batch(batches_ptr)


@triton.jit
def keep_statistics(
    mean, m2, gamma_ptr, beta_ptr, stats_ptr, running_mean_ptr, running_var_ptr, batches_ptr, cols, M, N, momentum, eps,
    CUMULATIVE: tl.constexpr,
):  # fmt: skip
    """Stores what the statistics of whole columns change, and counts the batch; returns z's scale and shift."""
    rstd = reciprocal_sqrt(m2 / M + eps)
    save_statistics(mean, rstd, stats_ptr, cols, N)
    move_running_statistics(mean, m2, running_mean_ptr, running_var_ptr, batches_ptr, cols, M, N, momentum, CUMULATIVE)
    if not CUMULATIVE:
        if tl.program_id(0) == 0:
            count_batch(batches_ptr)
    return rstd * load_columns(gamma_ptr, cols, N, 1.0), load_columns(beta_ptr, cols, N, 0.0)


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def columns_forward_kernel(
    z_ptr,  # (M, N)
    out_ptr,  # (M, N)
    gamma_ptr, beta_ptr,  # (N,) or None
    stats_ptr,  # (2, N) fp32: mean, rstd
    running_mean_ptr, running_var_ptr,  # (N,) or None
    batches_ptr,  # () int64 or None
    seed_ptr,  # () int64 or None
    seed: tl.uint64, M, N, momentum, eps, act_a, act_b, threshold, keep_scale,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, CUMULATIVE: tl.constexpr,
    ONE_TILE: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One program, COLS whole columns: statistics, then apply, from registers if the column is one tile."""
    N = aligned(N, VEC)
    col = tl.program_id(0) * COLS
    cols = col + tl.arange(0, COLS)
    if ONE_TILE:
        z = load_tile(z_ptr, 0, M, N, col, True, ROWS, COLS)
        mean, m2 = tile_statistics(z, 0, M, ROWS, COLS)
    else:
        mean, _, m2 = stream_statistics(z_ptr, 0, M, N, col, ROWS, COLS)
    scale, shift = keep_statistics(mean, m2, gamma_ptr, beta_ptr, stats_ptr, running_mean_ptr, running_var_ptr,
                                   batches_ptr, cols, M, N, momentum, eps, CUMULATIVE)  # fmt: skip
    key = load_key(seed_ptr, seed)
    if ONE_TILE:
        apply_tile(z, out_ptr, 0, M, N, col, mean, scale, shift, act_a, act_b, key, threshold, keep_scale,
                   ACTIVATION, NORM_BATCH, DROPOUT, True, ROWS, COLS)  # fmt: skip
    else:
        apply_stream(z_ptr, out_ptr, 0, M, N, col, mean, scale, shift, act_a, act_b, key, threshold, keep_scale,
                     ACTIVATION, NORM_BATCH, DROPOUT, ROWS, COLS)  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def split_statistics_kernel(
    z_ptr,  # (M, N)
    partials_ptr,  # (chunks, 3, N) fp32: mean, what it lost by rounding, centred sum of squares
    batches_ptr,  # () int64 or None
    M, N, rows_per_chunk, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Statistics of one chunk of rows; counts the batch, which the apply launch may then read."""
    N = aligned(N, VEC)
    col, chunk = tl.program_id(0) * COLS, tl.program_id(1)
    cols = col + tl.arange(0, COLS)
    begin = chunk * rows_per_chunk
    mean, rest, m2 = stream_statistics(z_ptr, begin, tl.minimum(begin + rows_per_chunk, M), N, col, ROWS, COLS)
    store_statistics(partials_ptr, chunk, mean, rest, m2, cols, N)
    if (tl.program_id(0) == 0) & (chunk == 0):
        count_batch(batches_ptr)


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def apply_kernel(
    z_ptr,  # (M, N)
    out_ptr,  # (M, N)
    gamma_ptr, beta_ptr,  # (N,) or None
    stats_ptr,  # (2, N) fp32: mean, rstd; None without BatchNorm
    partials_ptr,  # (chunks, 3, N) fp32; None but for NORM_BATCH
    running_mean_ptr, running_var_ptr,  # (N,) or None
    batches_ptr,  # () int64 or None
    seed_ptr,  # () int64 or None
    seed: tl.uint64, M, N, chunks, rows_per_chunk, momentum, eps, act_a, act_b, threshold, keep_scale,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr, CUMULATIVE: tl.constexpr,
    CHUNKS: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Normalise by the combined partials, by the running statistics or not at all; activation; dropout."""
    N = aligned(N, VEC)
    col, chunk = tl.program_id(0) * COLS, tl.program_id(1)
    cols = col + tl.arange(0, COLS)
    begin = chunk * rows_per_chunk
    mean = load_columns(None, cols, N, 0.0)
    rstd = load_columns(None, cols, N, 1.0)
    if NORM == NORM_BATCH:
        mean, _, m2 = load_statistics(partials_ptr, M, N, chunks, rows_per_chunk, cols, False, CHUNKS, COLS)
        rstd = reciprocal_sqrt(m2 / M + eps)
        if chunk == 0:
            move_running_statistics(mean, m2, running_mean_ptr, running_var_ptr, batches_ptr, cols, M, N, momentum,
                                    CUMULATIVE)  # fmt: skip
    elif NORM == NORM_RUNNING:
        mean = load_columns(running_mean_ptr, cols, N, 0.0)
        rstd = reciprocal_sqrt(load_columns(running_var_ptr, cols, N, 1.0) + eps)
    if NORM != NORM_NONE:
        if chunk == 0:
            save_statistics(mean, rstd, stats_ptr, cols, N)
    scale = rstd * load_columns(gamma_ptr, cols, N, 1.0)
    shift = load_columns(beta_ptr, cols, N, 0.0)
    key = load_key(seed_ptr, seed)
    apply_stream(z_ptr, out_ptr, begin, tl.minimum(begin + rows_per_chunk, M), N, col, mean, scale, shift,
                 act_a, act_b, key, threshold, keep_scale, ACTIVATION, NORM, DROPOUT, ROWS, COLS)  # fmt: skip
