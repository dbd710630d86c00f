"""Results do not depend on the order programs run in, nor change from run to run; counters are counted once."""

from contextlib import nullcontext

import pytest
import torch
from support.blocks import PLANS, PLANS_OF_LINEAR, Block
from support.interpreter import shuffled_grid

from fastnn import dispatch, ops, plans
from fastnn.reference import BatchNorm

CASES = {
    "columns": Block(50, 6, 40, p=0.5),
    "columns streamed": Block(1100, 3, 20, p=0.5),
    "whole_batch": Block(50, 6, 40, bias=True, p=0.5),
    "split": Block(600, 3, 70, p=0.5),
    "apply": Block(200, 3, 70, norm="running", p=0.5),
    "epilogue": Block(150, 9, 140, norm="none", bias=True, p=0.5),
    "epilogue with statistics": Block(300, 8, 140, bias=True, p=0.5),
}


def run(case):
    block = CASES[case]
    with plans.forced_plan(case.split()[0]):
        return block.ours(block.draw(torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("case", CASES)
def test_each_run_gives_the_same_bits(case):
    expected = run(case)
    for _ in range(3):
        for name, tensor in run(case).items():
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("case", CASES)
def test_shuffled_grids_give_the_same_bits(case):
    expected = run(case)
    for seed in (1, 2):
        with shuffled_grid(seed):
            shuffled = run(case)
        for name, tensor in expected.items():
            assert torch.equal(shuffled[name], tensor), name


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("plan", PLANS)
def test_counter_and_running_statistics_over_batches_in_any_order(plan, momentum):
    """Against torch.nn.BatchNorm1d in float64; momentum None is the average over all batches so far."""
    N = 40
    norm = torch.nn.BatchNorm1d(N, momentum=momentum)
    weight = torch.eye(N) if plan in PLANS_OF_LINEAR else None
    exact = torch.nn.BatchNorm1d(N, momentum=momentum).double()
    for step in range(4):
        x = torch.randn(30 + step, N) * 3 + 1
        arguments = BatchNorm(
            norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.num_batches_tracked,
            True, momentum, norm.eps,
        )  # fmt: skip
        shuffled = shuffled_grid(step) if dispatch.INTERPRETED else nullcontext()  # a GPU has its own order
        with plans.forced_plan(plan), shuffled:
            ops.block(x, weight, None, arguments, None, "relu", 0.0, 0.0, 0.0)
        exact(x.double())
        assert norm.num_batches_tracked.item() == step + 1
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(norm, name).double(), getattr(exact, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("plan", PLANS)
def test_bias_before_batch_statistics_gets_exact_zeros(plan):
    block = Block(64, 7, 33, bias=True, p=0.3)
    inputs = block.draw(torch.Generator().manual_seed(0))
    bias = inputs["bias"].requires_grad_()
    with plans.forced_plan(plan):
        block.ours(inputs)
    assert torch.equal(bias.grad, torch.zeros_like(bias))
