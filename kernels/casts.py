"""Rounding, dot operands and column sums: where the interpreter must be led to compute as a GPU does."""

import triton
import triton.language as tl

# Fixed when the kernels are imported, as Triton itself decides then whether to compile or to interpret them.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def to_stored(x, dtype: tl.constexpr):
    """x (fp32) as dtype, rounded to nearest even on every backend.

    The interpreter's own cast to bf16 truncates, which doubles the error, and garbles denormals; a GPU rounds.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest_even = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x == x, nearest_even, 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def stochastically_rounded(x, draws):
    """x (fp32) as bf16, up with the probability of what truncation would lose; draws are 16 random bits per element.

    On average the result is x, so that updates smaller than half a unit in the last place are not lost.
    """
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    bits = tl.where(finite, bits + draws.to(tl.uint32), tl.where(x == x, bits, 0x7FC00000))
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x (fp32) with the values dtype has, as fp32."""
    return to_stored(x, dtype).to(tl.float32)


@triton.jit
def dot_operand(x, dtype: tl.constexpr):
    """x, rounded to dtype where it is of another, as tl.dot takes it: a cast by autocast without a launch.

    The interpreter's dot reads bf16 operands as garbage, so there they go as fp32.
    """
    if x.dtype != dtype:
        x = to_stored(x.to(tl.float32), dtype)
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x


@triton.jit
def column_sum(x):
    """Sum over axis 0 of a (rows, cols) tile, rows a power of two.

    A GPU adds in a tree: a few rows within a thread, then across threads. The interpreter adds row by row, whose
    error grows with the row count (4.9e-7 against 1.5e-7 at 512 rows), so there the tree is spelled out.
    """
    if INTERPRETED:
        while x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1])), 1)
        return tl.reshape(x, (x.shape[1],))
    return tl.sum(x, 0)
