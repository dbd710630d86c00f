"""fastnn.fuse: runs of layers as fused ops in any model, whatever its forward looks like."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from . import rewriting, runs
from .tracing import compiled_call

_SLOT = "_compiled_call_impl"  # what torch.nn.Module.__call__ calls where it is set, and copies and pickles leave out


def fuse(model: Any) -> Any:
    """Lets a model compute each run of its layers as one fused op, and returns the model.

    Runs are those of ``fastnn.nn.Sequential``, ``[Linear] [BatchNorm1d] [activation] [Dropout]``, found in any forward:
    modules or functions, loops, one Dropout for all layers, a Conv1d of kernel size 1 as the Linear that it is,
    BatchNorm1d between transpositions. The model remains the same object with the same modules, parameters, buffers,
    hooks and ``state_dict`` keys. Its calls are traced by Dynamo (``torch.compile``'s frontend, no code generation) at
    the first one, and again for what that one did not cover; hooks, replaced modules, ``train``, ``eval`` and ``to``
    are seen afterwards as well, a method replaced on a class is not. ``fastnn.explain`` says what is fused, and why
    not. What is not runs as before.

    Calls of the model itself are fused: ``model(x)``, not ``model.forward(x)``, nor another method. Copies and pickles
    are working models that are not fused; fuse them again.

    Args:
        model: any torch.nn.Module.

    Raises:
        TypeError: model is no torch.nn.Module, or one of ``torch.jit`` or ``torch.compile``.
        RuntimeError: model has been compiled by ``model.compile()``.
    """
    _check(model)
    if getattr(model, _SLOT) is None:
        setattr(model, _SLOT, _FusedCall(model))
    return model


def unfuse(model: Any) -> Any:
    """Undoes ``fastnn.fuse``, and returns the model.

    Raises:
        TypeError, RuntimeError: as ``fastnn.fuse``.
    """
    _check(model)
    model.__dict__.pop(_SLOT, None)
    return model


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (torch.jit.ScriptModule, torch._dynamo.OptimizedModule)):
        raise TypeError(f"model must be as it was before torch.jit or torch.compile, got {type(model).__name__}")
    if not isinstance(getattr(model, _SLOT), (_FusedCall, type(None))):
        raise RuntimeError('model must not be compiled, got one after model.compile(): use its backend="fastnn"')


class _FusedCall:
    """A model's call, compiled when it is first needed."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _is_followed():
            return self._model._call_impl(*args, **kwargs)
        if self._compiled is None:
            self._compiled = compiled_call(self._model, _fused_graph)
        return self._compiled(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """A class that copies its __dict__ itself copies None."""
        return _nothing, ()


def _is_followed() -> bool:
    """Whether someone follows the layers or, by a dispatch mode, their ops: Dynamo would skip the frame for good."""
    return torch._C._len_torch_dispatch_stack() > 0 or is_fx_symbolic_tracing() or runs.are_followed()


def _nothing() -> None:
    return None


def _fused_graph(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    rewriting.rewrite(graph, alone=True)
    return graph.forward
