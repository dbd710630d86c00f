"""Each activation's value and gradient against torch's in float64."""

import pytest
import torch
from support.blocks import Block
from support.numerics import judge_once

from fastnn.activations import ACTIVATIONS

ARGUMENTS = {"leaky_relu": (0.1, 0.0), "elu": (1.3, 0.0), "softplus": (2.0, 20.0)}
RANGES = {"near zero": 1e-3, "ordinary": 1.0, "saturated": 30.0}


def block(name: str, spread: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Block:
    arguments = ARGUMENTS.get(name, (0.0, 0.0))
    return Block(40, 24, 24, dtype, "none", linear=False, activation=name, arguments=arguments, spread=spread,
                 device=device)  # fmt: skip


@pytest.mark.parametrize("spread", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_and_gradient(name, dtype, spread, device):
    problem = block(name, spread, device, dtype)
    judge_once(problem.ours, problem.eager, problem.draw(torch.Generator().manual_seed(3)), problem.axes)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_special_values_stand_where_torch_has_them(name, device):
    """NaN, infinities, zeros and the edges of fp32, in the input and in the gradient; torch in float64 decides.

    (Its fp32 gelu on a CPU overflows at 3e38, and its elu's gradient at NaN differs between vector lanes and tails.)
    The cube in gelu_tanh passes fp32's range beyond 7e12, in torch as here.
    """
    huge = 1e12 if name == "gelu_tanh" else 3e38
    values = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), huge, -huge, 1e-38, -1e-38, 88.8])
    inputs = {
        "x": values.repeat(4, 1),
        "g": torch.tensor([1.0, 0.0, float("nan"), float("inf")])[:, None].expand(4, 10),
    }
    problem = block(name, 1.0, device)
    ours = problem.ours({key: tensor.to(device, copy=True) for key, tensor in inputs.items()})
    exact = problem.eager({key: tensor.to("cpu", torch.float64) for key, tensor in inputs.items()})
    decided = torch.ones(4, 10, dtype=torch.bool, device="cpu")
    for key in ("out", "dx"):
        if (name, key) == ("elu", "dx"):
            decided[:, values.isnan().cpu()] = False
        mine, true = ours[key].cpu()[decided], exact[key][decided]
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(mine), kind(true)), (key, kind)
        finite = true.isfinite()
        torch.testing.assert_close(mine[finite].double(), true[finite], rtol=2e-6, atol=1e-37)
