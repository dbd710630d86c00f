"""The optimizers, the flags torch gives them, and training them on random gradients."""

import os
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from fastnn import optim

DEVICE = os.environ.get("FASTNN_TEST_DEVICE", "cpu")
SEVEN = ("SGD", "Adam", "AdamW", "NAdam", "RMSprop", "Adagrad", "Adadelta")
HAS_FUSED = ("SGD", "Adam", "AdamW", "Adagrad")
HAS_CAPTURABLE = ("Adam", "AdamW", "NAdam", "RMSprop", "Adadelta")
REGULAR = {"weight_decay": (0.0, 0.05), "maximize": (False, True)}
FLAGS: dict[str, dict[str, tuple]] = {
    "SGD": {"momentum": (0.0, 0.9), "dampening": (0.0, 0.3), "nesterov": (False, True), **REGULAR},
    "Adam": {"amsgrad": (False, True), "decoupled_weight_decay": (False, True), **REGULAR},
    "AdamW": {"amsgrad": (False, True), **REGULAR},
    "NAdam": {"decoupled_weight_decay": (False, True), **REGULAR},
    "RMSprop": {"momentum": (0.0, 0.9), "centered": (False, True), **REGULAR},
    "Adagrad": {"lr_decay": (0.0, 0.1), "initial_accumulator_value": (0.0, 0.5), **REGULAR},
    "Adadelta": {"rho": (0.9, 0.5), **REGULAR},
}
COUNTS = ("step", "mu_product")
LR = {"SGD": 0.1, "Adadelta": 1.0}


def flag_combinations(name: str) -> Iterator[dict[str, Any]]:
    """Every combination of a class's flags that torch allows."""
    for values in product(*FLAGS[name].values()):
        flags = dict(zip(FLAGS[name], values, strict=True))
        if flags.get("nesterov") and (flags["momentum"] == 0 or flags["dampening"] != 0):
            continue
        yield flags


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)) for shape in shapes]


def copies(params: list[nn.Parameter], dtype: torch.dtype | None = None) -> list[nn.Parameter]:
    """Parameters of the same values and strides."""
    return [nn.Parameter(p.detach().to(dtype or p.dtype, copy=True)) for p in params]


def set_gradients(step: int, *lists: list[nn.Parameter], scale: float = 1.0) -> None:
    """The random gradients of that step, drawn in the first list's dtype, to parallel lists of parameters."""
    generator = torch.Generator().manual_seed(1000 + step)
    for params in zip(*lists, strict=True):
        grad = (scale * torch.randn(params[0].shape, generator=generator)).to(params[0].dtype)
        for param in params:
            param.grad = torch.empty_like(param).copy_(grad)


def ours(name: str) -> type[torch.optim.Optimizer]:
    return getattr(optim, name)


def theirs(name: str) -> type[torch.optim.Optimizer]:
    return getattr(torch.optim, name)


def state_tensors(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> dict[str, Tensor]:
    """Parameters and their state, by position and name; the counts on the host, wherever the optimizer has them."""
    found: dict[str, Tensor] = {}
    for i, param in enumerate(params):
        found[f"{i}"] = param.detach()
        found |= {f"{i}.{name}": v.cpu() if name in COUNTS else v for name, v in optimizer.state[param].items()}
    return found
