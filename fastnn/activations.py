"""The activations a run may hold: one row each, and the pair of device functions of that name in kernels/."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Activation(NamedTuple):
    """A row: torch's function of (y, a, b), the module it stands for, and that module's (a, b).

    `parameters` returns None where the module, though of that type, is another row's (GELU's two forms).
    """

    function: Callable[[Tensor, float, float], Tensor]
    module: type[nn.Module]
    parameters: Callable[[Any], tuple[float, float] | None]


def _none(module: Any) -> tuple[float, float]:
    return (0.0, 0.0)


def _gelu_form(approximate: str) -> Callable[[Any], tuple[float, float] | None]:
    return lambda m: (0.0, 0.0) if m.approximate == approximate else None


ACTIVATIONS = {
    "identity": Activation(lambda y, a, b: y, nn.Identity, _none),
    "relu": Activation(lambda y, a, b: F.relu(y), nn.ReLU, _none),
    "leaky_relu": Activation(
        lambda y, a, b: F.leaky_relu(y, a), nn.LeakyReLU, lambda m: (float(m.negative_slope), 0.0)
    ),
    "elu": Activation(lambda y, a, b: F.elu(y, a), nn.ELU, lambda m: (float(m.alpha), 0.0)),
    "gelu": Activation(lambda y, a, b: F.gelu(y), nn.GELU, _gelu_form("none")),
    "gelu_tanh": Activation(lambda y, a, b: F.gelu(y, approximate="tanh"), nn.GELU, _gelu_form("tanh")),
    "silu": Activation(lambda y, a, b: F.silu(y), nn.SiLU, _none),
    "tanh": Activation(lambda y, a, b: y.tanh(), nn.Tanh, _none),
    "sigmoid": Activation(lambda y, a, b: y.sigmoid(), nn.Sigmoid, _none),
    "softplus": Activation(
        lambda y, a, b: F.softplus(y, a, b), nn.Softplus, lambda m: (float(m.beta), float(m.threshold))
    ),
}
