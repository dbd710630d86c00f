"""Thresholds of every figure that is exact without a GPU, and that a slowed kernel passes none of them.

What the compilers make of the kernels is held by test_compile.py and test_steps.py, host time by test_host.py.
"""

import math
from pathlib import Path
from unittest.mock import patch

import pytest
import triton
import triton.language as tl
from support import block_traffic, launch_counts, saved_bytes, step_traffic
from support.figures import Row
from support.processes import without_interpreter

from bench.workloads import WORKLOADS
from fastnn.kernels import batch_norm, launch, multi_tensor, tiles
from fastnn.kernels.tiles import STREAM_TILE, Tiles, tile_offsets

TRAINING, EVAL, MLP = "a training step", "eval", "launches of a training step of notes-mlp, batch 64"
AUTOCAST = MLP + ", bf16 autocast"
# Of the plans in block_traffic.TRAINING's order, then BatchNorm folded into the GEMM in eval.
BLOCKS = {
    f"accesses of [M, N] in {TRAINING}": (6, 8, 8, 11, 8, 10, 7),
    f"accesses of masks in {TRAINING}": (0,) * 7,  # drawn again instead
    f"rereads from L2 in {TRAINING}": (1, 0, 3, 0, 0, 0, 0),  # dz by both gradients; z, and g and z
    f"launches of a block in {TRAINING}": (
        3,
        5,
        5,
        7,
        5,
        6,
        4,
    ),  # the library's three products among them, or two, or none
    f"accesses of [M, N] in {EVAL}": (1,),
    f"launches of a block in {EVAL}": (1,),
}
STATES = {"SGD": 0, "Adam": 2, "AdamW": 2, "NAdam": 2, "RMSprop": 1, "Adagrad": 1, "Adadelta": 2}
ITEMSIZES = {"fp32": 4, "bf16": 2}


def block_thresholds() -> dict[tuple[str, str], float]:
    cases = {TRAINING: block_traffic.TRAINING, EVAL: block_traffic.EVAL}
    return {
        (figure, case): value
        for figure, values in BLOCKS.items()
        for case, value in zip(cases[TRAINING if TRAINING in figure else EVAL], values, strict=True)
    }


def step_thresholds() -> dict[tuple[str, str], float]:
    """Parameter and states are read and written, the gradient read; clipping reads it once more, in one more launch."""
    found: dict[tuple[str, str], float] = {}
    for name, states in STATES.items():
        for dtype, itemsize in ITEMSIZES.items():
            for clipped, case in enumerate((f"{name}, {dtype}", f"{name}, {dtype}, clipped")):
                values = 3 + 2 * states + clipped
                found["bytes of an optimizer step per parameter", case] = itemsize * values
                found["launches of an optimizer step", case] = 1 + clipped
    return found


def saved_thresholds() -> dict[tuple[str, str], float]:
    """A block saves its input and z, mean and rstd of each column in fp32, and the seed of its dropout."""
    found: dict[tuple[str, str], float] = {}
    for workload in WORKLOADS.values():
        for batch in workload.batches:
            inputs = [K for K, _ in workload.blocks] + [workload.widths[-1]] * (workload.head is not None)
            outputs = [N for _, N in workload.blocks]
            seeds = 8 * len(outputs) * (workload.p > 0)
            for dtype, itemsize in ITEMSIZES.items():
                stats = sum(16 * math.ceil(N / 2) for N in outputs)  # of 8 bytes, before a multiple of 16
                saved = itemsize * batch * sum(inputs + outputs) + stats + seeds
                found["bytes saved for the backward", f"{workload.name}, {batch}, {dtype}"] = saved
    return found


# Forward: each of two blocks, the last Linear. Backward: the last Linear's gradients; dz and the Linear's gradients, of
# the first block by weight only. Under autocast no cast.
STEP_OF_THE_MLP = {"forward": 3, "backward": 5, "optimizer step": 1, "in total": 9}
THRESHOLDS = {
    **block_thresholds(),
    **step_thresholds(),
    **saved_thresholds(),
    **{(figure, phase): value for figure in (MLP, AUTOCAST) for phase, value in STEP_OF_THE_MLP.items()},
}


def check(rows: list[Row]) -> None:
    """Every figure of ours is exactly its threshold: worse is a regression, better a threshold to be lowered."""
    ours = {(row["figure"], row["case"]): row["value"] for row in rows if row["implementation"] == "fastnn"}
    assert ours
    assert ours == {key: THRESHOLDS.get(key) for key in ours}


def eager(rows: list[Row], figure: str) -> dict[str, float]:
    return {r["case"]: r["value"] for r in rows if figure in r["figure"] and r["implementation"] == "eager"}


