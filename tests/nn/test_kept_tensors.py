"""What autograd's rules on memory ask of Sequential: which tensors a run may keep or write, and when it refuses."""

import copy

import pytest
import torch
from support.sequential_pair import assert_same, cost, drawn, pair, stack
from torch import nn
from torch.func import functional_call, grad

BLOCK = [nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()]


def made_in_inference_mode(*shape):
    with torch.inference_mode():
        return drawn("kernels", *shape).clone()


@pytest.mark.parametrize("settled", [True, False])
def test_a_refused_inference_tensor_moves_no_statistics(settled):
    for model in pair("kernels", copy.deepcopy(BLOCK)):
        if settled:
            model(drawn("kernels", 12, 4))
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            model(made_in_inference_mode(12, 4))
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_frozen_linear_takes_what_inference_mode_made():
    """Features of a frozen backbone: torch's Linear saves them for its weight's gradient only."""

    def scenario(model):
        model[0].requires_grad_(False)
        cost(model(made_in_inference_mode(12, 4))).backward()

    assert_same("kernels", scenario, copy.deepcopy(BLOCK))


def test_statistics_made_in_inference_mode_may_not_move_outside_it():
    for model in pair("kernels", copy.deepcopy(BLOCK)):
        with torch.inference_mode():
            frozen = copy.deepcopy(model).requires_grad_(False)
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
            frozen(drawn("kernels", 12, 4))


def test_a_refused_transform_moves_no_statistics(path):
    for model in pair(path, stack()):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match="in-place"):
            grad(lambda p, m=model: cost(functional_call(m, p, drawn(path, 12, 4))))(dict(model.named_parameters()))
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
