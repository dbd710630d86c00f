"""Calls of the functional that are settled once: for which tensors, and what makes them be settled anew."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastnn import functional, plans
from fastnn.activations import ACTIVATIONS
from fastnn.functional import BatchNorm, linear_batch_norm_act_dropout


@pytest.fixture
def checks(monkeypatch):
    """One entry for each call that is settled anew."""
    found, check = [], functional._check
    monkeypatch.setattr(functional, "_check", lambda *arguments: found.append(1) or check(*arguments))
    return found


def tensors_of_a_block(**changed):
    given = {"x": torch.randn(12, 8), "weight": torch.randn(6, 8), "bias": torch.randn(6), "gamma": torch.ones(6)}
    given |= {"beta": torch.zeros(6), "mean": torch.zeros(6), "var": torch.ones(6), "training": True, "p": 0.0}
    return given | {"activation": "relu", "momentum": 0.1, "eps": 1e-5} | changed


def both_blocks(given):
    """(ours, torch's), out and gradients by what asks for one."""
    results = []
    for fused in (True, False):
        norm = BatchNorm(
            given["mean"].clone(), given["var"].clone(), given["gamma"], given["beta"], None, given["training"],
            given["momentum"], given["eps"],
        )  # fmt: skip
        x, weight, bias = given["x"], given["weight"], given["bias"]
        if fused:
            activation, p = given["activation"], given["p"]
            out = linear_batch_norm_act_dropout(x, weight, bias, batch_norm=norm, activation=activation, p=p)
        else:
            y = F.batch_norm(F.linear(x, weight, bias), *norm[:4], norm.training, norm.momentum, norm.eps)
            out = ACTIVATIONS[given["activation"]].function(y, 0, 0)
        leaves = [t for t in (x, weight, given["gamma"]) if t.requires_grad and out.requires_grad]
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        results.append([out, *(torch.autograd.grad(out, leaves, g) if leaves else ()), *norm[:2]])
    return results


FORMS = {
    "rows": {"x": torch.randn(13, 8)},
    "columns": {name: torch.rand(7) for name in ("bias", "gamma", "beta", "mean", "var")}
    | {"weight": torch.randn(7, 8)},
    "strides": {"x": torch.randn(8, 12).t()},
    "a gradient": {"weight": torch.randn(6, 8, requires_grad=True)},
    "dtype": {
        name: tensor.bfloat16() for name, tensor in tensors_of_a_block().items() if isinstance(tensor, torch.Tensor)
    },
    "no bias": {"bias": None},
    "eval": {"training": False},
    "activation": {"activation": "tanh"},
    "momentum": {"momentum": 0.3},
    "eps": {"eps": 0.1},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_call_is_settled_once_for_each_form(form, checks):
    """Another form is settled anew and gives what torch gives, and so does the first form afterwards."""
    for given in (tensors_of_a_block(), tensors_of_a_block(), tensors_of_a_block(**FORMS[form]), tensors_of_a_block()):
        tolerance = 0.05 if given["x"].dtype == torch.bfloat16 else 1e-5
        for mine, theirs in zip(*both_blocks(given), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    assert len(checks) == 2


@pytest.mark.parametrize("around", ["no_grad", "inference_mode", "autocast", "tf32", "plan", "mode"])
def test_what_is_around_a_call_settles_it_anew(around, checks, monkeypatch):
    given = tensors_of_a_block(weight=torch.randn(6, 8, requires_grad=True))

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    contexts = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "tf32": lambda: patch.object(plans, "fp32_precision", lambda: "tf32"),
        "plan": lambda: plans.forced_plan("split"),
        "mode": Mode,
    }
    both_blocks(given)
    with contexts[around]():
        mine, theirs = both_blocks(given)
        assert mine[0].dtype == theirs[0].dtype
        assert mine[0].requires_grad == theirs[0].requires_grad
        torch.testing.assert_close(mine[0], theirs[0], rtol=0.05, atol=0.05)
    both_blocks(given)
    both_blocks(given)
    assert len(checks) == (3 if around == "plan" else 2)  # leaving a plan is a change, too


def test_a_call_of_a_settled_form_still_raises_for_another(checks):
    given = tensors_of_a_block()
    both_blocks(given)
    with pytest.raises(RuntimeError, match="input must be"):
        both_blocks(given | {"x": torch.randn(12, 9)})
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        both_blocks(given | {"x": torch.randn(1, 8)})
    with pytest.raises(ValueError, match="probability"):
        linear_batch_norm_act_dropout(given["x"], given["weight"], given["bias"], p=1.5)
