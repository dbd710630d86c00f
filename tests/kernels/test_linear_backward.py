"""A Linear's gradients in one launch against float64, by the rule of support.numerics; alone and behind a block."""

import pytest
import torch
import torch.nn.functional as F
from support.interpreter import count_accesses, shuffled_grid
from support.numerics import judge, judge_once
from support.optimizers import DEVICE

from fastnn import ops, plans

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
AXES = {"x": "MK", "weight": "NK", "bias": "N", "g": "MN", "dx": "MK", "dweight": "NK", "dbias": "N"}


def draw(M, N, K, dtype, generator):
    shapes = {"x": (M, K), "weight": (N, K), "bias": (N,), "g": (M, N)}
    return {name: torch.randn(shape, generator=generator).to(DEVICE, dtype) for name, shape in shapes.items()}


def gradients(linear):
    def run(inputs):
        leaves = {name: inputs[name].requires_grad_() for name in ("x", "weight", "bias")}
        linear(*leaves.values()).backward(inputs["g"])
        return {f"d{name}": leaf.grad for name, leaf in leaves.items()}

    return run


def ours(inputs):
    with plans.forced_plan("grouped"):
        return gradients(lambda *leaves: ops.block(*leaves, None, None, "identity", 0.0, 0.0, 0.0))(inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_as_accurate_as_eager(dtype):
    judge(ours, gradients(F.linear), lambda generator: draw(67, 33, 41, dtype, generator), AXES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (64, 64, 32), (65, 130, 33), (200, 8, 100)], ids=str)
def test_shapes(shape, dtype):
    judge_once(ours, gradients(F.linear), draw(*shape, dtype, torch.Generator().manual_seed(1)), AXES)


@pytest.mark.parametrize("wanted", [("weight", "bias"), ("x", "weight"), ("x", "weight", "bias")], ids="+".join)
def test_gradients_that_are_wanted_take_one_launch_and_any_order_gives_the_same_bits(wanted):
    inputs = draw(70, 40, 50, torch.float32, torch.Generator().manual_seed(0))

    def run():
        leaves = {name: inputs[name].clone().requires_grad_(name in wanted) for name in ("x", "weight", "bias")}
        with plans.forced_plan("grouped"):
            ops.block(*leaves.values(), None, None, "identity", 0.0, 0.0, 0.0).backward(inputs["g"])
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    with count_accesses() as counted:
        expected = run()
    assert [launch.kernel for launch in counted.launches] == ["linear_backward_kernel"]
    assert tuple(expected) == wanted
    exact = gradients(F.linear)({name: tensor.double() for name, tensor in inputs.items()})
    for name, gradient in expected.items():
        torch.testing.assert_close(gradient.double(), exact[f"d{name}"], rtol=1e-4, atol=1e-4)
    for seed in (1, 2):
        with shuffled_grid(seed):
            shuffled = run()
        assert all(torch.equal(shuffled[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("strides", ["x", "weight", "g"])
def test_operands_of_any_strides(strides):
    inputs = draw(20, 12, 16, torch.float32, torch.Generator().manual_seed(0))
    inputs[strides] = inputs[strides].t().contiguous().t()
    theirs = gradients(F.linear)({name: tensor.detach().clone() for name, tensor in inputs.items()})
    torch.testing.assert_close(ours(inputs), theirs, rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_of_a_linear_alone_but_its_operands():
    inputs = draw(20, 12, 16, torch.float32, torch.Generator().manual_seed(0))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(inputs)
    assert sorted(t.numel() for t in saved if t.numel()) == sorted(
        inputs[name].numel() for name in ("x", "weight", "bias")
    )
