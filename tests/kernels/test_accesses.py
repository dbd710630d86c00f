"""What a training step of one block moves: accesses of [M, N] in device memory, rereads apart, nothing else stored.

support/block_traffic.py says what an access is.
"""

import pytest
import torch
from support.block_traffic import EVAL, TRAINING, K, Traffic, count_block
from support.blocks import Block

from fastnn import plans

FORWARD_COLUMNS, FORWARD_SPLIT = ["columns_forward_kernel"], ["split_statistics_kernel", "apply_kernel"]
BACKWARD_COLUMNS, BACKWARD_SPLIT = ["columns_backward_kernel"], ["split_sums_kernel", "split_dz_kernel"]


def count_case(case: str) -> Traffic:
    plans, M, N, settings = (TRAINING | EVAL)[case]
    return count_block(plans, M, N, **settings)


def test_whole_batch_writes_z_and_out_and_reads_dz_once_for_both_gradients():
    """W z, W out | R g, R z, W dz | R dz; the second gradient's dz is served by L2, where the library's is a 7th."""
    step = count_case("whole batch")
    assert step.launches == ["whole_batch_forward_kernel", *BACKWARD_COLUMNS, "linear_backward_kernel"]
    assert step.products == []
    assert (step.reads, step.writes, step.rereads) == (3, 3, 1)
    assert count_block("whole_batch library", 100, 24).accesses == 7


def test_columns_in_registers_makes_8_accesses_and_rereads_nothing():
    step = count_case("columns in registers")
    assert step.launches == FORWARD_COLUMNS + BACKWARD_COLUMNS
    assert (step.reads, step.writes, step.gemm, step.rereads) == (3, 2, 3, 0)
    assert step.accesses == 8


def test_streamed_columns_makes_8_accesses_and_rereads_3():
    """z in the forward, g and z in the backward come a second time, from L2."""
    step = count_case("columns streamed")
    assert step.launches == FORWARD_COLUMNS + BACKWARD_COLUMNS
    assert (step.accesses, step.rereads) == (8, 3)


@pytest.mark.parametrize("M", [100, 1100])
def test_split_makes_11_accesses_and_rereads_nothing(M):
    step = count_block("split library", M, 12)
    assert step.launches == FORWARD_SPLIT + BACKWARD_SPLIT
    assert (step.reads, step.writes, step.gemm, step.rereads) == (6, 2, 3, 0)
    assert step.accesses == 11


def test_statistics_in_the_epilogue_save_split_one_of_its_reads():
    """W z | R z, W out, with the backward of either plan."""
    forward = ["linear_statistics_kernel", "apply_kernel"]
    step = count_case("epilogue with columns")
    assert step.launches == forward + BACKWARD_COLUMNS
    assert (step.reads, step.writes, step.gemm, step.rereads) == (3, 3, 2, 0)
    assert step.accesses == 8
    step = count_case("epilogue with split")
    assert step.launches == forward + BACKWARD_SPLIT
    assert (step.accesses, step.rereads) == (10, 0)


def test_without_batch_norm_the_epilogue_writes_z_and_out():
    step = count_case("without BatchNorm")
    assert step.launches == ["linear_forward_kernel", *BACKWARD_COLUMNS]
    assert (step.reads, step.writes, step.gemm, step.rereads) == (2, 3, 2, 0)


def test_eval_writes_out_in_one_launch():
    step = count_case("eval")
    assert step.launches == ["linear_forward_kernel"]
    assert step.products == []
    assert (step.reads, step.writes, step.gemm, step.rereads) == (0, 1, 0, 0)


@pytest.mark.parametrize("plan", ["columns", "split"])
def test_of_activation_size_only_z_is_saved(plan):
    """No mask, no normalised copy, no gate."""
    block = Block(100, K, 24, p=0.5)
    saved = []
    with (
        plans.forced_plan(plan),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        block.ours(block.draw(torch.Generator().manual_seed(0)))
    assert [t.numel() for t in saved if t.numel() >= 100 * 24] == [2 * 24 + 100 * 24]  # with mean and rstd, at once
    others = sum(t.numel() * t.element_size() for t in saved if t.numel() < 100 * 24)
    assert others == 4 * (100 * K + K * 24 + 2 * 24) + 8  # x, weight, gamma, beta; the seed
