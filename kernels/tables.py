"""Tables of tensors to walk in one launch, and how a kernel walks them.

    table   (ROWS, tensors) int64: addresses of parameter, gradient and states, of the step count and of NAdam's
            product, then the size and the group of each tensor. A gradient at address 0 is missing: its tensor is
            left alone and its step not counted.
    chunks  (chunks, 2) int32: the tensor, and the chunk within it, that a program works on.
    groups  (2, groups, COLUMNS) int64: a row of hyperparameters per group, first as the bits of fp64 numbers, then as
            addresses of fp32 tensors, 0 where the number counts.

A tensor is walked in memory order, so that any dense strides will do. A chunk is a number of blocks; whole blocks are
read and written 16 bytes at a time where all of a tensor's addresses allow it, others element by element.
"""

import struct
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl

BLOCK = 1024  # elements: 8 per thread, 16 bytes of bf16
WARPS = 4
LARGEST_CHUNK = 64  # blocks, beyond which the look-ups in the tables no longer count
PROGRAMS_PER_MULTIPROCESSOR = 4

PARAM, GRAD, STATES, STEP, PRODUCT, SIZE, GROUP = (tl.constexpr(row) for row in (0, 1, 2, 5, 6, 7, 8))
ROWS = 9
_set_aside: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}  # pinned, for a capture that may come
MOST_SET_ASIDE = 16  # of a shape: uploads alike that one captured step makes, of clipping and step, groups and dtypes
TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def blocks_per_chunk(sizes: Sequence[int], multiprocessors: int) -> int:
    """As many as still leave every multiprocessor a few programs: 1 for a million elements."""
    programs = multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
    return max(1, min(LARGEST_CHUNK, sum(sizes) // (BLOCK * programs)))


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def copies_from_pinned(device: torch.device) -> bool:
    return device.type == "cuda"


def pinned_like(values: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(values, pin_memory=True)


class Tables:
    """The tables of non-empty tensors of one device; every upload is one asynchronous copy.

    addresses: by row (PARAM, GRAD, ...), one per tensor; absent rows are 0. sizes in elements; group_of each tensor.
    What the addresses point to must live as long as the tables are used.
    """

    def __init__(
        self,
        addresses: Mapping[int, Sequence[int]],
        sizes: Sequence[int],
        group_of: Sequence[int],
        device: torch.device,
        multiprocessors: int,
    ) -> None:
        self.device, self.tensors = device, len(sizes)
        self.blocks = blocks_per_chunk(sizes, multiprocessors)
        chunks = [(i, n) for i, size in enumerate(sizes) for n in range(triton.cdiv(size, self.blocks * BLOCK))]
        self.programs = len(chunks)
        rows = {**addresses, SIZE.value: sizes, GROUP.value: group_of}
        self._captured = is_capturing(device)
        # A captured copy reads its host memory again at each replay, so the last of each kind is kept.
        self._staged: dict[str, torch.Tensor] = {}
        every_row = [rows.get(row, [0] * self.tensors) for row in range(ROWS)]
        self.table = self._stage("table", every_row).to(device, non_blocking=True)
        self.chunks = self._stage("chunks", chunks, torch.int32).to(device, non_blocking=True)
        self.gradients = self.table[GRAD.value]
        self.groups: torch.Tensor | None = None

    def _stage(self, name: str, values: Sequence, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        staged = torch.tensor(values, dtype=dtype, device="cpu")
        if copies_from_pinned(self.device):
            staged = self._pinned(staged, first=name not in self._staged)
        self._staged[name] = staged
        return staged

    def _pinned(self, values: torch.Tensor, first: bool) -> torch.Tensor:
        """In pinned memory. A capture may not ask the driver for any, nor copy from other memory since torch 2.11: it
        takes what a step before it, the usual warm-up, has set aside, as much as that took itself."""
        aside = _set_aside.setdefault((values.shape, values.dtype), [])
        if self._captured:
            return aside.pop().copy_(values) if aside else values
        if first and len(aside) < MOST_SET_ASIDE:
            aside.append(pinned_like(values))
        return pinned_like(values).copy_(values)

    def set_gradients(self, addresses: Sequence[int]) -> None:
        """New addresses of the gradients; 0 where there is none."""
        self.gradients.copy_(self._stage("gradients", addresses), non_blocking=True)

    def set_groups(self, numbers: Sequence[float], addresses: Sequence[int]) -> None:
        """New hyperparameters: COLUMNS numbers, and COLUMNS addresses of tensors or 0, for each group."""
        values = [*struct.unpack(f"{len(numbers)}q", struct.pack(f"{len(numbers)}d", *numbers)), *addresses]
        staged = self._stage("groups", values)
        if self.groups is None:
            self.groups = torch.empty_like(staged, device=self.device)
        self.groups.copy_(staged, non_blocking=True)


@triton.jit
def entry(table_ptr, row, tensors, tensor):
    return tl.load(table_ptr + row * tensors + tensor)


@triton.jit
def chunk_of(table_ptr, chunks_ptr, tensors, blocks, chunk, PRESENT: tl.constexpr, BLOCK: tl.constexpr):
    """(tensor, its size, addresses of parameter, gradient and three states, bounds) of a chunk.

    bounds: its first block, the end of its whole and aligned blocks, the end of all blocks. Bit i of PRESENT: whether
    there is an i-th state.
    """
    tensor = tl.load(chunks_ptr + 2 * chunk)
    size = entry(table_ptr, SIZE, tensors, tensor)
    first = tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * blocks
    last = tl.minimum(first + blocks, (size + BLOCK - 1) // BLOCK)
    param, grad = entry(table_ptr, PARAM, tensors, tensor), entry(table_ptr, GRAD, tensors, tensor)
    s0, s1, s2 = grad, grad, grad
    if PRESENT & 1:
        s0 = entry(table_ptr, STATES, tensors, tensor)
    if PRESENT & 2:
        s1 = entry(table_ptr, STATES + 1, tensors, tensor)
    if PRESENT & 4:
        s2 = entry(table_ptr, STATES + 2, tensors, tensor)
    last = tl.where(grad == 0, first, last)
    aligned = (param | grad | s0 | s1 | s2) % 16 == 0
    whole = tl.where(aligned, tl.minimum(last, size // BLOCK), first)
    return tensor, size, (param, grad, s0, s1, s2), (first, whole, last)


@triton.jit
def pointer(address, offsets, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    ptr = address.to(tl.pointer_type(DTYPE))
    if WHOLE:
        ptr = tl.multiple_of(ptr, 16)  # bytes; without it every access is an element's
    return ptr + offsets


@triton.jit
def load(ptr, mask):
    return tl.load(ptr, mask=mask).to(tl.float32)


@triton.jit
def unscaled(g, grad_scale_ptr):
    """The gradient without GradScaler's factor, by its reciprocal, as torch's unscale_ does."""
    if grad_scale_ptr is not None:
        g = g * (1.0 / tl.load(grad_scale_ptr).to(tl.float32))
    return g
