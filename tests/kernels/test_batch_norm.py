"""The forward and backward kernels of every plan against float64, by the rule of support.numerics."""

import pytest
import torch
from support.blocks import PLANS, Block
from support.numerics import judge, judge_once

from fastnn import dispatch, plans
from fastnn.functional import BatchNorm, linear_batch_norm_act_dropout
from fastnn.kernels import tiles

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_block_is_as_accurate_as_eager(plan, dtype, device):
    block = Block(67, 19, 23, dtype, bias=True, p=0.3, device=device)
    with plans.forced_plan(plan):
        judge(block.ours, block.eager, block.draw, block.axes)


@pytest.mark.parametrize("plan", ["columns", "split", "epilogue"])
def test_streamed_rows_are_as_accurate_as_eager(plan, device):
    """More rows than a register tile holds: the columns plan streams, the others have many chunks or strips."""
    block = Block(1100, 9, 9, linear=plan == "epilogue", p=0.3, device=device)
    with plans.forced_plan(plan):
        judge(block.ours, block.eager, block.draw, block.axes, draws=16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [208, 215])
def test_programs_of_several_tiles_each_way(M, dtype, device, monkeypatch):
    """As of tall and wide batches: strips of several tiles, of which the first lies far off, and lanes of several."""
    monkeypatch.setattr(dispatch, "machine", lambda device: dispatch.H100._replace(multiprocessors=1))
    monkeypatch.setattr(tiles, "MAX_LANES", 2)
    # Without a gate, as gates are decided for the x that is drawn.
    block = Block(M, 16, 264, dtype, bias=True, activation="identity", p=0.3, device=device)
    found = tiles.linear_statistics_tiles(M, 264, dtype.itemsize, plans.splits(dtype), True, 1)
    assert found.apply.rows_per_chunk > found.product.rows
    assert found.lanes * found.product.cols < 264
    inputs = block.draw(torch.Generator().manual_seed(3))
    inputs["x"][:64] += 30
    with plans.forced_plan("epilogue"):
        judge_once(block.ours, block.eager, inputs, block.axes)


def test_more_partials_than_are_combined_at_a_time(device, monkeypatch):
    """40 chunks, 32 at a time, the last of them short."""
    monkeypatch.setattr(tiles, "split_tiles", lambda *shape: tiles.Tiles(16, 8, 40, 16, 1))
    z = (1e4 + torch.randn(630, 8)).to(device)
    mean, var = torch.zeros(8, device=device), torch.ones(8, device=device)
    norm = BatchNorm(running_mean=mean, running_var=var, momentum=1.0)
    with plans.forced_plan("split"):
        out = linear_batch_norm_act_dropout(z, batch_norm=norm)
    exact = z.double()
    torch.testing.assert_close(mean.double(), exact.mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), exact.var(0), rtol=2e-6, atol=0)
    normalised = (exact - exact.mean(0)) / (exact.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(out.double(), normalised, rtol=0, atol=2e-3)  # an ulp of the mean


SHAPES = ((2, 1, 1), (2, 3, 7), (3, 5, 8), (17, 8, 33), (64, 16, 64), (129, 31, 40), (257, 4, 101))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, plan, dtype, device):
    block = Block(*shape, dtype, p=0.5, device=device)
    with plans.forced_plan(plan):
        judge_once(block.ours, block.eager, block.draw(torch.Generator().manual_seed(1)), block.axes)
