"""What one launch leaves to the next of an (M, N) activation's columns: partial statistics of chunks of rows."""

import triton
import triton.language as tl

from .casts import column_sum


@triton.jit
def store_statistics(partials_ptr, chunk, mean, rest, m2, cols, N):
    """Of a chunk of rows, into a (chunks, 3, N) table."""
    at = partials_ptr + 3 * chunk * N + cols
    tl.store(at, mean, mask=cols < N)
    tl.store(at + N, rest, mask=cols < N)
    tl.store(at + 2 * N, m2, mask=cols < N)


@triton.jit
def load_partials(partials_ptr, part, parts: tl.constexpr, chunks, N, cols, CHUNKS: tl.constexpr):
    """One part, (CHUNKS, COLS), of a (chunks, parts, N) table."""
    chunk = tl.arange(0, CHUNKS)[:, None]
    mask = (chunk < chunks) & (cols < N)[None, :]
    return tl.load(partials_ptr + (parts * chunk + part) * N + cols[None, :], mask=mask, other=0.0)


@triton.jit
def load_counts(
    partials_ptr, M, chunks, N, rows_per_chunk, first, cols, JOINED: tl.constexpr, CHUNKS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Rows of CHUNKS chunks from `first` on, 0 of those that there are not."""
    if JOINED:
        counts = load_partials(partials_ptr + 4 * first * N, 3, 4, chunks - first, N, cols, CHUNKS)
    else:
        counts = tl.minimum(M - (first + tl.arange(0, CHUNKS)) * rows_per_chunk, rows_per_chunk)
        counts = tl.broadcast_to(tl.maximum(counts, 0)[:, None], (CHUNKS, COLS)).to(tl.float32)
    return counts


@triton.jit
def load_statistics(
    partials_ptr, M, N, chunks, rows_per_chunk, cols, JOINED: tl.constexpr, CHUNKS: tl.constexpr, COLS: tl.constexpr
):
    """Mean, what it lost by rounding, and centred sum of squares of all rows; CHUNKS partials at a time, as 128 at once
    take 144 registers. JOINED: they are processes, (chunks, 4, N), each with its number of rows."""
    PARTS: tl.constexpr = 4 if JOINED else 3
    mean, rest, m2 = tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
    for first in range(0, chunks, CHUNKS):
        at = partials_ptr + PARTS * first * N
        counts = load_counts(partials_ptr, M, chunks, N, rows_per_chunk, first, cols, JOINED, CHUNKS, COLS)
        mean += column_sum(counts * load_partials(at, 0, PARTS, chunks - first, N, cols, CHUNKS)) / M
    for first in range(0, chunks, CHUNKS):
        at = partials_ptr + PARTS * first * N
        counts = load_counts(partials_ptr, M, chunks, N, rows_per_chunk, first, cols, JOINED, CHUNKS, COLS)
        deviation = load_partials(at, 0, PARTS, chunks - first, N, cols, CHUNKS) - mean[None, :]
        deviation += load_partials(at, 1, PARTS, chunks - first, N, cols, CHUNKS)
        rest += column_sum(counts * deviation) / M
        m2 += column_sum(load_partials(at, 2, PARTS, chunks - first, N, cols, CHUNKS) + counts * deviation * deviation)
    return mean, rest, m2
