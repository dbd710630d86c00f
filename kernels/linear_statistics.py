"""Linear that leaves its output's column statistics, for BatchNorm by the statistics of the batch.

    z = x Wᵀ + bias        mean and centred sum of squares of every column of z, strip by strip of its rows

x (M, K), W (N, K), z (M, N). The statistics are of z as stored. Programs are persistent: one has a strip of rows and
every lanes-th column tile, sums over all of a strip, and so leaves one partial a column and strip, which
batch_norm.apply_kernel combines. Sums are of distances from the mean of the strip's first tile, and of their squares.
However far off that tile lies, it is a part of the strip: the variance loses at most an eps a tile of the strip, of
which 380 000 rows have 45.

The product is transposed, W xᵀ: tensor cores leave most of a row of it in each thread, so that a sum over a column of
z costs 4 shuffles a tile of 128 x 128 on sm_90, and down the columns of x Wᵀ 96.

Accesses of (M, N) in device memory: W z here, R z and W out in the apply launch.
"""

import triton
import triton.language as tl

from .batch_norm import count_batch
from .casts import to_stored
from .linear import product_tile
from .partials import store_statistics
from .tiles import aligned, load_columns


@triton.jit
def row_sums(z, centre, exists):
    """Sum and sum of squares of z - centre along axis 1, of what exists."""
    deviation = tl.where(exists[None, :], z - centre[:, None], 0.0)
    return tl.sum(deviation, 1), tl.sum(deviation * deviation, 1)


@triton.jit(do_not_specialize=["M", "N", "K", "lanes", "rows_per_strip"])
def linear_statistics_kernel(
    x,  # (M, K), an address or a descriptor
    weight,  # (N, K), the same
    bias_ptr,  # (N,) or None
    z_ptr,  # (M, N)
    partials_ptr,  # (strips, 3, N) fp32: mean, what it lost by rounding, centred sum of squares
    batches_ptr,  # () int64 or None
    M, N, K, lanes, rows_per_strip, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    VEC_M: tl.constexpr, VEC: tl.constexpr, VEC_K: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One strip of rows by every lanes-th column tile; counts the batch, which the apply launch may then read.

    VEC_M, where it is 16, tells that a thread's rows exist or not by the sixteen: 2 masks for it, not 32.
    """
    M, N, K, rows_per_strip = aligned(M, VEC_M), aligned(N, VEC), aligned(K, VEC_K), aligned(rows_per_strip, ROWS)
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    strip, lane = tl.program_id(0) // lanes, tl.program_id(0) % lanes
    begin = strip * rows_per_strip
    end = tl.minimum(begin + rows_per_strip, M)
    for col_tile in range(lane, tl.cdiv(N, COLS), lanes):
        col = col_tile * COLS
        cols = col + tl.arange(0, COLS)
        centre = tl.zeros((COLS,), tl.float32)
        total, squares = tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
        for row in range(begin, end, ROWS):
            z = product_tile(weight, x, col, row, N, M, K, dtype, PRECISION, DESCRIPTORS, COLS, ROWS, DEPTH)
            z = to_stored(z + load_columns(bias_ptr, cols, N, 0.0)[:, None], dtype)
            rows = row + tl.arange(0, ROWS)
            mask = (rows < end)[:, None] & (cols < N)[None, :]
            tl.store(z_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :], z.T, mask=mask)
            z, exists = z.to(tl.float32), rows < end
            if row == begin:
                mean = row_sums(z, centre, exists)[0] / tl.minimum(end - row, ROWS)
                centre = tl.where(tl.abs(mean) < float("inf"), mean, 0.0)  # no distance is a number from inf
            tile_sum, tile_squares = row_sums(z, centre, exists)
            total += tile_sum
            squares += tile_squares
        distance = total / (end - begin)
        mean = centre + distance
        surplus = total * distance
        m2 = tl.where(surplus < float("inf"), squares - surplus, squares)  # inf where both are
        store_statistics(partials_ptr, strip, mean, centre - mean + distance, m2, cols, N)
    if tl.program_id(0) == 0:
        count_batch(batches_ptr)
