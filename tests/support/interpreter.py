"""What kernels do in Triton's interpreter: the bytes they touch, and whether the order of programs matters. Its speed.

For processes in which TRITON_INTERPRET=1 was set before the kernels were imported, with tensors on the CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from inspect import signature
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import triton
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, interpreter_builder

# Loads and stores without a mask, by block pointer or by descriptor all end in the masked ones.
READS = ("create_masked_load", "create_atomic_rmw", "create_atomic_cas")
WRITES = ("create_masked_store", "create_atomic_rmw", "create_atomic_cas")

Touched = tuple[np.ndarray, np.ndarray]  # byte addresses in ascending order, how often each was touched
NOTHING = np.empty(0, np.int64)


@dataclass(frozen=True)
class Bytes:
    """Bytes that unmasked lanes touched in one launch: `read` and `written` count each address once."""

    read: int
    total_read: int
    written: int
    total_written: int


@dataclass(frozen=True)
class TensorBytes(Bytes):
    """The bytes of one tensor. The gaps of a strided view are not part of it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Launch:
    """One launch. Of tensors that overlap (an operation in place) each counts the bytes they share."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, TensorBytes]  # the tensors given to the kernel, by parameter
    named: dict[str, TensorBytes]  # the tensors given to `count_accesses`
    everything: Bytes
    elsewhere: Bytes  # in none of these tensors: through a table of pointers, or out of bounds


@dataclass
class Accesses:
    """The launches of a `count_accesses` block, in order; each is there as soon as it has run."""

    launches: list[Launch] = field(default_factory=list)

    def of(self, name: str) -> list[TensorBytes]:
        """The bytes of a named tensor, launch by launch."""
        return [launch.named[name] for launch in self.launches]

    def shaped(self, *shape: int) -> list[TensorBytes]:
        """The bytes of all arguments of this shape, in the order of launches and parameters."""
        arguments = [argument for launch in self.launches for argument in launch.arguments.values()]
        return [argument for argument in arguments if argument.shape == shape]


def without_waste() -> None:
    """Leaves out what Triton's interpreter does over and over to no effect: half its time.

    It puts its functions into triton.language anew in each call of a device function, a millisecond each; computes for
    each sum of integers in int64 whether it overflows, for an assertion that is on in debug mode only; and makes a
    table of dtypes whenever it looks one up.
    """
    options = interpreter_builder.options
    if not options.debug:
        interpreter_builder.options = replace(options, sanitize_overflow=False)
    dtype_of, dtypes = interpreter._get_np_dtype, {}  # by name of the scalar

    def known_dtype(type_: Any) -> np.dtype:
        name = type_.scalar.name
        if name not in dtypes:
            dtypes[name] = dtype_of(type_)
        return dtypes[name]

    interpreter._get_np_dtype = known_dtype
    put, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    scopes: dict[int, Any] = {}  # of this launch, by the namespace that names triton.language

    def put_once(function: Any) -> Any:
        place = id(function.__globals__)
        if place not in scopes:
            scopes[place] = put(function)
        return scopes[place]

    def restore_all(scope: Any) -> None:  # at a launch's end
        scopes.clear()
        restore(scope)

    interpreter._patch_lang = put_once
    interpreter._LangPatchScope.restore = restore_all


@contextmanager
def count_accesses(tensors: dict[str, torch.Tensor] | None = None) -> Iterator[Accesses]:
    """Counts the bytes that every launch in the block reads and writes. Atomics do both."""
    _need_interpreter()
    recorder = _Recorder(tensors or {})
    launch = patch.object(GridExecutor, "__call__", recorder.launch(GridExecutor.__call__))
    accesses: dict[str, Any] = {name: recorder.access(name) for name in READS + WRITES}
    with launch, patch.multiple(InterpreterBuilder, **accesses):
        yield recorder.accesses


@contextmanager
def shuffled_grid(seed: int) -> Iterator[None]:
    """Runs the programs of every launch once each, in a random order that is never the ordinary one."""
    _need_interpreter()
    random = np.random.default_rng(seed)
    set_dim, set_idx = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx
    order: dict[tuple[int, ...], tuple[int, ...]] = {}

    def shuffle(builder: Any, *grid: int) -> None:
        programs = list(np.ndindex(*grid))
        shuffled = programs
        while shuffled == programs and len(programs) > 1:
            shuffled = [programs[place] for place in random.permutation(len(programs))]
        order.update(zip(programs, shuffled, strict=True))
        set_dim(builder, *grid)

    def replace(builder: Any, *program: int) -> None:
        set_idx(builder, *order[program])

    with patch.multiple(InterpreterBuilder, set_grid_dim=shuffle, set_grid_idx=replace):
        yield


def _need_interpreter() -> None:
    if not triton.knobs.runtime.interpret:
        pytest.skip("programs and their accesses are seen in Triton's interpreter only")


class _Recorder:
    """Wraps the interpreter, collects the accesses of the running launch and records it at its end."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.accesses = Accesses()
        self.reads: list[np.ndarray] = []
        self.writes: list[np.ndarray] = []

    def launch(self, execute: Callable[..., None]) -> Callable[..., None]:
        @wraps(execute)
        def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.reads, self.writes = [], []
            execute(executor, *args, **kwargs)
            kwargs = {name: value for name, value in kwargs.items() if name in executor.arg_names}
            arguments = signature(executor.fn).bind(*args, **kwargs).arguments
            self.accesses.launches.append(self._record(executor.fn.__name__, arguments))

        return launch

    def access(self, name: str) -> Callable[..., Any]:
        access = getattr(InterpreterBuilder, name)
        bind = signature(access).bind

        @wraps(access)
        def record(*args: Any, **kwargs: Any) -> Any:
            arguments = bind(*args, **kwargs).arguments
            touched = touched_bytes(arguments.get("ptrs", arguments.get("ptr")), arguments.get("mask"))
            self.reads += [touched] * (name in READS)
            self.writes += [touched] * (name in WRITES)
            return access(*args, **kwargs)

        return record

    def _record(self, kernel: str, arguments: dict[str, Any]) -> Launch:
        reads, writes = _merge(self.reads), _merge(self.writes)
        given = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        tensors = (*given.values(), *self.tensors.values())
        known = np.concatenate([NOTHING, *map(_addresses, tensors)])
        return Launch(
            kernel,
            interpreter_builder.grid_dim,
            {name: _of_tensor(name, tensor, reads, writes) for name, tensor in given.items()},
            {name: _of_tensor(name, tensor, reads, writes) for name, tensor in self.tensors.items()},
            Bytes(*_sizes(reads), *_sizes(writes)),
            Bytes(*_sizes(reads, known, invert=True), *_sizes(writes, known, invert=True)),
        )


