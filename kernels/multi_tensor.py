"""The step of an optimizer over many tensors in one launch: 28 bytes per fp32 parameter for Adam, each value once.

A program reads a chunk's parameter, gradient and states, applies a rule of update_rules.py in fp32, and writes
parameter and states back. The programs of a launch all read the step counts of their tensors; the one that arrives
last counts them on, when no other is left to read.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import update_rules
from .casts import INTERPRETED, stochastically_rounded, to_stored
from .dropout import draws_of_16_bits
from .gradient_norm import norm_and_coefficient
from .tables import (
    BLOCK,
    GRAD,
    GROUP,
    PRODUCT,
    STEP,
    TRITON_DTYPES,
    WARPS,
    Tables,
    chunk_of,
    entry,
    load,
    pointer,
    unscaled,
)
from .update_rules import COLUMNS, DECOUPLED, L1, LR, SIGN, WEIGHT_DECAY, hyperparameter

OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
REGISTERS, REGISTERS_FOR_THREE_STATES = 128, 192  # 16 and 8 warps to a multiprocessor; with less, ptxas spills
ACROSS = tl.constexpr(256)  # tensors whose steps are counted at a time


@triton.jit
def update_block(
    addresses, grad_scale_ptr, tensor, block, size, step, seed, common, coefficients,
    RULE: tl.constexpr, PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr,
    PRESENT: tl.constexpr, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sign, weight_decay, l1, shrink, clip = common
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = None if WHOLE else offsets < size
    p_ptr = pointer(addresses[0], offsets, PARAM_DTYPE, WHOLE)
    g_ptr = pointer(addresses[1], offsets, GRAD_DTYPE, WHOLE)
    p, g = load(p_ptr, mask), unscaled(load(g_ptr, mask), grad_scale_ptr)
    if grad_scale_ptr is not None:
        tl.store(g_ptr, to_stored(g, GRAD_DTYPE), mask=mask)  # where torch's fused steps and unscale_ leave it, too
    # Selected, not multiplied by zero, nor subtracted from itself: a parameter may be infinite.
    g = sign * clip * g
    g = tl.where(weight_decay != 0, g + weight_decay * p, g)
    g = g + tl.where(p > 0, l1, tl.where(p < 0, -l1, 0.0))
    p = tl.where(shrink == 0, p, tl.where(p - p == 0, p - shrink * p, p))

    s0, s1, s2 = p, p, p
    s0_ptr, s1_ptr, s2_ptr = p_ptr, p_ptr, p_ptr
    if PRESENT & 1:
        s0_ptr = pointer(addresses[2], offsets, STATE_DTYPE, WHOLE)
        s0 = load(s0_ptr, mask)
    if PRESENT & 2:
        s1_ptr = pointer(addresses[3], offsets, STATE_DTYPE, WHOLE)
        s1 = load(s1_ptr, mask)
    if PRESENT & 4:
        s2_ptr = pointer(addresses[4], offsets, STATE_DTYPE, WHOLE)
        s2 = load(s2_ptr, mask)
    p, states = RULE(p, g, (s0, s1, s2), coefficients, PRESENT)
    if STOCHASTIC:
        stored = stochastically_rounded(p, draws_of_block(seed, block, tensor, step, BLOCK))
    else:
        stored = to_stored(p, PARAM_DTYPE)
    tl.store(p_ptr, stored, mask=mask)
    if PRESENT & 1:
        tl.store(s0_ptr, to_stored(states[0], STATE_DTYPE), mask=mask)
    if PRESENT & 2:
        tl.store(s1_ptr, to_stored(states[1], STATE_DTYPE), mask=mask)
    if PRESENT & 4:
        tl.store(s2_ptr, to_stored(states[2], STATE_DTYPE), mask=mask)


@triton.jit
def draws_of_block(seed, block, tensor, step, BLOCK: tl.constexpr):
    """16 random bits for each element: a pure function of (seed, element, tensor, step)."""
    call = (block * (BLOCK // 8) + tl.arange(0, BLOCK // 8))[None, :]
    c2, c3 = (call * 0 + tensor).to(tl.uint32), (call * 0 + step).to(tl.uint32)
    draws = draws_of_16_bits(seed, call.to(tl.uint32), (call >> 32).to(tl.uint32), c2, c3)
    return tl.reshape(draws, (BLOCK,))


@triton.jit
def group_row(groups_ptr, groups, group):
    row = groups_ptr + group * COLUMNS
    return row, row + groups * COLUMNS


@triton.jit
def entries(table_ptr, row, tensors, tensor, mask):
    return tl.load(table_ptr + row * tensors + tensor, mask=mask, other=0)


@triton.jit
def count_steps(table_ptr, groups_ptr, tensors, groups, MOMENTUM: tl.constexpr):
    """Counts the step of every tensor that has a gradient, and multiplies its momentum up where MOMENTUM gives one."""
    for start in range(0, tensors, ACROSS):
        tensor = start + tl.arange(0, ACROSS)
        inside = tensor < tensors
        moved = inside & (entries(table_ptr, GRAD, tensors, tensor, inside) != 0)
        step_ptr = entries(table_ptr, STEP, tensors, tensor, moved).to(tl.pointer_type(tl.float32))
        step = tl.load(step_ptr, mask=moved, other=0.0) + 1
        tl.store(step_ptr, step, mask=moved)
        if MOMENTUM is not None:
            row = group_row(groups_ptr, groups, entries(table_ptr, GROUP, tensors, tensor, moved))
            product_ptr = entries(table_ptr, PRODUCT, tensors, tensor, moved).to(tl.pointer_type(tl.float32))
            product = tl.load(product_ptr, mask=moved, other=1.0)
            tl.store(product_ptr, product * MOMENTUM(row, step), mask=moved)


@triton.jit
def common_terms(row, clip):
    """(sign, weight decay and l1 within the gradient, decoupled weight decay times lr, clipping) in fp32."""
    decay = hyperparameter(row, WEIGHT_DECAY)
    decoupled = hyperparameter(row, DECOUPLED) != 0
    within = tl.where(decoupled, 0.0, decay).to(tl.float32)
    shrink = tl.where(decoupled, decay * hyperparameter(row, LR), 0.0).to(tl.float32)
    sign, l1 = hyperparameter(row, SIGN).to(tl.float32), hyperparameter(row, L1).to(tl.float32)
    return sign, within, l1, shrink, clip


@triton.jit(
    do_not_specialize=[
        "grad_scale_ptr", "found_inf_ptr", "tensors", "groups", "blocks", "programs", "partials", "max_norm", "seed",
    ]
)  # fmt: skip
def step_kernel(
    table_ptr, chunks_ptr, groups_ptr, arrived_ptr, partials_ptr, norm_ptr, grad_scale_ptr, found_inf_ptr,
    tensors, groups, blocks, programs, partials, max_norm, seed: tl.uint64,
    RULE: tl.constexpr, COEFFICIENTS: tl.constexpr, MOMENTUM: tl.constexpr,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr,
    PRESENT: tl.constexpr, COUNTS: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor, size, addresses, bounds = chunk_of(table_ptr, chunks_ptr, tensors, blocks, program, PRESENT, BLOCK)
    overflow = False
    if found_inf_ptr is not None:
        overflow = tl.load(found_inf_ptr) > 0  # a sum over devices
        bounds = (bounds[0], tl.where(overflow, bounds[0], bounds[1]), tl.where(overflow, bounds[0], bounds[2]))
    clip = 1.0
    if partials_ptr is not None:
        norm, clip = norm_and_coefficient(partials_ptr, partials, max_norm, 2)
        if norm_ptr is not None:
            if program == 0:
                tl.store(norm_ptr, norm)
    step, product = 0.0, 1.0
    if COUNTS:
        step = tl.load(entry(table_ptr, STEP, tensors, tensor).to(tl.pointer_type(tl.float32))) + 1
    if MOMENTUM is not None:
        product = tl.load(entry(table_ptr, PRODUCT, tensors, tensor).to(tl.pointer_type(tl.float32)))
    row = group_row(groups_ptr, groups, entry(table_ptr, GROUP, tensors, tensor))
    common, coefficients = common_terms(row, clip), COEFFICIENTS(row, step, product)
    for part in tl.static_range(2):
        for block in range(bounds[part], bounds[part + 1]):
            update_block(
                addresses, grad_scale_ptr, tensor, block, size, step, seed, common, coefficients,
                RULE, PARAM_DTYPE, GRAD_DTYPE, STATE_DTYPE, PRESENT, STOCHASTIC, part == 0, BLOCK,
            )  # fmt: skip
    if COUNTS:
        tl.debug_barrier()  # all threads of this program have read the step
        if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == programs - 1:  # and so have all programs
            if not overflow:
                count_steps(table_ptr, groups_ptr, tensors, groups, MOMENTUM)
            tl.store(arrived_ptr, 0)


class Step(NamedTuple):
    """What one launch does to tensors of one set of dtypes.

    rule: a name in update_rules. present: which of its states exist. counts: whether step counts are kept.
    """

    rule: str
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    state_dtype: torch.dtype
    present: int
    counts: bool
    stochastic: bool

    def constants(self) -> tuple:
        return (
            getattr(update_rules, self.rule),
            getattr(update_rules, self.rule + "_coefficients"),
            getattr(update_rules, self.rule + "_momentum", None),
            *(TRITON_DTYPES[dtype] for dtype in (self.param_dtype, self.grad_dtype, self.state_dtype)),
            self.present, self.counts, self.stochastic, BLOCK,
        )  # fmt: skip


class Launcher:
    """Launches a step's kernel over tables, again and again.

    Compiled kernels are kept and called themselves, 2 µs instead of Triton's 9: none of the arguments that change is
    specialised on, and torch aligns the tables as Triton assumes of those they were compiled for.
    """

    def __init__(self, step: Step, tables: Tables, seed: int = 0) -> None:
        self.constants, self.tables, self.seed = step.constants(), tables, seed
        registers = REGISTERS if step.present.bit_count() < 3 else REGISTERS_FOR_THREE_STATES
        self.options = OPTIONS | {"maxnreg": registers}
        self.arrived = torch.zeros((), dtype=torch.int32, device=tables.device)
        self._kept: dict = {}

    def __call__(
        self,
        max_norm: float = 0.0,
        partials: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
        grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
    ) -> None:
        """partials (P,) fp32: gradients are clipped to max_norm by the norm they make, which norm () fp32 receives.

        grad_scale () is divided out of the gradients; nothing happens where found_inf () is positive.
        """
        tables = self.tables
        arguments = (
            tables.table, tables.chunks, tables.groups, self.arrived, partials, norm, grad_scale, found_inf,
            tables.tensors, tables.groups.shape[0] // (2 * COLUMNS.value), tables.blocks, tables.programs,
            0 if partials is None else partials.shape[0], max_norm, self.seed, *self.constants,
        )  # fmt: skip
        given = partials is None, norm is None, grad_scale is None, found_inf is None
        launch = self._kept.get(given)
        if launch is not None:
            launch(*arguments)
            return
        grid = tables.programs, 1, 1
        compiled = step_kernel[grid](*arguments, **self.options)
        if not INTERPRETED:
            self._kept[given] = compiled[grid]
