"""The constructors: torch's layers, keys and defaults."""

import inspect

import pytest
import torch
from torch import nn

import fastnn


def test_block_is_the_four_layers():
    block = fastnn.nn.LinearBatchNormReLUDropout(5, 7, p=0.25, eps=1e-3, momentum=0.01, dtype=torch.float64)
    plain = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7, eps=1e-3, momentum=0.01), nn.ReLU(), nn.Dropout(0.25))
    assert str(block)[len("LinearBatchNormReLUDropout") :] == str(plain)[len("Sequential") :]
    assert list(block.state_dict()) == list(plain.state_dict())
    assert {t.dtype for t in block.parameters()} == {torch.float64}
    plain.load_state_dict(block.state_dict())
    bare = fastnn.nn.LinearBatchNormReLUDropout(5, 7, bias=False, affine=False, track_running_stats=False)
    assert list(bare.state_dict()) == ["0.weight"]


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_wrong_probability_is_refused(p):
    with pytest.raises(ValueError, match="dropout probability"):
        fastnn.nn.LinearBatchNormReLUDropout(5, 7, p=p)
    with pytest.raises(ValueError, match="dropout probability"):
        fastnn.nn.MLP(5, [7, 3], dropout=p)


def test_mlp_has_torchvisions_signature_and_layers():
    """torchvision.ops.MLP as of 0.2x: it drops out the output too."""
    parameters = inspect.signature(fastnn.nn.MLP).parameters
    assert {name: p.default for name, p in parameters.items() if p.default is not p.empty} == {
        "norm_layer": None, "activation_layer": nn.ReLU, "inplace": None, "bias": True, "dropout": 0.0,
    }  # fmt: skip
    assert list(parameters)[:2] == ["in_channels", "hidden_channels"]
    mlp = fastnn.nn.MLP(9, [8, 7, 3], norm_layer=nn.BatchNorm1d, dropout=0.1, inplace=True)
    kinds = [type(layer) for layer in mlp]
    block = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    assert kinds == [*block, *block, nn.Linear, nn.Dropout]
    assert all(layer.inplace for layer in mlp if isinstance(layer, (nn.ReLU, nn.Dropout)))
    assert [key for key in mlp.state_dict() if key.endswith("weight")] == [
        "0.weight", "1.weight", "4.weight", "5.weight", "8.weight",
    ]  # fmt: skip
    plain = [type(layer) for layer in fastnn.nn.MLP(9, [8, 3], activation_layer=None, bias=False)]
    assert plain == [nn.Linear, nn.Dropout, nn.Linear, nn.Dropout]


def test_mlp_without_widths_is_refused():
    with pytest.raises(ValueError, match="hidden_channels must name at least"):
        fastnn.nn.MLP(9, [])


def test_mlp_trains():
    model = fastnn.nn.MLP(4, [16, 16, 1], norm_layer=nn.BatchNorm1d, dropout=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x = torch.randn(64, 4)
    y = x[:, :1] * x[:, 1:2]
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
