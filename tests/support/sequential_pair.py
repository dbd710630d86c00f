"""The same layers in fastnn's Sequential and in torch's, and one scenario on both."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastnn

# The two differ by orders of summation: a few roundings of sums over 12 rows, through three layers and back.
TOLERANCES = {"kernels": 2e-5, "reference": 2e-5, "float64": 1e-12}


def dtype_of(path: str) -> torch.dtype:
    return torch.float64 if path == "float64" else torch.float32


def stack(p: float = 0.0) -> list[nn.Module]:
    """Two fused runs, and a Linear alone."""
    first = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Dropout(p)]
    return [*first, nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)]


def pair(path: str, layers: list[nn.Module]) -> tuple[nn.Sequential, nn.Sequential]:
    ours = fastnn.nn.Sequential(*layers).to(dtype_of(path))
    for module in ours:
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm1d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return ours, nn.Sequential(*copy.deepcopy(list(ours)))


def drawn(path: str, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype_of(path))


def state_of(model: nn.Module) -> list[dict[str, Any]]:
    """Gradients (None where there is none), parameters and buffers."""
    return [{name: parameter.grad for name, parameter in model.named_parameters()}, dict(model.state_dict())]


def assert_same(
    path: str, scenario: Callable[[Any], Any], layers: list[nn.Module] | None = None, tolerance: float | None = None
) -> None:
    """The scenario's results, and the model's state after it, are those of torch's layers."""
    found = []
    for model in pair(path, stack() if layers is None else layers):
        result = scenario(model)
        found.append([result, state_of(model)])
    tolerance = tolerance or TOLERANCES[path]
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


def cost(out: Tensor, seed: int = 2) -> Tensor:
    """A scalar with a cotangent of its own for each element: a plain sum has no gradient through BatchNorm."""
    cotangent = torch.arange(1, out.numel() + 1, dtype=torch.float64).mul(seed + 1).cos()  # vmap takes no draws
    return (out * cotangent.view(out.shape).to(out)).sum()
