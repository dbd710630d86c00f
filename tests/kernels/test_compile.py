"""What the compilers for sm_80, sm_90 and sm_100 make of every launch: no spill, shared memory, wide accesses."""

from pathlib import Path

import pytest
from support.ahead_of_time import SHARED_PER_BLOCK, without_interpreter

SCRIPT = Path(__file__).with_name("compile_launches.py")
KERNELS = {
    "columns_forward_kernel", "split_statistics_kernel", "apply_kernel", "linear_forward_kernel",
    "columns_backward_kernel", "split_sums_kernel", "split_dz_kernel",
}  # fmt: skip


# One worker compiles for one architecture: a minute each, which two workers need not spend twice.
CAPABILITIES = [pytest.param(sm, marks=pytest.mark.xdist_group(f"sm_{sm}")) for sm in (80, 90, 100)]


@pytest.fixture(scope="module", params=CAPABILITIES)
def compiled(request) -> tuple[int, list[dict]]:
    return request.param, without_interpreter(SCRIPT, str(request.param))


def name_of(row: dict) -> str:
    return f"{row['kernel']} {row['shape']} {row['dtype']}"


def test_every_kernel_compiles_without_spill_within_shared_memory(compiled):
    capability, rows = compiled
    assert {row["kernel"] for row in rows} == KERNELS
    assert not [name_of(row) for row in rows if row["stack"]]
    assert not [name_of(row) for row in rows if row["shared"] > SHARED_PER_BLOCK[capability]]
    # 96 KiB also fits the smaller sm_86, sm_89 and sm_120.
    assert max(row["shared"] for row in rows) <= SHARED_PER_BLOCK[86]


def test_accesses_are_as_wide_as_the_rows_allow(compiled):
    """Rows of 16-byte multiples: activations move in 16-byte accesses, and what is narrower is per column."""
    _, rows = compiled
    for row in rows:
        itemsize = 4 if "float32" in row["dtype"] else 2
        N = row["shape"][1]
        if N * itemsize % 16 or row["kernel"] == "linear_forward_kernel":
            continue
        wide, narrow = row["loads"].get("128", 0), sum(n for width, n in row["loads"].items() if width != "128")
        assert wide >= 4, name_of(row)
        assert narrow <= 8, name_of(row)  # gamma, beta, running statistics, the seed, the counter
        if row["kernel"] not in ("split_statistics_kernel", "split_sums_kernel"):
            assert row["stores"].get("128", 0) >= 4, name_of(row)


def test_products_use_tensor_cores_and_wide_copies(compiled):
    _, rows = compiled
    for row in rows:
        if row["kernel"] != "linear_forward_kernel":
            continue
        itemsize = 4 if "float32" in row["dtype"] else 2
        if row["dtype"] == "torch.bfloat16":
            assert row["tensor_core"] > 0, name_of(row)
        if row["shape"][2] * itemsize % 16 == 0:
            assert set(row["async_copies"]) == {"128"}, name_of(row)


def test_dropout_costs_few_instructions(compiled):
    """About 11 a element with the generator: a draw per element, instead of eight a call, would cost 20."""
    _, rows = compiled
    (row,) = (r for r in rows if r["kernel"] == "columns_forward_kernel" and r["shape"] == [1024, 1024]
              and r["dtype"] == "torch.bfloat16")  # fmt: skip
    assert row["instructions"] < 60 * 32  # 32 elements a thread: load, statistics, apply and dropout together
