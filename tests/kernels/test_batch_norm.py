"""The forward and backward kernels of every plan against float64, by the rule of support.numerics."""

import pytest
import torch
from support.blocks import PLANS, Block
from support.numerics import judge, judge_once

from fastnn import dispatch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_block_is_as_accurate_as_eager(plan, dtype, device):
    block = Block(67, 19, 23, dtype, bias=True, p=0.3, device=device)
    with dispatch.forced_plan(plan):
        judge(block.ours, block.eager, block.draw, block.axes)


@pytest.mark.parametrize("plan", ["columns", "split", "epilogue"])
def test_streamed_rows_are_as_accurate_as_eager(plan, device):
    """More rows than a register tile holds: the columns plan streams, the others have many chunks or strips."""
    block = Block(1100, 9, 9, linear=plan == "epilogue", p=0.3, device=device)
    with dispatch.forced_plan(plan):
        judge(block.ours, block.eager, block.draw, block.axes, draws=16)


SHAPES = ((2, 1, 1), (2, 3, 7), (3, 5, 8), (17, 8, 33), (64, 16, 64), (129, 31, 40), (257, 4, 101))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, plan, dtype, device):
    block = Block(*shape, dtype, p=0.5, device=device)
    with dispatch.forced_plan(plan):
        judge_once(block.ours, block.eager, block.draw(torch.Generator().manual_seed(1)), block.axes)
