"""Raises where the host would wait for the device. Tensors of a CPU stand for both sides.

The host's are those that the block makes without a device or by device="cpu", as a program for a GPU makes its own,
and what is computed of such alone; all others are the device's, those that are made by a torch.device among them.
"""

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Methods and functions by name: what Python's float(), bool() and indexing call, and what sizes its result by values.
READS = {
    "item", "tolist", "numpy", "cpu", "equal", "allclose", "is_nonzero", "nonzero", "argwhere", "unique",
    "unique_consecutive", "masked_select", "__bool__", "__int__", "__float__", "__index__", "__complex__",
    "__contains__", "__array__", "__repr__", "__format__", "__reduce_ex__",
}  # fmt: skip
BACKWARDS = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)


class NoHostReads(TorchFunctionMode):
    """Sees the calls of Python, and no op within them: plain calls take the path that they take without it."""

    def __init__(self, *host: Tensor) -> None:
        """host: tensors that were the host's before."""
        super().__init__()
        # By where their memory begins, and kept, so that nothing else begins there.
        self.host = {tensor.untyped_storage().data_ptr(): tensor for tensor in host}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in BACKWARDS:
            with backward_within(self):
                return func(*args, **kwargs)
        given = _tensors((args, kwargs))
        of_device = [tensor for tensor in given if not self._is_hosts(tensor)]
        if of_device and self._reads(getattr(func, "__name__", ""), args, kwargs):
            raise RuntimeError(f"{func.__name__} reads memory of the device on the host")
        results = func(*args, **kwargs)
        moved = any(isinstance(value, torch.device) for value in (*args, *kwargs.values()))
        for tensor in _tensors(results):
            if of_device or moved:
                self.host.pop(tensor.untyped_storage().data_ptr(), None)
            else:
                self.host[tensor.untyped_storage().data_ptr()] = tensor
        return results

    def _is_hosts(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.host

    def _reads(self, name: str, args: tuple, kwargs: dict) -> bool:
        if name == "copy_":
            return self._is_hosts(args[0])
        if name == "__getitem__":
            return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1]))
        if name == "where":
            return len(args) + len(kwargs) == 1
        return name in READS or any(isinstance(value, str) and value == "cpu" for value in (*args, *kwargs.values()))


def backward_within(mode: TorchFunctionMode) -> AbstractContextManager[Any]:
    """The nodes of a backward run in the mode, which is off while a function that it has seen runs."""
    run = torch.autograd.graph._engine_run_backward

    def run_within(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run(*args, **kwargs)

    return patch.object(torch.autograd, "_engine_run_backward", run_within)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.numel()]
