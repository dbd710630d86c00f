"""The GEMM with its epilogue against float64: the run without BatchNorm, and eval BatchNorm folded in."""

import pytest
import torch
from support.blocks import Block
from support.interpreter import count_accesses
from support.numerics import judge, judge_once

from fastnn import dispatch, plans

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["none", "running"])
def test_epilogue_is_as_accurate_as_eager(norm, dtype, device):
    block = Block(35, 27, 21, dtype, norm, bias=True, p=0.3, grads=norm == "none", device=device)
    with plans.forced_plan("epilogue"):
        judge(block.ours, block.eager, block.draw, block.axes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 3), (2, 16, 8), (65, 33, 17), (130, 70, 129)], ids=str)
@pytest.mark.parametrize("norm", ["none", "running"])
def test_shapes(norm, shape, dtype, device):
    block = Block(*shape, dtype, norm, p=0.5, bias=True, grads=norm == "none", device=device)
    with plans.forced_plan("epilogue"):
        judge_once(block.ours, block.eager, block.draw(torch.Generator().manual_seed(2)), block.axes)


@pytest.mark.parametrize(("M", "N", "norm"), [(1, 200, "running"), (300, 1, "batch")])
def test_a_dimension_of_one_may_have_any_stride(M, N, norm, device, monkeypatch):
    """It is contiguous all the same; descriptors, where tiles fill the machine, want rows of 16-byte multiples."""
    monkeypatch.setattr(dispatch, "machine", lambda device: dispatch.H100._replace(multiprocessors=1))
    block = Block(M, 8, N, torch.float16, norm, grads=False, device=device)
    inputs = block.draw(torch.Generator().manual_seed(4))
    name = "x" if M == 1 else "weight"
    wide = torch.empty(1, 9, dtype=torch.float16, device=device)
    wide[:, :8] = inputs[name]
    with plans.forced_plan("epilogue"):
        judge_once(lambda given: block.ours({**given, name: wide[:, :8]}), block.eager, inputs, {})


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("K", [32, 784, 2048])
def test_deep_products_are_as_accurate_as_the_librarys(K, mean, device):
    """On a GPU fp32 operands are split; sums of positive numbers show a bias of rounding, long ones its growth."""
    block = Block(40, K, 24, torch.float32, "none", mean=mean, spread=0.3, device=device)
    with plans.forced_plan("epilogue", "grouped"):
        judge(block.ours, block.eager, block.draw, block.axes, draws=6)


@pytest.mark.parametrize("grads", [True, False])
@pytest.mark.parametrize("norm", ["none", "running"])
def test_library_linear_then_apply(norm, grads, device):
    """The plan of large fp32 products, and of eval BatchNorm whose gradient is asked for."""
    block = Block(35, 27, 21, torch.float32, norm, bias=True, p=0.3, grads=grads, device=device)
    with plans.forced_plan("apply"):
        judge(block.ours, block.eager, block.draw, block.axes, draws=16)


def test_folded_batch_norm_keeps_a_large_mean(device):
    """z and running_mean near 1e4: scale · mean folded into the shift would cost three digits."""
    block = Block(24, 16, 16, torch.float32, "running", mean=1e4, grads=False, device=device)

    def draw(generator):
        inputs = block.draw(generator)
        inputs["running_mean"] = (inputs["x"].double() @ inputs["weight"].double().T).mean(0).float()
        return inputs

    with plans.forced_plan("epilogue"):
        judge(block.ours, block.eager, draw, block.axes, draws=16)


def test_eval_is_one_launch_that_writes_only_the_output(device):
    block = Block(35, 27, 21, torch.float32, "running", bias=True, grads=False, device=device)
    inputs = block.draw(torch.Generator().manual_seed(0))
    with count_accesses() as accesses, torch.no_grad(), plans.forced_plan("epilogue"):
        block.ours(inputs)
    assert [launch.kernel for launch in accesses.launches] == ["linear_forward_kernel"]
    assert sum(t.written for t in accesses.shaped(35, 21)) == 35 * 21 * 4
    assert sum(t.total_read for t in accesses.shaped(35, 21)) == 0
