"""The grammar of a fusible run of layers: [Linear] [BatchNorm1d] [activation] [Dropout], two or more, in this order."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from . import functional
from .activations import ACTIVATIONS
from .reference import BatchNorm

LINEAR, BATCH_NORM, ACTIVATION, DROPOUT = range(4)
# Exact types only: a subclass may compute something else.
_PLACES: dict[type, int] = {nn.Linear: LINEAR, nn.BatchNorm1d: BATCH_NORM, nn.Dropout: DROPOUT}
_PLACES.update({row.module: ACTIVATION for row in ACTIVATIONS.values()})


class Run(NamedTuple):
    """The layers of one run, None where there is none; `layers` in order."""

    layers: tuple[nn.Module, ...]
    linear: nn.Linear | None = None
    batch_norm: nn.BatchNorm1d | None = None
    activation: nn.Module | None = None
    dropout: nn.Dropout | None = None


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward: no hook on it, no forward patched onto the instance."""
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def split(modules: Iterable[nn.Module]) -> Iterator[Run | nn.Module]:
    """The modules in order, each fusible run of two or more as a Run, every other module as it is."""
    layers: list[nn.Module] = []
    places: list[int] = []
    for module in modules:
        place = _PLACES.get(type(module))
        if place is None or not is_plain(module):
            yield from _close(layers, places)
            layers, places = [], []
            yield module
            continue
        if places and place <= places[-1]:
            yield from _close(layers, places)
            layers, places = [], []
        layers.append(module)
        places.append(place)
    yield from _close(layers, places)


def _close(layers: list[nn.Module], places: list[int]) -> Iterator[Run | nn.Module]:
    # A run that begins with an in-place activation changes its input, which the caller may look at.
    if len(layers) < 2 or (places[0] == ACTIVATION and getattr(layers[0], "inplace", False)):
        yield from layers
        return
    by_place: list[nn.Module | None] = [None] * 4
    for place, layer in zip(places, layers, strict=True):
        by_place[place] = layer
    yield Run(tuple(layers), *by_place)


def _activation(module: nn.Module | None) -> tuple[str, tuple[float, float]]:
    for name, row in ACTIVATIONS.items():
        if type(module) is row.module:
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
    if not isinstance(input, Tensor):
        return False
    return input.dim() == 2 or (input.dim() > 2 and run.batch_norm is None)


def apply(run: Run, input: Tensor) -> Tensor:
    """The run as one call."""
    linear, dropout = run.linear, run.dropout
    name, arguments = _activation(run.activation)
    return functional.linear_batch_norm_act_dropout(
        input,
        None if linear is None else linear.weight,
        None if linear is None else linear.bias,
        batch_norm=_batch_norm(run.batch_norm),
        activation=name,
        activation_args=arguments,
        p=0.0 if dropout is None else dropout.p,
        training=dropout is not None and dropout.training,
    )