def test_blocks():
    """Eager's by hand: Linear W; BatchNorm, ReLU, dropout R W each; backward R W, R R W, R R W, and R for each product.

    Without BatchNorm its R W and R R W are missing, and the bias gradient reads once. Dropout writes and reads a mask.
    """
    rows = block_traffic.rows()
    check(rows)
    accesses = dict.fromkeys(block_traffic.TRAINING, 17) | {"without BatchNorm": 13}
    assert eager(rows, "accesses of [M, N] in a training step") == accesses
    assert eager(rows, "masks in a training step") == dict.fromkeys(accesses, 2)
    assert eager(rows, "accesses of [M, N] in eval") == {"eval": 5}
    launches = dict.fromkeys(accesses, 10) | {"without BatchNorm": 8}  # with BatchNorm, its counter too
    assert eager(rows, "launches of a block in a training step") == launches


def test_launches_of_a_training_step():
    """Eager's: each block a product, counter, BatchNorm, ReLU and dropout, and backward the last three and products.

    Autocast casts the input, three weights and a bias, and the gradients of all but the first back.
    """
    rows = without_interpreter(Path(launch_counts.__file__))
    check(rows)
    counts = {"forward": 11, "backward": 12, "optimizer step": 7, "in total": 30}
    assert eager([row for row in rows if row["figure"] == MLP], MLP) == counts
    assert eager(rows, AUTOCAST) == {"forward": 11 + 5, "backward": 12 + 4, "optimizer step": 7, "in total": 30 + 9}


def test_saved_bytes():
    rows = saved_bytes.rows()
    check(rows)
    theirs, ours = eager(rows, "saved"), {r["case"]: r["value"] for r in rows if r["implementation"] == "fastnn"}
    assert len(theirs) == 2 * sum(len(workload.batches) for workload in WORKLOADS.values())
    # Eager saves z, the ReLU's output and, where there is dropout, its output and mask: of mag240m no output is kept.
    assert theirs["mag240m, 380000, fp32"] == 380_000 * (4 * (768 + 512 + 512) + 512) + 2 * 4 * 512
    assert all(ours[case] < theirs[case] for case in ours)


def test_optimizer_steps():
    """Eager's foreach Adam by hand: 19 values; clipping reads the gradient for the norm, then reads and writes it."""
    rows = step_traffic.rows()
    check(rows)
    moved = eager(rows, "bytes")
    assert (moved["Adam, fp32"], moved["Adam, bf16"]) == (4 * 19, 2 * 19)
    assert moved["Adam, fp32, clipped"] == 4 * 22
    assert eager(rows, "launches")["Adam, fp32"] == 7


def forward_twice(*args):
    return original_forward_columns(*args) + original_forward_columns(*args)


original_forward_columns = launch.forward_columns


@triton.jit
def load_tile_twice(ptr, row, end, N, col, MASK_ROWS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    first, offsets, mask = tile_offsets(row, end, N, col, MASK_ROWS, ROWS, COLS)
    again = tl.load(ptr + first + offsets, mask=mask, other=0.0)
    return tl.maximum(again, tl.load(ptr + first + offsets, mask=mask, other=0.0)).to(tl.float32)


def streaming_tiles(M, N, itemsize, multiprocessors):
    return Tiles(STREAM_TILE // 128, 8, 1, M, 8)


@pytest.mark.parametrize(
    ("owner", "name", "slower"),
    [
        (launch, "forward_columns", forward_twice),  # another pass over z
        (batch_norm, "load_tile", load_tile_twice),  # z read again where it is in registers
        (tiles, "columns_tiles", streaming_tiles),  # columns no longer kept in registers
    ],
    ids=["a second pass", "a second read", "columns streamed"],
)
def test_a_slowed_block_is_caught(owner, name, slower):
    check(block_traffic.rows_of("columns in registers"))
    with patch.object(owner, name, slower), pytest.raises(AssertionError):
        check(block_traffic.rows_of("columns in registers"))


def test_a_slowed_step_is_caught():
    step = multi_tensor.Launcher.__call__

    def step_twice(*args):
        step(*args)
        step(*args)

    check(step_traffic.rows_of("Adam"))
    with patch.object(multi_tensor.Launcher, "__call__", step_twice), pytest.raises(AssertionError):
        check(step_traffic.rows_of("Adam"))


def test_a_figure_without_a_threshold_is_caught():
    row = {"figure": "a new one", "case": "any", "implementation": "fastnn", "value": 0.0}
    with pytest.raises(AssertionError):
        check([row])
