"""Tile addressing shared by the kernels, and the tile shapes the launchers pick for a problem."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

ACCESS_BYTES = 16  # the widest global access of one thread
SECTOR_BYTES = 32  # what device memory delivers at least
LINE_BYTES = 128
REGISTER_TILE = 8192  # elements: 8 warps hold 32 a thread, and the backward's two tiles take 150 registers of 255
STREAM_TILE = 4096  # elements: 16 a thread of 8 warps; a streaming backward spills with 32, and with 16 warps
MAX_CHUNKS = 128  # row chunks of the split plan: each apply program rereads that many partials from L2
MAX_LANES = 16  # column tiles at work at once: with as many strips, the programs read the least of x and W
# fp contraction is stated because Triton's default changes with 3.10; tl.fma marks where results rely on it.
MAX_REGISTERS = 255  # of a thread, the machine's own limit; stated, as ptxas for sm_100 else stops at 128 and spills
LAUNCH_OPTIONS = {"enable_fp_fusion": True, "maxnreg": MAX_REGISTERS}


@dataclass(frozen=True)
class Tiles:
    """How one plan covers an (M, N) activation: tiles of rows x cols, in `chunks` groups of rows_per_chunk rows."""

    rows: int
    cols: int
    chunks: int
    rows_per_chunk: int
    num_warps: int

    @property
    def one_tile(self) -> bool:
        """Whether a program's rows all fit its tile and stay in registers between the passes."""
        return self.rows_per_chunk <= self.rows


