"""CUDA graphs without a GPU: a step recorded as the list of its ops and kernel launches, to run again on its memory.

In `recorded_graphs()` torch.cuda's own names for a capture stand for this, so that a program written for a GPU runs as
it is, on CPU tensors and in Triton's interpreter. As of a CUDA graph,

- a number that the host had during the capture is that number at every replay: a seed, a learning rate, a count;
- a replay works on the memory of the capture, whatever has become of the tensors;
- the capture itself changes nothing: what ran to be recorded is undone, and its results are left as NaN;
- reading device memory on the host raises.

What it cannot show: memory that a graph reads stays as long as the recording, and there are no streams, no pinned
memory and no pools. A tensor is taken to be the device's, also one that a program made for the host.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from inspect import signature
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton._C.libtriton import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from fastnn import memory, recipes
from fastnn.nn import utils
from fastnn.optim import engine
from support.interpreter import WRITES, touched_bytes
from support.ops_log import ALLOCATIONS

HOST_READS = ("cpu", "numpy", "tolist")  # which on a CPU are no ops
DEPENDS_ON_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class RecordedGraph:
    """Stands for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []
        self.launches: list[str] = []  # kernels by name, in order

    def replay(self) -> None:
        with torch.no_grad():
            for do in self.work:
                do()


class Stream:
    """Stands for torch.cuda.Stream: on a CPU everything runs in the order in which it is called."""

    def wait_stream(self, stream: "Stream") -> None:
        pass


@contextmanager
def recorded_graphs() -> Iterator[None]:
    """Names of torch.cuda that a capture needs, for the time of the block."""
    assert triton.knobs.runtime.interpret, "kernels on a CPU run in Triton's interpreter"
    names: dict[str, Any] = {
        "CUDAGraph": RecordedGraph,
        "graph": record,
        "Stream": Stream,
        "stream": nullcontext,
        "current_stream": Stream,
        "synchronize": lambda: None,
    }
    with patch.multiple(torch.cuda, **names), patch.object(torch.cuda.graphs, "graph_pool_handle", lambda: (0, 0)):
        yield


@contextmanager
def record(graph: RecordedGraph, pool: object = None) -> Iterator[None]:
    """Stands for torch.cuda.graph."""
    recording = _Recording(graph)
    launches = patch.object(GridExecutor, "__call__", recording.launch(GridExecutor.__call__))
    writes: dict[str, Any] = {name: recording.write(name) for name in WRITES}
    with ExitStack() as stack:
        for module in (memory, engine, utils):
            stack.enter_context(patch.object(module, "is_capturing", lambda: True))
        # A seed drawn on the device goes to the kernels by its address.
        by_address = patch.object(recipes, "seed_arguments", lambda seed: (seed, 0))
        for context in (by_address, launches, patch.multiple(InterpreterBuilder, **writes)):
            stack.enter_context(context)
        stack.callback(recording.undo)
        for name in HOST_READS:
            stack.enter_context(patch.object(Tensor, name, recording.read(name)))
        stack.enter_context(recording)
        yield


class _Recording(TorchDispatchMode):
    """Runs what it records, ops and launches, and notes how to undo it; of fastnn's own ops it records what is inside.

    Views and allocations are not recorded: a replay finds the memory they were given.
    """

    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph, self.launching = graph, False
        self.undoing: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.launching:
            return func(*args, **kwargs)  # the interpreter's own
        namespace, name = func._schema.name.split("::")
        if namespace == "fastnn":
            with self:  # which the dispatcher left for the time of the call
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        with self:  # an op that is made of others comes whole from within one of ours
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if any(tag in DEPENDS_ON_VALUES for tag in func.tags) and not _indexes_by_position(func, args):
            raise RuntimeError(f"{name} reads device memory on the host, which a capture cannot")
        if func.is_view or name in ALLOCATIONS:
            return func(*args, **kwargs)
        given = {storage.data_ptr(): storage for storage in map(Tensor.untyped_storage, _tensors((args, kwargs)))}
        for storage in given.values():  # of all: torch's batch_norm writes statistics without its schema saying so
            self.undoing.append(partial(storage.copy_, storage.clone()))
        results = func(*args, **kwargs)
        made = [t if t.untyped_storage().data_ptr() not in given else None for t in _tensors(results)]
        self._record(func, args, kwargs, made)
        return results

    def _record(self, run: Callable, args: tuple, kwargs: dict, made: list[Tensor | None]) -> None:
        args, kwargs = tree_map_only(Tensor, _memory, (args, kwargs))
        places = [None if tensor is None else _memory(tensor) for tensor in made]

        def do() -> None:
            for place, result in zip(places, _tensors(run(*args, **kwargs)), strict=True):
                if place is not None:
                    place.copy_(result)

        self.graph.work.append(do)
        for place in places:
            if place is not None and place.is_floating_point():
                self.undoing.append(partial(place.fill_, float("nan")))

    def launch(self, execute: Callable[..., None]) -> Callable[..., None]:
        @wraps(execute)
        def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.launching = True
            try:
                execute(executor, *args, **kwargs)
                self._record(lambda *args, **kwargs: execute(executor, *args, **kwargs), args, kwargs, [])
            finally:
                self.launching = False
            self.graph.launches.append(executor.fn.__name__)

        return launch

    def write(self, name: str) -> Callable[..., Any]:
        """The interpreter's, after noting what it overwrites."""
        write = getattr(InterpreterBuilder, name)
        bind = signature(write).bind

        @wraps(write)
        def noted(*args: Any, **kwargs: Any) -> Any:
            arguments = bind(*args, **kwargs).arguments
            touched = touched_bytes(arguments.get("ptrs", arguments.get("ptr")), arguments.get("mask"))
            addresses = touched.astype(np.uint64)
            everywhere, zeros = np.ones(len(addresses), bool), np.zeros(len(addresses), np.uint8)
            before = interpreter.load(addresses, everywhere, zeros, zeros.dtype)
            self.undoing.append(partial(interpreter.store, addresses, before, everywhere))
            return write(*args, **kwargs)

        return noted

    def read(self, name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        @wraps(method)
        def read(*args: Any, **kwargs: Any) -> Any:
            if not self.launching:
                raise RuntimeError(f"{name} reads device memory on the host, which a capture cannot")
            return method(*args, **kwargs)

        return read

    def undo(self) -> None:
        for undo in reversed(self.undoing):
            undo()


def _memory(tensor: Tensor) -> Tensor:
    """The tensor's memory, apart from its autograd history and version, as a graph knows it."""
    return tensor.data


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _indexes_by_position(func: Any, args: tuple) -> bool:
    """Whether it is an indexing whose result has a known shape: by a mask it has not."""
    indices = _tensors(args[1]) if func is torch.ops.aten.index.Tensor else []
    return bool(indices) and all(index.dtype == torch.int64 for index in indices)
