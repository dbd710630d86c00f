"""Inputs on which other implementations fail: large means, constant columns, extreme magnitudes, NaN and inf."""

import pytest
import torch
from support.blocks import PLANS, PLANS_OF_LINEAR, Block
from support.numerics import judge, judge_once

from fastnn import plans

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")
M, N = 75, 12
DRAWS = 16  # of a problem whose shape and plan are judged over 64 draws elsewhere


def batch_norm_of(plan, dtype, device, rows=M, **settings):
    """BatchNorm of x, by way of a Linear that passes x through where the plan has the product in it."""
    linear = plan in PLANS_OF_LINEAR
    return Block(rows, N, N, dtype, linear=linear, passes=linear, device=device, **settings)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("mean", [100.0, 1e4])
def test_large_mean_small_spread(mean, plan, device):
    """E[x²] - E[x]² has no digit left at 1e4 ± 1 in fp32."""
    block = batch_norm_of(plan, torch.float32, device, mean=mean)
    with plans.forced_plan(plan):
        judge(block.ours, block.eager, block.draw, block.axes, draws=DRAWS)


@pytest.mark.parametrize("plan", ["columns", "split", "epilogue"])
def test_large_mean_over_streamed_tiles(plan, device):
    block = batch_norm_of(plan, torch.float32, device, rows=1100, mean=1e4)
    with plans.forced_plan(plan):
        judge_once(block.ours, block.eager, block.draw(torch.Generator().manual_seed(0)), block.axes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_constant_columns(plan, dtype, device):
    """Variance 0: (z - mean) is 0 or one rounding of the mean, times 1/sqrt(eps): an absolute floor."""
    block = batch_norm_of(plan, dtype, device, activation="identity")
    inputs = block.draw(torch.Generator().manual_seed(0))
    inputs["x"][:, ::2] = inputs["x"][0, ::2]
    rounding = torch.finfo(torch.float32).eps * inputs["x"].abs().max().item() / 1e-5**0.5
    size = (M * N) ** 0.5
    floor = {"out": rounding * size, "dx": 300 * rounding * size, "dgamma": rounding * M, "running_var": 1e-7}
    with plans.forced_plan(plan):
        judge_once(block.ours, block.eager, inputs, block.axes, floor=floor)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("spread", [1e-12, 1e-4, 1e15])
def test_magnitudes(spread, plan, device):
    """Spreads whose variance is far below eps, near it, and close to the end of fp32."""
    block = batch_norm_of(plan, torch.float32, device, spread=spread)
    with plans.forced_plan(plan):
        judge_once(block.ours, block.eager, block.draw(torch.Generator().manual_seed(0)), block.axes)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((place, value) for place in ("x", "g", "running_mean") for value in (NAN, INF, -INF)),
        ("gamma", NAN),  # an infinite gamma is inf on a GPU in eager, and NaN on a CPU, which multiplies it out
    ],
)
def test_nan_and_inf_stay_in_their_columns(place, value, plan, device):
    block = batch_norm_of(plan, torch.float32, device, p=0.5)
    inputs = block.draw(torch.Generator().manual_seed(0))
    inputs[place][..., 5] = torch.where(torch.rand_like(inputs[place][..., 5]) < 0.3, value, inputs[place][..., 5])
    inputs[place].view(-1)[5] = value
    with plans.forced_plan(plan):
        ours = block.ours({name: tensor.clone() for name, tensor in inputs.items()})
    eager = block.eager({name: tensor.clone() for name, tensor in inputs.items()})
    for name, mine in ours.items():
        assert torch.equal(mine.isnan(), eager[name].isnan()), name
        assert torch.equal(mine.isinf(), eager[name].isinf()), name
        finite = eager[name].isfinite()
        torch.testing.assert_close(mine[finite], eager[name][finite], rtol=1e-4, atol=1e-5, msg=name)
