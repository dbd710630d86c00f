"""What the compilers make of the optimizers' launches: registers, no spill, 16-byte accesses; 64-bit offsets."""

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from support.compiled import instructions_per_element
from support.processes import without_interpreter

from fastnn.kernels.tables import BLOCK, Tables, chunk_of

SCRIPT = Path(__file__).with_name("compile_steps.py")
PER_THREAD = BLOCK // 128  # elements
# Instructions per element where whole blocks are walked: a tenth more than the worst architecture and dtype takes.
INSTRUCTIONS = {("sgd", 1): 27, ("adam", 3): 52}


def accesses(itemsizes) -> int:
    """16-byte accesses of a thread for a block of tensors with these item sizes."""
    return sum(PER_THREAD * itemsize // 16 for itemsize in itemsizes)


@pytest.mark.parametrize("capability", [80, 90, 100], ids="sm_{}".format)
def test_steps_do_not_spill_and_access_16_bytes(capability):
    rows = without_interpreter(SCRIPT, str(capability))
    steps = [row for row in rows if row["kernel"] == "step_kernel"]
    assert len(rows) == len(steps) + 10 == 9 * 4 + 2 + 10
    for row in rows:
        assert row["stack"] == 0, row
        assert row["registers"] <= (192 if row.get("present") == 7 else 128), row
    for row in steps:
        param, grad, state = row["dtypes"]
        states = [state] * row["present"].bit_count()
        if "everything" not in row:
            assert row["loads"]["128"] == accesses([param, grad, *states]), row
            assert row["stores"]["128"] == accesses([param, *states]), row
        else:  # the partials are read 16 bytes at a time, too, and the unscaled gradient is written
            assert row["loads"]["128"] >= accesses([param, grad, *states]), row
            assert row["stores"]["128"] == accesses([param, grad, *states]), row
    for row in steps:
        limit = INSTRUCTIONS.get((row["rule"], row["present"]))
        assert limit is None or instructions_per_element(row) <= limit, (row, instructions_per_element(row))
    for row in rows:
        if row["kernel"] == "clip_kernel":  # whose loop is unrolled
            assert row["stores"]["128"] % accesses(row["dtypes"]) == 0, row
        if row["kernel"] in ("clip_kernel", "norm_kernel"):
            assert row["loads"]["128"] % accesses(row["dtypes"]) == 0, row


@triton.jit
def bounds_kernel(table_ptr, chunks_ptr, out_ptr, tensors, blocks, BLOCK: tl.constexpr):
    _, size, _, bounds = chunk_of(table_ptr, chunks_ptr, tensors, blocks, 0, 0, BLOCK)
    tl.store(out_ptr, size)
    for i in tl.static_range(3):
        tl.store(out_ptr + 1 + i, bounds[i] * BLOCK)


@pytest.mark.parametrize("aligned", [True, False])
def test_offsets_pass_2_to_the_31(aligned, device):
    """The last chunk of a tensor of 5·10^9 elements, from the tables alone."""
    size, address = 5_000_000_001, 1 << 12
    tables = Tables({0: [address], 1: [address + 4 * (not aligned)]}, [1], [0], device, 132)
    blocks = 64
    last = (size - 1) // (blocks * BLOCK)
    tables.table[7] = size
    tables.chunks[0, 1] = last
    out = torch.zeros(4, dtype=torch.int64)
    bounds_kernel[(1,)](tables.table, tables.chunks, out, 1, blocks, BLOCK=BLOCK)
    first = last * blocks * BLOCK
    whole = size // BLOCK * BLOCK if aligned else first
    assert out.tolist() == [size, first, whole, -(-size // BLOCK) * BLOCK]
