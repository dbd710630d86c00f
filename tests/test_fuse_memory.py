"""Fused models that write in place, or share memory: what they compute is what they compute unfused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnn

pytestmark = pytest.mark.usefixtures("nothing_compiled")


class Model(nn.Module):
    """What a function of (model, x) computes with these layers, of which none has a gradient."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.fc, self.bn, self.conv, self.table = (
            nn.Linear(4, 4),
            nn.BatchNorm1d(4),
            nn.Conv1d(3, 4, 1),
            nn.Embedding(4, 4),
        )
        self.norm2d, self.steps = nn.BatchNorm2d(1), 0
        self.register_buffer("statistics", torch.stack([torch.zeros(4), torch.ones(4)]))
        self.requires_grad_(False)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def a_count_read_between(m, x):
    y = m.bn(x)
    return F.relu(y) * (m.bn.num_batches_tracked * 1.0)


def statistics_within_another_buffer(m, x):
    y = F.batch_norm(m.fc(x), m.statistics[0], m.statistics[1], training=True)
    total = m.statistics.sum()
    return F.relu(y) * total


def another_norm_writes_statistics(m, x):
    y = m.bn.eval()(m.fc(x))
    torch.batch_norm(x, None, None, m.bn.running_mean, m.bn.running_var, True, 0.5, 1e-5, False)
    return F.relu(y)


def a_weight_scaled_by_an_embedding(m, x):
    z = F.linear(x, m.table.weight)
    scaled = F.embedding(torch.arange(4), m.table.weight, max_norm=0.5)
    return F.relu(z) + scaled.sum()


def a_part_of_the_input_overwritten(m, x):
    part = x[:3]
    z = m.fc(x)
    part.add_(1)
    return F.relu(z)


def an_operator_called_by_name(m, x):
    z = m.fc(x)
    x.__iadd__(1)
    return F.relu(z)


def bits_overwritten(m, x):
    z = m.fc(x)
    bits = x.view(torch.int32)
    bits &= 0
    return F.relu(z)


def a_result_overwritten_through_a_view(m, x):
    y = F.relu(m.conv(x[:, :3, None].expand(-1, -1, 5)))
    y.flatten(1).mul_(2)
    return y.mean(2)


def a_result_as_strided(m, x):
    return F.relu(m.conv(x[:, :3, None].expand(-1, -1, 5))).as_strided((6, 20), (20, 1))[:, :7]


def images(m, x):
    return F.relu(m.norm2d(x[:, None, :, None]))


def a_count_of_calls(m, x):
    m.steps += 1
    return F.relu(m.fc(x)) * m.steps


def a_scaled_elu(m, x):
    return F.elu_(m.fc(x), 1.5, 2.0)


MODELS = [
    a_count_read_between,
    statistics_within_another_buffer,
    another_norm_writes_statistics,
    a_weight_scaled_by_an_embedding,
    a_part_of_the_input_overwritten,
    an_operator_called_by_name,
    bits_overwritten,
    a_result_overwritten_through_a_view,
    a_result_as_strided,
    images,
    a_count_of_calls,
    a_scaled_elu,
]


@pytest.mark.parametrize("function", MODELS)
def test_results(function):
    plain = Model(function)
    fused = fastnn.fuse(copy.deepcopy(plain))
    for x in torch.randn(3, 6, 4):
        torch.testing.assert_close(fused(x.clone()), plain(x.clone()), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dict(fused.state_dict()), dict(plain.state_dict()))


def test_inputs_that_share_memory():
    def function(m, x, part):
        z = m.fc(x)
        part.add_(1)
        return F.relu(z)

    plain = Model(function)
    fused = fastnn.fuse(copy.deepcopy(plain))
    x, other = torch.randn(2, 6, 4).unbind()
    other.copy_(x)
    torch.testing.assert_close(fused(x, x[:3]), plain(other, other[:3]))


def test_a_view_as_another_dtype_has_no_gradient():
    plain = Model(lambda m, x: F.relu(m.fc(x).view(torch.float32)))
    plain.fc.requires_grad_()
    assert not plain(torch.randn(3, 4)).requires_grad
    assert not fastnn.fuse(plain)(torch.randn(3, 4)).requires_grad


def test_a_count_of_calls_is_compiled_twice_at_most():
    model = fastnn.fuse(Model(a_count_of_calls))
    model.fc.requires_grad_()
    for _ in range(12):
        out = model(torch.randn(6, 4))
    assert "Block" in out.grad_fn.next_functions[0][0].name()
