"""The tile rules: every row and column covered once, the machine filled, the limits they promise kept."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from fastnn import dispatch
from fastnn.kernels import tiles

sizes = st.integers(1, 500_000)


@given(M=sizes, N=st.integers(1, 10_000), itemsize=st.sampled_from([2, 4]), multiprocessors=st.integers(8, 200))
def test_tiles_cover_the_rows_and_keep_their_limits(M, N, itemsize, multiprocessors):
    for rule in (tiles.columns_tiles, tiles.split_tiles):
        found = rule(M, N, itemsize, multiprocessors)
        assert (found.chunks - 1) * found.rows_per_chunk < M <= found.chunks * found.rows_per_chunk
        assert found.chunks <= tiles.MAX_CHUNKS
        for size in (found.rows, found.cols, found.num_warps):
            assert size == tiles.power_of_two_at_least(size)
        assert found.rows * found.cols <= tiles.REGISTER_TILE
        assert found.cols >= 8  # a call of the dropout generator
        assert found.num_warps <= 8
        assert found.rows * dispatch.MAX_FEATURES < 2**31  # offsets within a tile are 32-bit
        if rule is tiles.columns_tiles:
            assert found.chunks == 1


@given(
    M=sizes,
    N=st.integers(1, 20_000),
    itemsize=st.sampled_from([2, 4]),
    split=st.booleans(),
    descriptors=st.booleans(),
    multiprocessors=st.integers(8, 200),
)
def test_strips_cover_the_rows_and_leave_few_partials(M, N, itemsize, split, descriptors, multiprocessors):
    found = tiles.linear_statistics_tiles(M, N, itemsize, split, descriptors, multiprocessors)
    strips, rows = found.apply.chunks, found.apply.rows_per_chunk
    assert (strips - 1) * rows < M <= strips * rows
    assert rows % found.product.rows == 0  # a strip ends within a tile only where the batch does
    assert rows % found.apply.rows == 0
    assert strips <= tiles.MAX_CHUNKS
    assert found.lanes <= -(-N // found.product.cols)
    assert found.product.registers * 32 * found.product.num_warps * 2 <= 65536  # of a multiprocessor, for two programs


def test_strips_of_published_shapes_fill_the_machine():
    for M, N, tile in ((80_000, 1024, (128, 128)), (10_000, 504, (128, 128)), (5008, 104, (64, 64))):
        found = tiles.linear_statistics_tiles(M, N, 2, False, True, 132)
        assert (found.product.rows, found.product.cols) == tile
        tiles_of_one = found.apply.rows_per_chunk // tile[0] * -(-N // tile[1]) // found.lanes
        most = -(-found.apply.chunks * found.lanes // 132) * tiles_of_one
        assert most <= 1.3 * -(-(-(-M // tile[0]) * -(-N // tile[1])) // 132)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_column_up_to_1024_rows_stays_in_registers(itemsize):
    for M in (2, 64, 512, 1000, 1024):
        assert tiles.columns_tiles(M, 2048, itemsize, 132).one_tile
    assert not tiles.columns_tiles(1025, 2048, itemsize, 132).one_tile


@pytest.mark.parametrize(("M", "N"), [(380_000, 512), (80_000, 1024), (100_000, 8), (10_000, 500)])
def test_split_fills_the_machine(M, N):
    found = tiles.split_tiles(M, N, 4, 132)
    programs = found.chunks * -(-N // found.cols)
    # Whole tiles in every chunk cost up to a quarter of the four programs a multiprocessor that are aimed at.
    assert programs >= min(4 * 132, tiles.MAX_CHUNKS * -(-N // found.cols)) * 0.75


def test_columns_narrow_until_the_machine_is_filled_but_never_below_a_sector():
    assert tiles.columns_tiles(5000, 8192, 4, 132).cols == 32
    assert tiles.columns_tiles(5000, 2048, 4, 132).cols == 8  # 64 programs of a line each would idle half
    assert tiles.columns_tiles(5000, 100, 4, 132).cols == 8
    assert tiles.columns_tiles(5000, 100, 2, 132).cols == 16


@pytest.mark.parametrize(
    ("N", "itemsize", "width"), [(100, 4, 4), (101, 4, 1), (102, 4, 2), (100, 2, 4), (104, 2, 8), (1, 2, 1)]
)
def test_access_width_is_what_every_row_start_is_aligned_to(N, itemsize, width):
    assert tiles.access_width(N, itemsize) == width


@triton.jit
def offsets_kernel(out_ptr, row, end, N, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    first, within, mask = tiles.tile_offsets(row, end, N, col, True, ROWS, COLS)
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(out_ptr + at, tl.where(mask, first + within, -1))


def test_offsets_pass_2_to_the_31(device):
    """Row 3,000,001 of 1000 columns begins 3·10^9 elements in: 32 bits would wrap to a negative address."""
    row, N, col = 3_000_001, 1000, 992
    out = torch.zeros(4, 16, dtype=torch.int64, device=device)
    offsets_kernel[(1,)](out, row, row + 3, N, col, 4, 16, **tiles.LAUNCH_OPTIONS)
    rows, cols = torch.meshgrid(torch.arange(4), torch.arange(16), indexing="ij")
    expected = (row + rows) * N + col + cols
    exists = (rows < 3) & (col + cols < N)
    assert torch.equal(out, torch.where(exists, expected, -1))
