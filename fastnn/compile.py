"""The backend of torch.compile(model, backend="fastnn"), found through the package's entry point."""

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import lookup_backend
from torch.fx import GraphModule

from . import rewriting


def fastnn(
    graph: GraphModule, inputs: list[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Rewrites the runs of layers in Dynamo's graph as ``fastnn.fuse`` does, and hands all of it to Inductor.

    mode, options: Inductor's, as ``torch.compile`` takes them.
    """
    rewriting.rewrite(graph, alone=False)
    settings = {**(torch._inductor.list_mode_options(mode) if mode else {}), **(options or {})}
    inductor: Any = lookup_backend("inductor")
    return inductor(graph, inputs, config_patches=settings)
