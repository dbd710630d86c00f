"""The plain torch path: bitwise torch.nn's own, where no seed is given."""

import pytest
import torch
from torch import nn

from fastnn import reference
from fastnn.activations import ACTIVATIONS
from fastnn.reference import BatchNorm

MODULES = {
    "relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(0.2), "elu": nn.ELU(1.5), "gelu": nn.GELU(), "silu": nn.SiLU(),
    "gelu_tanh": nn.GELU("tanh"), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(), "softplus": nn.Softplus(2.0, 10.0),
    "identity": nn.Identity(),
}  # fmt: skip


def test_every_activation_has_a_module_here():
    assert MODULES.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_rows_stand_for_their_modules(name):
    row, module = ACTIVATIONS[name], MODULES[name]
    y = torch.randn(50) * 5
    assert type(module) is row.module
    assert torch.equal(row.function(y, *row.parameters(module)), module(y))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_block_is_bitwise_the_modules_one_after_another(training, momentum):
    modules = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, momentum=momentum), nn.ReLU(), nn.Dropout(0.4))
    modules.train(training)
    linear, norm = modules[0], modules[1]
    mean, var, counter = norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()
    arguments = BatchNorm(mean, var, norm.weight, norm.bias, counter, training, momentum)
    for seed in range(3):
        x = torch.randn(20, 5)
        torch.manual_seed(seed)
        expected = modules(x)
        torch.manual_seed(seed)
        p = 0.4 if training else 0.0
        assert torch.equal(reference.block(x, linear.weight, linear.bias, arguments, "relu", 0.0, 0.0, p), expected)
    assert torch.equal(mean, norm.running_mean)
    assert torch.equal(var, norm.running_var)
    assert torch.equal(counter, norm.num_batches_tracked)


def test_seeded_dropout_is_the_multiplier():
    x, key = torch.randn(11, 13), torch.tensor(99)
    out = reference.block(x, None, None, None, "identity", 0.0, 0.0, 0.3, key)
    assert torch.equal(out, x * reference.dropout_multiplier(key, 11, 13, 0.3))