def power_of_two_at_least(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def access_width(N: int, itemsize: int) -> int:
    """Elements of one access that every row start is aligned to."""
    return math.gcd(N, ACCESS_BYTES // itemsize)


def row_multiple(M: int) -> int:
    """What the compiler is told of M: whether 16 divides it, and no more, or every batch size would compile anew."""
    return 16 if M % 16 == 0 else 1


def _warps(elements: int) -> int:
    return min(8, power_of_two_at_least(elements // 512))


def _widest_filling(N: int, itemsize: int, programs: int) -> int:
    """The widest tile, between a sector and a line and not beyond N, that makes so many programs over N columns."""
    narrow, cols = SECTOR_BYTES // itemsize, LINE_BYTES // itemsize
    while cols > narrow and (math.ceil(N / cols) < programs or cols >= 2 * N):
        cols //= 2
    return cols


def _line_of_columns(N: int, itemsize: int) -> int:
    """Columns of a line of device memory, fewer where N is less than half of them."""
    return _widest_filling(N, itemsize, math.ceil(N * itemsize / LINE_BYTES))


def _chunks(M: int, rows: int, wanted: int, cols: int) -> Tiles:
    """About so many chunks, of whole numbers of `rows`, in tiles that stream."""
    rows_per_chunk = math.ceil(M / wanted / rows) * rows
    rows = min(rows, STREAM_TILE // cols)
    return Tiles(rows, cols, math.ceil(M / rows_per_chunk), rows_per_chunk, _warps(rows * cols))


def columns_tiles(M: int, N: int, itemsize: int, multiprocessors: int) -> Tiles:
    """Whole columns per program: as wide as still fills the machine, in registers if 8 columns fit there."""
    cols = _widest_filling(N, itemsize, multiprocessors)
    rows = max(16, power_of_two_at_least(M))
    if rows <= REGISTER_TILE // 8:
        cols = min(cols, REGISTER_TILE // rows)
        return Tiles(rows, cols, 1, M, _warps(rows * cols))
    return Tiles(STREAM_TILE // cols, cols, 1, M, _warps(STREAM_TILE))


def split_tiles(M: int, N: int, itemsize: int, multiprocessors: int) -> Tiles:
    """Row chunks of columns: four programs a multiprocessor, at most MAX_CHUNKS chunks, whole tiles in each."""
    cols = _line_of_columns(N, itemsize)
    rows = min(STREAM_TILE // cols, max(16, power_of_two_at_least(M)))
    wanted = min(MAX_CHUNKS, math.ceil(4 * multiprocessors / math.ceil(N / cols)), math.ceil(M / rows))
    return _chunks(M, rows, wanted, cols)


@dataclass(frozen=True)
class LinearTiles:
    """Output tile rows x cols of the GEMM, accumulated in steps of depth.

    With `descriptors` the tensor memory accelerator copies the operands, which takes no registers for their addresses.
    """

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    registers: int = MAX_REGISTERS


def linear_tiles(
    M: int, N: int, K: int, itemsize: int, folded: bool, descriptors: bool, multiprocessors: int
) -> LinearTiles:
    """128 x 128 of 16 bits where that fills the machine (96 KiB of shared memory at most), else 64 x 64 or less.

    Half as wide where BatchNorm is folded in: a thread holds that many columns' parameters, and 128 spill. So does an
    address an element, where rows of K allow no access of 8 bytes.
    """
    rows, cols, num_warps = 64, 64, 4
    fills = math.ceil(M / 128) * math.ceil(N / 128) >= multiprocessors
    if fills and itemsize == 2 and K * itemsize % 8 == 0:
        rows, cols, num_warps = 128, 128, 8
    rows = max(16, min(rows, power_of_two_at_least(M)))
    cols = max(16, min(cols // 2 if folded else cols, power_of_two_at_least(N)))
    # Below that size launches count, and making two descriptors costs the host as much.
    return LinearTiles(rows, cols, LINE_BYTES // itemsize, num_warps, 3, descriptors and num_warps == 8)


def whole_batch_rows(split: bool) -> int:
    """The most rows: 16 columns of 512 take 244 registers of 4 warps, and spill with split operands."""
    return 256 if split else 512


def whole_batch_tiles(M: int, K: int, itemsize: int, split: bool) -> LinearTiles:
    """All rows, 16 columns: the narrowest that tensor cores take, so that few columns still make many programs.

    A thread of 4 warps then loads its part of W in one 16-byte access. An address an element, where rows of K allow no
    wide access, takes twice the threads, and so does splitting (plans.product_precision). A step is at most 32 KiB
    of x, so that two of them fit the 99 KiB of every architecture.
    """
    rows = max(64, power_of_two_at_least(M))
    depth = min(LINE_BYTES // itemsize, 32 * 1024 // (rows * itemsize))
    num_warps = 8 if rows > 128 and (split or K * itemsize % ACCESS_BYTES) else 4
    return LinearTiles(rows, 16, depth, num_warps, 3 if rows * depth * itemsize < 32 * 1024 else 2)


class StripTiles(NamedTuple):
    """Tiles of linear_statistics_kernel and of the apply launch, whose chunks are its strips."""

    product: LinearTiles
    lanes: int  # column tiles at work at once
    apply: Tiles


def linear_statistics_tiles(
    M: int, N: int, itemsize: int, split: bool, descriptors: bool, multiprocessors: int
) -> StripTiles:
    """Two programs a multiprocessor, so that one's statistics run beside the other's product; 64 columns or more, as
    tensor cores take so many rows of the transposed product.

    A thread of 8 warps has 64 numbers of a tile of 128 x 128 and 128 registers, which suffice for 16 bits where
    descriptors copy the operands. Else tiles are half as wide, for half the warps; and half as high where masks
    of single rows or splitting would spill (or, with Triton 3.6, take more tensor memory than sm_100 has), or the tiles
    would leave multiprocessors idle.
    """
    rows, cols, num_warps, registers = 128, 64, 4, MAX_REGISTERS
    fills = math.ceil(M / 128) * math.ceil(N / 64) >= multiprocessors
    descriptors = descriptors and fills  # below, making two costs the host as much as a launch
    if split or row_multiple(M) == 1 or not fills:
        rows = 64
    elif descriptors and itemsize == 2 and math.ceil(M / 128) * math.ceil(N / 128) >= multiprocessors:
        cols, num_warps, registers = 128, 8, 128
    product = LinearTiles(rows, cols, LINE_BYTES // itemsize, num_warps, 3, descriptors, registers)
    col_tiles = math.ceil(N / cols)
    lanes = math.ceil(col_tiles / math.ceil(col_tiles / MAX_LANES))  # of as many tiles each as can be
    strips = _strips(math.ceil(M / rows), lanes, multiprocessors)
    return StripTiles(product, lanes, _chunks(M, rows, strips, _line_of_columns(N, itemsize)))


def _strips(row_tiles: int, lanes: int, multiprocessors: int) -> int:
    """Of two programs a multiprocessor and of the most strips, the number that loads none with more tiles."""
    most = min(MAX_CHUNKS, row_tiles)
    resident = min(most, max(1, 2 * multiprocessors // lanes))
    return min(resident, most, key=lambda n: math.ceil(n * lanes / multiprocessors) * math.ceil(row_tiles / n))


def linear_backward_tiles(itemsize: int) -> LinearTiles:
    """64 rows are what tensor cores take at once; 32 columns make twice the programs of 64.

    fp32 is not pipelined: tensor cores want its operands transposed, which asynchronous copies do 4 bytes at a time.
    """
    return LinearTiles(64, 32, LINE_BYTES // itemsize, 4, 1 if itemsize == 4 else 3)


@triton.jit
def aligned(N, VEC: tl.constexpr):
    """N, which VEC divides, in a form the compiler can see that of: it decides the width of every access.

    Triton's own specialisation only knows divisibility by 16; rows of 100 floats are 16-byte aligned too.
    """
    return (N // VEC) * VEC


@triton.jit
def tile_offsets(row, end, N, col, MASK_ROWS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """64-bit offset of the tile's first row, offsets within it, and the mask of what exists."""
    rows = tl.arange(0, ROWS)[:, None]
    cols = (col + tl.arange(0, COLS))[None, :]
    mask = tl.broadcast_to(cols < N, (ROWS, COLS))
    if MASK_ROWS:
        mask = mask & (row + rows < end)
    return tl.cast(row, tl.int64) * N, rows * N + cols, mask


@triton.jit
def load_tile(ptr, row, end, N, col, MASK_ROWS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows [row, row + ROWS) before end, columns [col, col + COLS) before N, of an (M, N) matrix; fp32, 0 outside."""
    first, offsets, mask = tile_offsets(row, end, N, col, MASK_ROWS, ROWS, COLS)
    return tl.load(ptr + first + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_columns(ptr, cols, N, absent):
    """ptr[cols] as fp32; `absent` where there is no such tensor (ptr is None)."""
    values = tl.full(cols.shape, absent, tl.float32)
    if ptr is not None:
        values = tl.load(ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    return values
