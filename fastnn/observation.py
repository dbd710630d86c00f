"""The runs of a model as one call of it meets them: shapes, dtypes and paths, learned without changing anything."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from . import dispatch, functional, plans, runs
from .nn import sequential
from .nn.sequential import Sequential
from .plans import Choice
from .runs import Run

NOT_CALLED = "not called with these inputs"
FOLLOWED = "a global hook, a tracer or a patched layer class follows the single layers"
_FUSIBLE = tuple(runs._PLACES)
_EAGER, _CPU = dispatch.Path("eager"), torch.device("cpu")


@dataclass(frozen=True)
class Call:
    """A run of layers on what arrived at it: M rows, K to N features; K is 0 where there is no Linear.

    reason: why it is not fused whatever the plans are, else empty.
    """

    modules: str  # names in the model: "encoder.0-3"
    layers: tuple[str, ...]  # types
    reason: str = ""
    path: dispatch.Path = _EAGER
    M: int = 0
    N: int = 0
    K: int = 0
    dtype: torch.dtype = torch.float32  # of the computation
    device: torch.device = _CPU
    norm: str = "none"  # as in launch.Settings
    save: bool = False  # whether a backward follows
    linear_alone: bool = False
    casts: bool = False  # whether operands are of another dtype than the computation
    casts_weight: bool = False  # whether the weight is
    input_gradient: bool = False
    weight_gradient: bool = False
    bias_gradient: bool = False  # where it is a launch of its own: of a Linear alone

    def unfused(self) -> str:
        """Why it is not fused now; a Linear alone is where functional says that it gains."""
        if self.reason or len(self.layers) > 1:
            return self.reason
        several = self.weight_gradient and (self.input_gradient or self.bias_gradient)
        if not (several or self.casts_weight):
            return "alone, and at most one gradient"
        gains = functional.gains_alone(self.M, self.N, self.K, self.dtype, self.device, True)
        return "" if gains else "alone, and the library's gradients are the plan"

    def _rounds(self) -> bool:
        """Whether our kernels read operands of another dtype as they are, and none is cast (ops.settle)."""
        if not self.casts or (self.save and not self.weight_gradient):
            return False
        return plans.rounds_operands(self.M, self.N, self.K, self.dtype, self.device, self.norm, self.save)

    def choices(self) -> dict[str, Choice]:
        """The plans that the rules choose among for it now: "forward", "sums" and "gradients" of a Linear."""
        if self.reason:
            return {}
        M, N, K, dtype, device = self.M, self.N, self.K, self.dtype, self.device
        found: dict[str, Choice] = {}
        if K and not self.linear_alone:
            found["forward"] = plans.forward_choice(M, N, K, dtype, device, self.norm, self.save)
        elif K and self._rounds():
            found["forward"] = plans.forward_choice(M, N, K, dtype, device, "none", False)
        elif self.norm == "batch":
            found["forward"] = plans.statistics_choice(M, N, dtype.itemsize, device)
        if self.save and not self.linear_alone:
            found["sums"] = plans.statistics_choice(M, N, dtype.itemsize, device)
        if self.weight_gradient and (self.input_gradient or self.bias_gradient or self._rounds()):
            found["gradients"] = plans.linear_backward_choice(M, N, K, dtype, device)
        return found


def observe(model: Any, inputs: tuple[Any, ...]) -> list[Call]:
    """Calls the model once on copies of the inputs and of its buffers; each distinct call of a run, in order.

    Parameters, buffers, gradients and torch's generators are as before. Autograd and autocast are the caller's.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: model has parameters without a shape yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("model must have been called once before, got lazy modules without parameters yet")
    model = getattr(model, "_orig_mod", model)  # of torch.compile, which must not trace the observer
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[Call, None] = {}
    called = set()

    def take(owner: Sequential, part: Run | nn.Module, input: Any) -> None:
        called.add(id(owner))
        if id(owner) in names:
            call = _call_of(part, input, _place(names[id(owner)], owner, part))
            if call is not None:
                found[call] = None

    with _undisturbed(model, inputs), _observer(take), _buffers_of_its_own(model):
        model(*tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, inputs))
        reason = FOLLOWED if sequential._is_observed() else NOT_CALLED
    for name, module in model.named_modules():
        if isinstance(module, Sequential) and id(module) not in called:
            found[Call(name or "model", (type(module).__name__,), reason)] = None
    return list(found)


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
    """What torch draws within is drawn again after it, and nothing is compiled."""
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
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and its import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
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
    linear: Any = part[0] if type(part[0]) is nn.Linear else None
    normalising = [layer for layer in part if type(layer) is nn.BatchNorm1d]
    norm = runs._batch_norm(normalising[0]) if normalising else None
    weight, bias = (None, None) if linear is None else (linear.weight, linear.bias)
    dtype = functional._computation_dtype(input, weight)
    path = dispatch.path(input, dtype, *functional._features_and_tensors(input, weight, bias, norm))
    if functional._autocast_is_on(input) and any(type(layer) is nn.Softplus for layer in part):
        path = path if path.eager else dispatch.Path("eager", "autocast runs Softplus in fp32")
    mode = "none" if norm is None else "batch" if norm.training else "running"
    alone = linear is not None and mode == "none" and not any(_acts(layer) for layer in part[1:])
    linear_tensors = [] if linear is None else [t for t in (input, weight, bias) if t is not None]
    call = Call(
        place,
        layers,
        path.reason,
        path,
        M=input.numel() // max(input.shape[-1], 1),
        N=input.shape[-1] if weight is None else weight.shape[0],
        K=0 if weight is None else weight.shape[1],
        dtype=dtype,
        device=input.device,
        norm=mode,
        save=_wanted(input, weight, bias, *((norm.weight, norm.bias) if norm is not None else ())),
        linear_alone=alone,
        casts=any(tensor.dtype != dtype for tensor in linear_tensors),
        casts_weight=weight is not None and weight.dtype != dtype,
        input_gradient=_wanted(input),
        weight_gradient=_wanted(weight),
        bias_gradient=alone and _wanted(bias),
    )
    if path.eager or len(part) == 1 or runs.fits(part, input):
        return call
    strided = type(part[0]) is nn.Linear or type(part[0]) is nn.BatchNorm1d
    reason = "BatchNorm1d of an input that is not 2-D" if strided else "its input is not contiguous"
    return replace(call, reason=reason)


def _wanted(*tensors: Tensor | None) -> bool:
    """Whether a gradient by one of them will be."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _acts(layer: nn.Module) -> bool:
    """Whether it changes anything, other than Identity and a Dropout that drops nothing."""
    if type(layer) is nn.Dropout:
        return layer.training and layer.p > 0
    return type(layer) is not nn.Identity


def _unfused_reason(module: nn.Module) -> str | None:
    """Why a layer is called by itself; None where its kind is never fused."""
    kind = type(module)
    if isinstance(module, nn.SyncBatchNorm):
        return "SyncBatchNorm runs unfused"
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
