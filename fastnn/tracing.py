"""A model's call as Dynamo traces it for a backend of ours."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.convert_frame import CatchErrorsWrapper
from torch._dynamo.types import ConvertFrameReturn, FrameAction, FrameExecStrategy
from torch.fx import GraphModule

# For the frames of a fused model alone. A hook that comes later must be seen; 24 blocks of one class, each with a break
# of the graph in it, are 24 compilations of one code.
SETTINGS = {"skip_nnmodule_hook_guards": False, "recompile_limit": 64}
RETRIES = 8

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
    context: Any = torch._dynamo.optimize(backend)
    context.callback = _Conversion(context.callback._torchdynamo_orig_backend, context.callback.hooks, failed)
    return context(call)


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
