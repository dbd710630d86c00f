"""How tensors lie in memory, and the device and stream that work on them goes to."""

import contextlib

import torch
from torch import Tensor


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


def copy_in_layout(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of `tensor` that lies in memory as `like`, which is dense."""
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill their memory without gaps or overlaps, in any order of dimensions."""
    return tensor.is_contiguous() or same_layout(torch.empty_like(tensor, device="meta"), tensor)
