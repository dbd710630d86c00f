"""A model's call as Dynamo traces it for a backend of ours."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._dynamo import eval_frame
from torch._dynamo.convert_frame import CatchErrorsWrapper
from torch._dynamo.types import ConvertFrameReturn, FrameAction, FrameExecStrategy
from torch._functorch.autograd_function import autograd_function_apply
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

# For the frames of a fused model alone. A hook that comes later must be seen; 24 blocks of one class, each with a break
# of the graph in it, are 24 compilations of one code; a count that a module keeps is no constant.
SETTINGS = {"skip_nnmodule_hook_guards": False, "recompile_limit": 64, "allow_unspec_int_on_nn_module": True}
RETRIES = 8
REGION = next(getattr(eval_frame, "_next_isolate_recompiles_id", iter((0,))))
_converted: list[CodeType] | None = None
_FAKE_TENSORS = logging.getLogger("torch._subclasses.fake_tensor")  # a page about what the model raises itself

Backend = Callable[[GraphModule, list[Any]], Callable[..., Any]]


def compiled_call(
    model: nn.Module, backend: Backend, failed: Callable[[Exception], Any] | None = None
) -> Callable[..., Any]:
    """The model's call, whose frames Dynamo traces for the backend under SETTINGS.

    failed: is told of what it could not trace.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    call.__code__ = call.__code__.replace()  # Dynamo keeps what it compiled with the code: one of its own

    def runnable(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        _run_checkpoints_eagerly(graph)
        return backend(graph, inputs)

    context: Any = torch._dynamo.optimize(runnable)
    eval_frame.cached_backends.pop(id(runnable), None)  # kept for resets of a backend, of which there is none here
    if hasattr(context, "_isolate_recompiles_id"):  # newer than torch 2.11: others' compilations have their own limit
        context._isolate_recompiles_id = REGION
    context.callback = _Conversion(context.callback._torchdynamo_orig_backend, context.callback.hooks, failed)
    return context(call)


def _run_checkpoints_eagerly(graph: GraphModule) -> None:
    """Dynamo's own operator for them saves all that goes in, and so raises where BatchNorm counts a batch."""
    for module in graph.modules():
        if "_checkpoint_context_fn" in getattr(module, "meta", {}):
            raise NotImplementedError("a checkpoint that selects what to save")
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            if node.target is torch.ops.higher_order.tag_activation_checkpoint:
                node.target = _checkpoint
            elif isinstance(node.target, HigherOrderOperator) and node.target is not autograd_function_apply:
                raise NotImplementedError(f"the operator {node.target.name()}")


def _checkpoint(body: GraphModule, *inputs: Any, preserve_rng_state: bool = True, **settings: Any) -> Any:
    """Its inputs come by way of the closure, from where torch.utils.checkpoint does not save them.

    What it is given says of which devices to keep the state of the generator, for the same dropout masks.
    """
    devices = dict.fromkeys(tensor.device for tensor in inputs if isinstance(tensor, Tensor))
    marks = [torch.empty(0, device=device) for device in devices]
    return checkpoint(lambda *_: body(*inputs), *marks, use_reentrant=False, preserve_rng_state=preserve_rng_state)


@contextmanager
def forgotten() -> Iterator[None]:
    """What is compiled within is forgotten after it, but of code that others have compiled."""
    global _converted
    before, _converted = _converted, []
    try:
        yield
    finally:
        for code in _converted:
            reset_code(code)
        _converted = before


class _Conversion(CatchErrorsWrapper):
    """Dynamo's conversion of a frame, under SETTINGS; entering them at every call would cost 12 µs.

    A frame that it cannot convert, as of a call with a wrong shape, runs as it is. The next one is tried again, since
    it may have been the input's fault, but RETRIES times in all.
    """

    def __init__(self, convert: Any, hooks: Any, failed: Callable[[Exception], Any] | None) -> None:
        super().__init__(convert, hooks)
        self._failures: Counter[Any] = Counter()
        self._failed = failed

    def __call__(self, frame: Any, *args: Any, **kwargs: Any) -> Any:
        if _converted is not None and not _debug_get_cache_entry_list(frame.f_code):
            _converted.append(frame.f_code)
        logged, _FAKE_TENSORS.disabled = _FAKE_TENSORS.disabled, True
        try:
            with torch._dynamo.config.patch(SETTINGS):
                return super().__call__(frame, *args, **kwargs)
        except Exception as error:  # Dynamo's, or the model's own, which raises it again as it runs
            if self._failed is not None:
                self._failed(error)
            self._failures[frame.f_code] += 1
            given_up = self._failures[frame.f_code] > RETRIES  # what has been compiled for other inputs still runs
            action = FrameAction.RUN_ONLY if given_up else FrameAction.SKIP
            strategy = FrameExecStrategy(action, action)
            return ConvertFrameReturn(frame_exec_strategy=strategy, apply_to_code=given_up)
        finally:
            _FAKE_TENSORS.disabled = logged
