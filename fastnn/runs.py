"""The grammar of a fusible run of layers: [Linear] [BatchNorm1d] [activation] [Dropout], in this order.

Two or more of them, or a Linear alone where its gradients are one launch, or its operands need no casts.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .activations import ACTIVATIONS
from .reference import BatchNorm

NOWHERE, LINEAR, BATCH_NORM, ACTIVATION, DROPOUT = range(-1, 4)
# Exact types only: a subclass may compute something else.
_PLACES: dict[Any, int] = {nn.Linear: LINEAR, nn.BatchNorm1d: BATCH_NORM, nn.Dropout: DROPOUT}
_PLACES.update({row.module: ACTIVATION for row in ACTIVATIONS.values()})
_ROWS = {
    row.module: [item for item in ACTIVATIONS.items() if item[1].module is row.module] for row in ACTIVATIONS.values()
}

_FORWARDS: list[tuple[Any, Any]] = [(module, module.forward) for module in _PLACES]

Run = tuple[nn.Module, ...]


def are_patched() -> bool:
    """Whether someone replaced the forward of a class of layers, as instrumentation does."""
    return any(module.forward is not forward for module, forward in _FORWARDS)  # a loop of 13 costs 0.5 µs


def split(modules: Iterable[nn.Module]) -> list[Run | nn.Module]:
    """The modules in order: each fusible run as a tuple (of two or more, or a Linear), every other module as it is.

    A module belongs to a run if calling it is calling its class's forward: no hook on it, and no forward patched onto
    the instance. Asked at every call, as either may change; written as one loop because it is (2 µs for 12 modules).
    """
    parts: list[Run | nn.Module] = []
    run: list[nn.Module] = []
    last = DROPOUT
    for module in modules:
        place = _PLACES.get(type(module), NOWHERE)
        state = module.__dict__
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
        ):
            place = NOWHERE
        if place <= last:
            _close(run, parts)
            run = []
        if place == NOWHERE:
            parts.append(module)
            last = DROPOUT
        else:
            run.append(module)
            last = place
    _close(run, parts)
    return parts


def _close(run: list[nn.Module], parts: list[Run | nn.Module]) -> None:
    # One that begins with an in-place activation changes its input, one with Identity may return it: the caller's.
    alone = len(run) == 1 and type(run[0]) is not nn.Linear
    if not run or alone or type(run[0]) is nn.Identity or getattr(run[0], "inplace", False):
        parts.extend(run)
    else:
        parts.append(tuple(run))


def _activation(module: nn.Module | None) -> tuple[str, tuple[float, float]]:
    """Name and arguments of the row the module is; a GELU may be either of two."""
    for name, row in () if module is None else _ROWS[type(module)]:
        arguments = row.parameters(module)
        if arguments is not None:
            return name, arguments
    return "identity", (0.0, 0.0)


def _batch_norm(module: nn.BatchNorm1d | None) -> BatchNorm | None:
    """The arguments torch.nn.BatchNorm1d.forward would call batch_norm with."""
    if module is None:
        return None
    mean, var, weight, bias = module.running_mean, module.running_var, module.weight, module.bias
    if module.training and not module.track_running_stats:
        mean = var = None
    training = module.training or (mean is None and var is None)
    counter = module.num_batches_tracked if module.training and module.track_running_stats else None
    return BatchNorm(mean, var, weight, bias, counter, training, module.momentum, module.eps)


def fits(run: Run, input: object) -> bool:
    """Whether the run may be applied to what arrived; where not, its layers are called one by one."""
    if not isinstance(input, Tensor) or input.layout is not torch.strided or input.is_nested or input.dim() < 2:
        return False
    if len(run) == 1:
        linear: Any = run[0]
        return functional.is_linear_served(input, linear.weight, linear.bias)
    if _PLACES[type(run[0])] == ACTIVATION:
        return input.is_contiguous()  # torch's elementwise layers keep the strides, ours write rows
    return input.dim() == 2 or not any(type(layer) is nn.BatchNorm1d for layer in run)


def apply(run: Run, input: Tensor) -> Tensor:
    """The run as one call."""
    by_place: list[Any] = [None] * 4
    for layer in run:
        by_place[_PLACES[type(layer)]] = layer
    linear, batch_norm, activation, dropout = by_place
    name, arguments = _activation(activation)
    return functional.linear_batch_norm_act_dropout(
        input,
        None if linear is None else linear.weight,
        None if linear is None else linear.bias,
        batch_norm=_batch_norm(batch_norm),
        activation=name,
        activation_args=arguments,
        p=0.0 if dropout is None else dropout.p,
        training=dropout is not None and dropout.training,
    )
