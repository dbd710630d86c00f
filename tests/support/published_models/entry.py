"""What the zoo says of a model: how to make it, what it is called with, and which runs it holds."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]


class Run(NamedTuple):
    """A maximal run of [Linear] [BatchNorm1d] [activation] [Dropout] in a training forward, two or more of them.

    modules are those called for it, by the names they are called by, as a shared one has several; a functional is part
    of layers alone. layers name activations as fastnn.activations does. A module that is called twice is in two runs.
    """

    modules: tuple[str, ...]
    layers: tuple[str, ...]


def in_order(inputs: Inputs, order: Tensor) -> Inputs:
    return tuple(t[order] for t in inputs)


class Published(NamedTuple):
    """A model in the style of published code.

    inputs(seed): tensors whose first dimension is the batch. runs: in the order in which their last layers are called.
    permuted(inputs, order): the same batch in that order. A probability that a functional takes is an attribute
    `dropout`, so that tests may set it to 0.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    runs: tuple[Run, ...]
    permuted: Callable[[Inputs, Tensor], Inputs] = in_order


def normal(*shapes: tuple[int, ...]) -> Callable[[int], Inputs]:
    def inputs(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(shape, generator=generator) for shape in shapes)

    return inputs


def indices(seed: int, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1000 + seed))


def mlp(widths: tuple[int, ...], norm: bool = True, bias: bool = True, p: float | None = None) -> list[nn.Module]:
    """Linear, BatchNorm1d, ReLU and Dropout for each pair of widths."""
    layers: list[nn.Module] = []
    for K, N in pairwise(widths):
        layers.append(nn.Linear(K, N, bias=bias))
        if norm:
            layers.append(nn.BatchNorm1d(N))
        layers.append(nn.ReLU())
        if p is not None:
            layers.append(nn.Dropout(p))
    return layers


def under(prefix: str, *names: object) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names)


LINEAR_ACT = ("Linear", "relu")
NORM_ACT = ("BatchNorm1d", "relu")
CONV_NORM_ACT = ("Conv1d", "BatchNorm1d", "relu")
LINEAR_NORM = ("Linear", "BatchNorm1d")
LINEAR_NORM_ACT = ("Linear", "BatchNorm1d", "relu")
WHOLE = ("Linear", "BatchNorm1d", "relu", "dropout")
