"""The dropout mask: a pure function of (key, row, column), recomputed wherever it is needed and never stored.

    draw(key, row, column) = 16 bits of Philox4x32-7(key, counter = (column // 8, row, 0, 0))
    dropped               <=> draw < threshold,   threshold = round(p · 2^16)
    kept values scaled by  2^16 / (2^16 - threshold)

Philox is the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011);
its 7-round form is the shortest that passes BigCrush there. One call gives four 32-bit words, eight draws: one
draw for each of eight neighbouring columns, so a call costs its ~80 instructions once for eight elements. The
scale uses the rate that is drawn, threshold / 2^16, so that the expectation is exact.
"""

import triton
import triton.language as tl

DRAW_VALUES = 1 << 16
DRAWS_PER_CALL = tl.constexpr(8)
ROUNDS = tl.constexpr(7)


def threshold_and_scale(p: float) -> tuple[int, float]:
    """The draws below which an element is dropped, and the scale of the kept ones; p in [0, 1]."""
    if p == 1:
        return DRAW_VALUES, 0.0
    threshold = min(round(p * DRAW_VALUES), DRAW_VALUES - 1)
    return threshold, DRAW_VALUES / (DRAW_VALUES - threshold)


@triton.jit
def load_key(seed_ptr, seed):
    """The key from device memory where it was drawn there (graph capture, tracing), else from the argument."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    return seed


@triton.jit
def draws_of_16_bits(key, c0, c1, c2, c3):
    """Eight draws for each counter, in neighbouring columns: (ROWS, CALLS) uint32 counters, (ROWS, 8 · CALLS) int32.

    The four words of a call are permuted so that joining them gives column order:
    column 8c + 4i + 2k + h takes half h (low, high) of word 2k + i.
    """
    w0, w1, w2, w3 = tl.philox(key, c0, c1, c2, c3, ROUNDS)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    draws = tl.join(words & 0xFFFF, words >> 16).to(tl.int32)
    return tl.reshape(draws, (c0.shape[0], c0.shape[1] * DRAWS_PER_CALL))


@triton.jit
def dropout_multiplier(key, row, col, threshold, keep_scale, ROWS: tl.constexpr, COLS: tl.constexpr):
    """keep_scale where kept, 0 where dropped, (ROWS, COLS) fp32, for the tile at (row, col); 8 divides col."""
    calls = col // DRAWS_PER_CALL + tl.arange(0, COLS // DRAWS_PER_CALL)[None, :]
    rows = row + tl.arange(0, ROWS)[:, None]
    shape: tl.constexpr = (ROWS, COLS // DRAWS_PER_CALL)
    c0 = tl.broadcast_to(calls, shape).to(tl.uint32)
    c1 = tl.broadcast_to(rows, shape).to(tl.uint32)
    zero = tl.zeros(shape, tl.uint32)
    draws = draws_of_16_bits(key, c0, c1, zero, zero)
    return tl.where(draws < threshold, 0.0, keep_scale)
