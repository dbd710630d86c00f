"""BatchNorm over the joined batch of several processes: what stands between the kernels of each and the collectives.

    forward    split_statistics | pack: (4, N) of one process | all-gather | join | apply, as by running statistics
    backward   split_sums | add up: (2, N) of one process | all-reduce | split_dz, by the number of all rows

Batches may be of different sizes: a process sends its rows with its mean, what that lost by rounding, and its centred
sum of squares, which are combined as those of chunks are (partials.py). The gradients by gamma and beta
are of the process's own rows, as torch's SyncBatchNorm leaves them to whoever averages gradients.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .batch_norm import NORM_RUNNING, RUNTIME_ARGUMENTS, count_batch, move_running_statistics
from .batch_norm_backward import split_dz_kernel, store_column
from .casts import column_sum
from .launch import (
    BACKWARD,
    Launch,
    backward_split,
    count_before,
    forward_apply,
    forward_split,
    grid_of,
    tile_values,
)
from .partials import load_partials, load_statistics, store_statistics
from .tiles import Tiles, power_of_two_at_least

PACK = "partials", "row", "seed"
JOIN = "rows", "joined", "running_mean", "running_var", "batches", "seed"
ADD_UP = "partials", "sums", "dgamma", "dbeta", "seed"
DZ = (*BACKWARD[:-1], "total", "seed")


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def pack_statistics_kernel(
    partials_ptr,  # (chunks, 3, N) fp32: mean, what it lost by rounding, centred sum of squares
    row_ptr,  # (4, N) fp32: the same of all chunks, and the number of rows
    M, N, chunks, rows_per_chunk, CHUNKS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    mean, rest, m2 = load_statistics(partials_ptr, M, N, chunks, rows_per_chunk, cols, False, CHUNKS, COLS)
    store_statistics(row_ptr, 0, mean, rest, m2, cols, N)
    tl.store(row_ptr + 3 * N + cols, tl.full((COLS,), 0.0, tl.float32) + M, mask=cols < N)


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def join_statistics_kernel(
    rows_ptr,  # (processes, 4, N) fp32, of pack_statistics_kernel; zeros of one without rows
    joined_ptr,  # (3, N) fp32: mean, variance and number of rows of all
    running_mean_ptr, running_var_ptr,  # (N,) or None
    batches_ptr,  # () int64 or None
    N, chunks, momentum, CUMULATIVE: tl.constexpr, CHUNKS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Every process computes the same from the same rows, in their order; `chunks` are processes."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    M = tl.zeros((COLS,), tl.float32)
    for first in range(0, chunks, CHUNKS):
        M += column_sum(load_partials(rows_ptr + 4 * first * N, 3, 4, chunks - first, N, cols, CHUNKS))
    M = tl.maximum(M, 1.0)  # columns past the end
    mean, _, m2 = load_statistics(rows_ptr, M, N, chunks, 0, cols, True, CHUNKS, COLS)
    move_running_statistics(mean, m2, running_mean_ptr, running_var_ptr, batches_ptr, cols, M, N, momentum, CUMULATIVE)
    store_statistics(joined_ptr, 0, mean, m2 / M, M, cols, N)
    if not CUMULATIVE:
        if tl.program_id(0) == 0:
            count_batch(batches_ptr)


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def add_up_sums_kernel(
    partials_ptr,  # (chunks, 2, N) fp32: Σ dy, Σ dy · xhat
    sums_ptr,  # (2, N) fp32
    dgamma_ptr, dbeta_ptr,  # (N,) or None
    N, chunks, CHUNKS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    sum_dy = column_sum(load_partials(partials_ptr, 0, 2, chunks, N, cols, CHUNKS))
    sum_dy_xhat = column_sum(load_partials(partials_ptr, 1, 2, chunks, N, cols, CHUNKS))
    store_column(sums_ptr, sum_dy, cols, N)
    store_column(sums_ptr + N, sum_dy_xhat, cols, N)
    store_column(dbeta_ptr, sum_dy, cols, N)
    store_column(dgamma_ptr, sum_dy_xhat, cols, N)


class Launches(NamedTuple):
    """In their order, each with the names of its tensors; a collective follows pack, and another add_up."""

    statistics: Launch  # launch.FORWARD
    pack: Launch  # PACK
    join: list[Launch]  # JOIN
    apply: Launch  # launch.FORWARD, with the joint mean and variance as the running ones
    sums: Launch  # launch.BACKWARD
    add_up: Launch  # ADD_UP
    dz: Launch  # DZ


def launches(values: dict[str, Any], tiles: Tiles, processes: int) -> Launches:
    """tiles: of the split plan, for the rows of this process."""
    # One shape for all processes, whose statistics then have the same bits.
    cols = min(128, power_of_two_at_least(values["N"]))
    grid, own = (triton.cdiv(values["N"], cols),), values | tile_values(tiles) | {"COLS": cols, "num_warps": 4}
    chunks, some = power_of_two_at_least(tiles.chunks), 32
    of_processes = own | {"chunks": processes, "CHUNKS": min(some, power_of_two_at_least(processes))}
    dz = values | tile_values(tiles) | {"chunks": 1, "CHUNKS": 1}
    return Launches(
        forward_split(values, tiles)[0],
        Launch(pack_statistics_kernel, grid, PACK, own | {"CHUNKS": min(some, chunks)}),
        [*count_before(values, JOIN), Launch(join_statistics_kernel, grid, JOIN, of_processes)],
        forward_apply(values | {"NORM": NORM_RUNNING}, tiles)[0],
        backward_split(values, tiles)[0],
        Launch(add_up_sums_kernel, grid, ADD_UP, own | {"CHUNKS": chunks}),
        Launch(split_dz_kernel, grid_of(values, tiles), DZ, dz),
    )