def touched_bytes(pointers: Any, mask: Any) -> np.ndarray:
    """Addresses of all bytes that the lanes under the mask touch, repetitions included."""
    # Triton 3.6 masks block pointers and descriptors with bare arrays: their .data is a buffer, not an array.
    active = True if mask is None else np.asarray(mask.data, dtype=bool)
    addresses, active = np.broadcast_arrays(pointers.data, active)
    size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
    return _spread(addresses[active].astype(np.int64), size)


def _spread(addresses: np.ndarray, size: int) -> np.ndarray:
    return (addresses[:, None] + np.arange(size)).ravel()


def _merge(pieces: list[np.ndarray]) -> Touched:
    return np.unique(np.concatenate([NOTHING, *pieces]), return_counts=True)


def _sizes(touched: Touched, of: np.ndarray | None = None, invert: bool = False) -> tuple[int, int]:
    """How many bytes were touched, once and in total, of those in `of` or not in it."""
    addresses, times = touched
    inside = slice(None) if of is None else np.isin(addresses, of, invert=invert)
    return len(addresses[inside]), int(times[inside].sum())


def _addresses(tensor: torch.Tensor) -> np.ndarray:
    if tensor.numel() == 0:
        return NOTHING
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    elements = torch.arange(extent).as_strided(tensor.shape, tensor.stride()).flatten().numpy()
    return _spread(tensor.data_ptr() + elements * tensor.element_size(), tensor.element_size())


def _of_tensor(name: str, tensor: torch.Tensor, reads: Touched, writes: Touched) -> TensorBytes:
    own = _addresses(tensor)
    return TensorBytes(*_sizes(reads, own), *_sizes(writes, own), name, tuple(tensor.shape), tensor.dtype)
