"""What the compilers for sm_80, sm_90 and sm_100 make of every launch: no spill, shared memory, wide accesses."""

from pathlib import Path

import pytest
from support.ahead_of_time import SHARED_PER_BLOCK
from support.compiled import PRODUCTS, instructions_per_element, streaming_loops
from support.processes import without_interpreter

SCRIPT = Path(__file__).with_name("compile_launches.py")
KERNELS = {
    "columns_forward_kernel", "split_statistics_kernel", "apply_kernel", "linear_forward_kernel",
    "columns_backward_kernel", "split_sums_kernel", "split_dz_kernel",
    "linear_statistics_kernel", "whole_batch_forward_kernel", "linear_backward_kernel",
}  # fmt: skip
OF_COLUMNS = {  # which read no activation
    "count_batch_kernel", "pack_statistics_kernel", "join_statistics_kernel", "add_up_sums_kernel",
}  # fmt: skip

# mma, wgmma and tcgen05.mma in machine code.
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
SHUFFLES = {80: 96, 90: 24, 100: 24}  # of linear_statistics_kernel
# Instructions per element: a tenth more than the worst architecture and dtype takes with Triton 3.6 or 3.9.
INSTRUCTIONS = {
    ("columns_forward_kernel", 1024, 1024): 44,
    ("columns_backward_kernel", 1024, 1024): 42,
    ("columns_forward_kernel", 10_000, 4096): 24,
    ("columns_backward_kernel", 10_000, 4096): 46,
    ("split_statistics_kernel", 380_000, 512): 8.8,
    ("apply_kernel", 380_000, 512): 17,
    ("split_sums_kernel", 380_000, 512): 23,
    ("split_dz_kernel", 380_000, 512): 25,
}


def name_of(row: dict) -> str:
    return f"{row['kernel']} {row['shape']} {row['dtype']}"


def check_registers_and_shared_memory(capability: int, rows: list[dict]) -> None:
    assert {row["kernel"] for row in rows} == KERNELS | OF_COLUMNS
    assert not [name_of(row) for row in rows if row["stack"]]
    assert not [name_of(row) for row in rows if row["shared"] > SHARED_PER_BLOCK[capability]]
    # 96 KiB also fits the smaller sm_86, sm_89 and sm_120.
    assert max(row["shared"] for row in rows) <= SHARED_PER_BLOCK[86]


def check_accesses_are_as_wide_as_the_rows_allow(rows: list[dict]) -> None:
    """Rows of 16-byte multiples: activations move in 16-byte accesses, and what is narrower is per column."""
    for row in rows:
        itemsize = 4 if "float32" in row["dtype"] else 2
        N = row["shape"][1]
        if N * itemsize % 16 or row["kernel"] in {*PRODUCTS, *OF_COLUMNS}:
            continue
        wide, narrow = row["loads"].get("128", 0), sum(n for width, n in row["loads"].items() if width != "128")
        assert wide >= 4, name_of(row)
        for loop in streaming_loops(row):
            assert set(loop["loads"]) == {"128"}, name_of(row)
        # gamma, beta, running statistics, the seed, the counter; an apply launch also reads partials, at times of one
        # chunk and few columns.
        assert narrow <= 8 or row["kernel"] == "apply_kernel", name_of(row)
        if row["kernel"] not in ("split_statistics_kernel", "split_sums_kernel"):
            assert row["stores"].get("128", 0) >= 4, name_of(row)


def check_products_use_tensor_cores_and_wide_copies(capability: int, rows: list[dict]) -> None:
    for row in rows:
        if row["kernel"] not in PRODUCTS:
            continue
        itemsize = 4 if "float32" in row["dtype"] else 2
        assert row["tensor_core"] > 0, name_of(row)
        assert row["opcodes"].get(TENSOR_CORE[capability], 0) == row["tensor_core"], name_of(row)
        if row["opcodes"].get("UTMALDG"):
            continue  # copies of whole tiles
        if row["shape"][2] * itemsize % 16 == 0 and row["shape"][1] * itemsize % 16 == 0:
            operands = row["async_copies"] or row["loads"]  # fp32's gradients are not pipelined
            wide, narrow = operands.get("128", 0), sum(n for width, n in row["async_copies"].items() if width != "128")
            assert wide >= 6, name_of(row)
            # A thread's part of W is 8 bytes where 512 rows of x leave room for no deeper tile, or 256 split in fp32
            # take 8 warps.
            split = row["shape"][0] == 256 and itemsize == 4
            assert 16 * narrow <= wide * (2 * split + (row["shape"][0] == 512)), name_of(row)


def check_column_sums_cost_few_shuffles(capability: int, rows: list[dict]) -> None:
    """Three sums of a tile: of the product as it lies, not transposed, they would take 288 a thread of sm_90."""
    found = [row for row in rows if row["kernel"] == "linear_statistics_kernel"]
    assert found
    assert not [name_of(row) for row in found if row["opcodes"].get("SHFL", 0) > SHUFFLES[capability]]


def check_dropout_costs_few_instructions(rows: list[dict]) -> None:
    """Of the same kernel with and without: 7 an element on sm_90; a draw per element, instead of eight a call, 20."""
    both = [row["instructions"] for row in rows if row["kernel"] == "columns_forward_kernel"
            and row["shape"] == [1024, 1024] and row["dtype"] == "torch.bfloat16"]  # fmt: skip
    assert len(both) == 2
    assert 0 < max(both) - min(both) <= 11 * 32  # 32 elements a thread


def check_instructions_per_element(rows: list[dict]) -> None:
    """Of training with ReLU and dropout, which each shape launches first."""
    first: dict[tuple, dict] = {}
    for row in rows:
        first.setdefault((row["kernel"], *row["shape"], row["dtype"]), row)
    assert {key[:3] for key in first} >= INSTRUCTIONS.keys()
    for key, row in first.items():
        if key[:3] in INSTRUCTIONS:
            assert instructions_per_element(row) <= INSTRUCTIONS[key[:3]], name_of(row)


@pytest.mark.parametrize("capability", [80, 90, 100], ids="sm_{}".format)
def test_every_launch_compiles_without_spill_and_with_wide_accesses(capability):
    """One test for an architecture, as compiling for one takes the better part of a minute."""
    rows = without_interpreter(SCRIPT, str(capability))
    check_registers_and_shared_memory(capability, rows)
    check_accesses_are_as_wide_as_the_rows_allow(rows)
    check_products_use_tensor_cores_and_wide_copies(capability, rows)
    check_column_sums_cost_few_shuffles(capability, rows)
    check_dropout_costs_few_instructions(rows)
    check_instructions_per_element(rows)
