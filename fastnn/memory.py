"""How tensors lie in memory, and the device and stream that work on them goes to."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Dynamo's own guard compares dtype, device, sizes, strides and the dispatch keys (negative, conjugate and zero tensors,
# subclasses) of many tensors in one call, 60 ns each. Where torch has none, they are described one by one.
_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
TensorGuards = getattr(_guards, "TensorGuards", None)


def allocator(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """torch.empty_strided(size, strides, dtype) on that device, the current one if there are several of its kind.

    By what Inductor's code calls, 0.4 µs, where there is that: torch.empty and its kin take 0.8 to 1.2.
    """
    found = getattr(_guards, f"_empty_strided_{device.type}", None)
    if found is not None:
        return found
    return lambda size, strides, dtype: torch.empty_strided(size, strides, dtype=dtype, device=device)


def is_plain(tensor: Tensor) -> bool:
    """Whether it is what its memory holds: no negative or zero tensor, nor one that a function transform wraps."""
    return torch._C._dispatch_keys(tensor).raw_repr() in _plain_keys(tensor.device)


@functools.lru_cache(64)
def _plain_keys(device: torch.device) -> frozenset[int]:
    """What decides which code an op of torch runs, of plain tensors, made in inference mode or not."""
    found = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.append(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
    return frozenset(found)


def is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes it the current device where it is not."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie alike in memory; the strides of dimensions of one element do not count."""
    return all(m == n for size, m, n in zip(a.shape, a.stride(), b.stride(), strict=True) if size != 1)


@torch.no_grad()
def copy_in_layout(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of `tensor` that lies in memory as `like`, which is dense."""
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill their memory without gaps or overlaps, in any order of dimensions."""
    return tensor.is_contiguous() or same_layout(torch.empty_like(tensor, device="meta"), tensor)


def description(tensor: Tensor) -> tuple[Any, ...]:
    """All that decides what a kernel given the tensor's address would do."""
    strides = tensor.stride() if tensor.layout is torch.strided else None
    lazy = tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor()
    return type(tensor), tensor.dtype, tensor.device, tensor.layout, tensor.shape, strides, lazy


class Forms:
    """Dtypes, devices, sizes and strides of tensors, to see in one call whether others still have them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._descriptions = list(map(description, tensors))
        self._guards = self._guards_of(tensors)

    @staticmethod
    def _guards_of(tensors: Sequence[Tensor]) -> Any:
        if TensorGuards is None or any(tensor.layout is not torch.strided for tensor in tensors):
            return None  # the guards end the process at a compressed sparse tensor
        with torch.enable_grad():  # the guard looks at requires_grad, too, as it is where a step is called
            return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)

    def fit(self, tensors: Sequence[Tensor]) -> bool:
        if self._guards is not None and self._guards.check(*tensors):
            return True
        if list(map(description, tensors)) != self._descriptions:
            return False
        self._guards = self._guards_of(tensors)
        return True
