"""The norm of all gradients at once, and their clipping by it: torch.nn.utils.clip_grad_norm_ in two launches.

Each program of the first launch leaves one partial sum. Each program that needs the norm adds all partials up again,
at most 4 KiB out of L2: no program waits for another, and the order of summation is always the same.
"""

import torch
import triton
import triton.language as tl

from .casts import to_stored
from .tables import BLOCK, TRITON_DTYPES, WARPS, Tables, chunk_of, load, pointer, unscaled
from .tiles import LAUNCH_OPTIONS

MAX_PARTIALS = 1024
PARTIALS = tl.constexpr(MAX_PARTIALS)
MAXIMUM = tl.constexpr(0)  # as an order: that of the infinity norm; the others are 1 and 2


@triton.jit
def larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def total_of(x, ORDER: tl.constexpr):
    return tl.reduce(x, 0, larger) if ORDER == MAXIMUM else tl.sum(x, 0)


@triton.jit
def norm_and_coefficient(partials_ptr, partials, max_norm, ORDER: tl.constexpr):
    """(norm, min(max_norm / (norm + 1e-6), 1)); NaN stays NaN, as in torch."""
    parts = tl.zeros((PARTIALS,), tl.float32)
    for start in range(0, partials, PARTIALS):
        i = start + tl.arange(0, PARTIALS)
        part = tl.load(partials_ptr + i, mask=i < partials, other=0.0)
        parts = larger(parts, part) if ORDER == MAXIMUM else parts + part
    norm = total_of(parts, ORDER)
    norm = tl.sqrt(norm) if ORDER == 2 else norm
    return norm, tl.minimum(max_norm / (norm + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["grad_scale_ptr", "tensors", "blocks", "chunks", "programs"])
def norm_kernel(
    table_ptr, chunks_ptr, partials_ptr, grad_scale_ptr, tensors, blocks, chunks, programs,
    ORDER: tl.constexpr, GRAD_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partials (programs,): sums of absolute values, or of their squares, or the largest."""
    parts = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(tl.program_id(0), chunks, programs):
        _, size, addresses, bounds = chunk_of(table_ptr, chunks_ptr, tensors, blocks, chunk, 0, BLOCK)
        for part in tl.static_range(2):
            for block in range(bounds[part], bounds[part + 1]):
                offsets = block * BLOCK + tl.arange(0, BLOCK)
                mask = None if part == 0 else offsets < size
                ptr = pointer(addresses[1], offsets, GRAD_DTYPE, part == 0)
                g = tl.abs(unscaled(load(ptr, mask), grad_scale_ptr))
                if part == 1:
                    g = tl.where(offsets < size, g, 0.0)
                if ORDER == MAXIMUM:
                    parts = larger(parts, g)
                else:
                    parts += g * g if ORDER == 2 else g
    tl.store(partials_ptr + tl.program_id(0), total_of(parts, ORDER))


@triton.jit(do_not_specialize=["tensors", "blocks", "partials", "max_norm"])
def clip_kernel(
    table_ptr, chunks_ptr, partials_ptr, norm_ptr, tensors, blocks, partials, max_norm,
    ORDER: tl.constexpr, GRAD_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scales the gradients in place by the clipping coefficient, and stores the norm."""
    norm, coefficient = norm_and_coefficient(partials_ptr, partials, max_norm, ORDER)
    if tl.program_id(0) == 0:
        tl.store(norm_ptr, to_stored(norm, norm_ptr.dtype.element_ty))
    _, size, addresses, bounds = chunk_of(table_ptr, chunks_ptr, tensors, blocks, tl.program_id(0), 0, BLOCK)
    for part in tl.static_range(2):
        for block in range(bounds[part], bounds[part + 1]):
            offsets = block * BLOCK + tl.arange(0, BLOCK)
            mask = None if part == 0 else offsets < size
            ptr = pointer(addresses[1], offsets, GRAD_DTYPE, part == 0)
            tl.store(ptr, to_stored(load(ptr, mask) * coefficient, GRAD_DTYPE), mask=mask)


def partials_of(tables: Tables) -> int:
    return min(tables.programs, MAX_PARTIALS)


def add_up(
    tables: Tables, dtype: torch.dtype, partials: torch.Tensor, order: int = 2, grad_scale: torch.Tensor | None = None
) -> None:
    """Writes the partials_of(tables) partials (fp32) of the gradients' norm; order 0 stands for infinity."""
    programs = partials_of(tables)
    norm_kernel[(programs,)](
        tables.table, tables.chunks, partials, grad_scale, tables.tensors, tables.blocks, tables.programs, programs,
        ORDER=order, GRAD_DTYPE=TRITON_DTYPES[dtype], BLOCK=BLOCK, num_warps=WARPS, **LAUNCH_OPTIONS,
    )  # fmt: skip


def clip(
    tables: Tables, dtype: torch.dtype, partials: torch.Tensor, norm: torch.Tensor, max_norm: float, order: int = 2
) -> None:
    """Clips the gradients by the norm that all partials make, and writes it to norm (), of any float dtype."""
    clip_kernel[(tables.programs,)](
        tables.table, tables.chunks, partials, norm, tables.tensors, tables.blocks, partials.numel(), max_norm,
        ORDER=order, GRAD_DTYPE=TRITON_DTYPES[dtype], BLOCK=BLOCK, num_warps=WARPS, **LAUNCH_OPTIONS,
    )  # fmt: skip
