"""The runs of a model as one call of it meets them: shapes, dtypes and paths, learned without changing anything."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from . import runs
from .calls import Call, call_of
from .graph_observation import graph_calls
from .nn import sequential
from .nn.sequential import Sequential
from .runs import Run

NOT_REACHED = "not called with these inputs, or where torch.compile does not trace"
FOLLOWED = "a global hook, a tracer or a patched layer class follows the single layers"
CUMULATIVE = "momentum=None takes a number from the device, where torch.compile breaks the graph"
SYNC = "SyncBatchNorm over several processes is fused in a fastnn.nn.Sequential alone"
_FUSIBLE = tuple(runs._PLACES)


def observe(model: Any, inputs: tuple[Any, ...]) -> tuple[list[Call], list[str]]:
    """Calls the model on copies of the inputs and of its buffers; each distinct call of a run, and what else to say.

    Once as it is, for its fastnn.nn.Sequentials, and once as ``fastnn.fuse`` would, for what else it holds. Parameters,
    buffers, gradients and torch's generators are as before. Autograd and autocast are the caller's.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: model has parameters without a shape yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must be as it was before torch.jit, got {type(model).__name__}")
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("model must have been called once before, got lazy modules without parameters yet")
    model = getattr(model, "_orig_mod", model)  # of torch.compile, which must not trace the observer
    names = {id(module): name for name, module in model.named_modules()}
    found, reached, notes = _sequential_calls(model, inputs, names), set[int](), list[str]()
    inside = _inside_sequentials(model)
    if not runs.are_followed() and len(inside) < len(names):
        with _undisturbed(model, inputs), _buffers_of_its_own(model):
            others, reached, notes = graph_calls(model, _copies(inputs), names)
        found |= others
    for name, module in model.named_modules():
        if id(module) not in reached | inside:
            reason = _unreached_reason(module)
            if reason:
                found[Call(name or "model", (type(module).__name__,), reason)] = None
    return list(found), notes


def _copies(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, inputs)


def _inside_sequentials(model: nn.Module) -> set[int]:
    """Of fastnn.nn.Sequentials and of those of their children that are single layers."""
    owners = [module for module in model.modules() if isinstance(module, Sequential)]
    return {
        id(module) for owner in owners for module in (owner, *owner) if module is owner or not any(module.children())
    }


def _sequential_calls(model: nn.Module, inputs: tuple[Any, ...], names: dict[int, str]) -> dict[Call, None]:
    """The calls of runs of fastnn.nn.Sequentials."""
    found: dict[Call, None] = {}
    owners = [module for module in model.modules() if isinstance(module, Sequential)]
    called = set()

    def take(owner: Sequential, part: Run | nn.Module, input: Any) -> None:
        called.add(id(owner))
        if id(owner) in names:
            call = _call_of(part, input, _place(names[id(owner)], owner, part))
            if call is not None:
                found[call] = None

    if not owners:
        return found
    with (
        _undisturbed(model, inputs),
        _observer(take),
        _buffers_of_its_own(model),
        torch.compiler.set_stance("force_eager"),
    ):
        model(*_copies(inputs))
        reason = FOLLOWED if runs.are_followed() else NOT_REACHED
    for module in owners:
        if id(module) not in called:
            found[Call(names[id(module)] or "model", (type(module).__name__,), reason)] = None
    return found


@contextmanager
def _observer(take: Any) -> Iterator[None]:
    before, sequential.observer = sequential.observer, take
    try:
        yield
    finally:
        sequential.observer = before


@contextmanager
def _buffers_of_its_own(model: nn.Module) -> Iterator[None]:
    """Copies in the place of all buffers, one for each, wherever it is registered.

    Not torch.func.functional_call: of a module registered under two names it leaves the copies behind.
    """
    places = [(module, name) for module in model.modules() for name in module._buffers]
    before = [(module, name, module._buffers[name]) for module, name in places]
    copies = {id(buffer): buffer.clone() for _, _, buffer in before if buffer is not None}
    try:
        for module, name, buffer in before:
            module._buffers[name] = copies.get(id(buffer))
        yield
    finally:
        for module, name, buffer in before:
            module._buffers[name] = buffer


@contextmanager
def _undisturbed(model: nn.Module, inputs: tuple[Any, ...]) -> Iterator[None]:
    """What torch draws within is drawn again after it."""
    tensors = [*model.parameters(), *model.buffers(), *(t for t in tree_leaves(inputs) if isinstance(t, Tensor))]
    devices = {tensor.device for tensor in tensors}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        kinds = {device.type for device in devices}
        if "mps" in kinds:  # one device, whose functions take no index
            stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
        for kind in kinds - {"cpu", "meta", "mps"}:
            of_kind = [device.index for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=of_kind, device_type=kind))
        yield


def _place(owner: str, sequence: Sequential, part: Run | nn.Module) -> str:
    """Where the part stands, by names in the model."""
    layers = part if isinstance(part, tuple) else (part,)
    children = list(sequence._modules.items())
    for start in range(len(children)):
        here = children[start : start + len(layers)]
        if len(here) == len(layers) and all(a is b for (_, a), b in zip(here, layers, strict=True)):
            first, last = here[0][0], here[-1][0]
            return (f"{owner}." if owner else "") + (first if len(layers) == 1 else f"{first}-{last}")
    raise AssertionError("a part of a Sequential is a slice of its children")


def _call_of(part: Run | nn.Module, input: Any, place: str) -> Call | None:
    """None where the part is a module of a kind that is never fused."""
    if not isinstance(part, tuple):
        reason = _unfused_reason(part)
        return None if reason is None else Call(place, (type(part).__name__,), reason)
    layers = tuple(type(layer).__name__ for layer in part)
    if not isinstance(input, Tensor) or input.layout is not torch.strided or input.is_nested:
        return Call(place, layers, "its input is no plain strided tensor")
    if input.dim() < 2:
        return Call(place, layers, f"its input is {input.dim()}-D")
    weight, bias, norm, activation, _, p = runs.arguments_of(part)
    call = call_of(place, layers, input, weight, bias, norm, activation, p)
    if call.path.eager or len(part) == 1 or runs.fits(part, input):
        return call
    reason = "its input is not contiguous" if weight is norm is None else "BatchNorm of an input that is not 2-D"
    return replace(call, reason=reason)


def _unreached_reason(module: nn.Module) -> str:
    """Why a layer is in no run though no graph holds it; empty where its kind is never fused."""
    if isinstance(module, nn.SyncBatchNorm):
        return SYNC
    if not isinstance(module, (nn.Linear, nn.BatchNorm1d)):
        return ""
    if runs.are_followed():
        return FOLLOWED
    tracks = isinstance(module, nn.BatchNorm1d) and module.track_running_stats and module.training
    return CUMULATIVE if tracks and module.momentum is None else NOT_REACHED


def _unfused_reason(module: nn.Module) -> str | None:
    """Why a layer is called by itself; None where its kind is never fused."""
    kind = type(module)
    if not isinstance(module, _FUSIBLE):
        return None
    if kind not in _FUSIBLE:
        base = next(base.__name__ for base in kind.__mro__ if base in _FUSIBLE)
        return f"a subclass of {base}, which may compute something else"
    if "forward" in module.__dict__:
        return "its forward is patched"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks):
        return "it has a hook"
    if getattr(module, "inplace", False):
        return "in place, it changes the input of the run that it begins"
    return "nothing beside it to fuse with"
