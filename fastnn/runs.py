"""The grammar of a fusible run of layers: [Linear] [BatchNorm1d | SyncBatchNorm] [activation] [Dropout], in this order.

Two or more of them, or a Linear alone where its gradients are one launch, or its operands need no casts.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import functional
from .activations import ACTIVATIONS
from .reference import BatchNorm

NOWHERE, LINEAR, BATCH_NORM, ACTIVATION, DROPOUT = range(-1, 4)
# Exact types only: a subclass may compute something else.
_PLACES: dict[Any, int] = {nn.Linear: LINEAR, nn.BatchNorm1d: BATCH_NORM, nn.Dropout: DROPOUT}
_PLACES[nn.SyncBatchNorm] = BATCH_NORM
_PLACES.update({row.module: ACTIVATION for row in ACTIVATIONS.values()})
_ROWS = {
    row.module: [item for item in ACTIVATIONS.items() if item[1].module is row.module] for row in ACTIVATIONS.values()
}

_MODULES = list(_PLACES)
_FORWARDS = [module.forward for module in _MODULES]

Run = tuple[nn.Module, ...]


def are_followed() -> bool:
    """Whether someone follows the single layers: a hook on all modules, a tracer, an exporter, a patched class."""
    if _has_any_global_hook():
        return True
    if torch.compiler.is_compiling():
        return torch.compiler._is_exporting_flag  # is_exporting() is True to torch 2.11's Dynamo, always
    return torch.jit.is_tracing() or [module.forward for module in _MODULES] != _FORWARDS  # 13: 0.3 µs


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
    if not run:
        return
    first = type(run[0])
    # One that begins with an in-place activation changes its input, one with Identity may return it: the caller's.
    if first is not nn.Linear and (len(run) == 1 or first is nn.Identity or getattr(run[0], "inplace", False)):
        parts.extend(run)
    else:
        parts.append(tuple(run))


def _activation(module: nn.Module) -> tuple[str, tuple[float, float]]:
    """Name and arguments of the row the module is; a GELU may be either of two."""
    for name, row in _ROWS[type(module)]:
        arguments = row.parameters(module)
        if arguments is not None:
            return name, arguments
    raise RuntimeError(f"approximate must be 'none' or 'tanh', got {module.approximate!r}")


def _tensor(module: nn.Module, kind: str, name: str) -> Tensor | None:
    """module.name, a fifth of whose 0.5 µs it takes to look where it nearly always is."""
    state = module.__dict__
    return state[kind][name] if name in state[kind] and name not in state else getattr(module, name)


def _process_group(module: Any) -> Any:
    """Of a SyncBatchNorm that normalises the batch of several processes."""
    if not (module.training and dist.is_available() and dist.is_initialized()):
        return None
    group = module.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _batch_norm(module: nn.BatchNorm1d | nn.SyncBatchNorm) -> BatchNorm:
    """The arguments torch.nn.BatchNorm1d.forward would call batch_norm with."""
    training, tracks = module.training, module.track_running_stats
    mean, var, counter = None, None, None
    if tracks or not training:
        mean, var = _tensor(module, "_buffers", "running_mean"), _tensor(module, "_buffers", "running_var")
        if training:
            counter = _tensor(module, "_buffers", "num_batches_tracked")
        else:
            training = mean is None and var is None
    weight, bias = _tensor(module, "_parameters", "weight"), _tensor(module, "_parameters", "bias")
    group = _process_group(module) if type(module) is nn.SyncBatchNorm else None
    return BatchNorm(mean, var, weight, bias, counter, training, module.momentum, module.eps, group)


def fits(run: Run, input: object) -> bool:
    """Whether the run may be applied to what arrived; where not, its layers are called one by one."""
    if not isinstance(input, Tensor) or input.layout is not torch.strided or input.is_nested:
        return False
    dimensions = input.dim()
    if dimensions == 2 and type(run[0]) is nn.Linear:
        return True
    if dimensions < 2:
        return False
    if _PLACES[type(run[0])] == ACTIVATION:
        return input.is_contiguous()  # torch's elementwise layers keep the strides, ours write rows
    return dimensions == 2 or not any(_PLACES[type(layer)] == BATCH_NORM for layer in run)


def apply(run: Run, input: Tensor) -> Tensor:
    """The run as one call."""
    weight, bias, batch_norm, activation, arguments, p = arguments_of(run)
    return functional.linear_batch_norm_act_dropout(
        input, weight, bias, batch_norm=batch_norm, activation=activation, activation_args=arguments, p=p
    )


def arguments_of(run: Run) -> tuple[Tensor | None, Tensor | None, BatchNorm | None, str, tuple[float, float], float]:
    """weight, bias, batch_norm, activation, its arguments and p, as linear_batch_norm_act_dropout takes them."""
    weight = bias = batch_norm = None
    activation, arguments, p = "identity", (0.0, 0.0), 0.0
    for layer in run:
        place = _PLACES[type(layer)]
        if place == LINEAR:
            weight, bias = _tensor(layer, "_parameters", "weight"), _tensor(layer, "_parameters", "bias")
        elif place == BATCH_NORM:
            batch_norm = _batch_norm(layer)  # type: ignore[arg-type]
        elif place == ACTIVATION:
            activation, arguments = _activation(layer)
        elif layer.training:
            p = layer.p  # type: ignore[assignment]
    return weight, bias, batch_norm, activation, arguments, p
