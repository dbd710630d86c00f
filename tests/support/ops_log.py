"""The ops that PyTorch would run on a GPU, listed without one: meta tensors stand for those of a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastnn import dispatch, ops, seeds

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
READ_BY_THE_HOST = ("item",)  # a copy, no kernel
OVERWRITES = ("copy_", "fill_", "zero_")  # in place without reading what was there
Operand = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Op:
    """An op that launches at least one kernel: shapes and dtypes of what it must read and write, each once."""

    name: str
    reads: tuple[Operand, ...]
    writes: tuple[Operand, ...]


class OpsLog(TorchDispatchMode):
    """Lists the ops on tensors of `device`, but for views and allocations; of fastnn's own ops those inside them.

    An op of a list of tensors counts once. Triton's launches are no ops: support/ahead_of_time.py lists them.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device, self.ops = device, list[Op]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        if namespace == "fastnn":
            with self:  # which the dispatcher left for the time of the call
                return getattr(ops, "_" + name)(*args, **kwargs)
        results = func(*args, **kwargs)
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        tensors = {argument: self._of_device(value) for argument, value in given.items()}
        made = [t for t in self._of_device(results) if not any(t is g for ts in tensors.values() for g in ts)]
        if not func.is_view and name not in ALLOCATIONS + READ_BY_THE_HOST and (made or any(tensors.values())):
            changed = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            unread = [a for a in changed if a == "out" or name in OVERWRITES]
            read = [t for argument, ts in tensors.items() if argument not in unread for t in ts]
            written = made + [t for argument in changed for t in tensors.get(argument, [])]
            self.ops.append(Op(name, _operands(read), _operands(written)))
        return results

    def _of_device(self, values: Any) -> list[Tensor]:
        return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.device.type == self.device]

    def accesses(self, *shapes: tuple[int, ...], masks: bool = False) -> int:
        """Operands of these shapes, read or written; masks: those of bool, else all others."""
        operands = [operand for op in self.ops for operand in (*op.reads, *op.writes)]
        return sum(shape in shapes and (dtype == torch.bool) == masks for shape, dtype in operands)


def _operands(tensors: list[Tensor]) -> tuple[Operand, ...]:
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)


def _native_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, training)[0] if training and 0 < p < 1 else input


@contextmanager
def paths_of_a_gpu() -> Iterator[None]:
    """Tensors of any device take the kernels, and F.dropout the op it is on a GPU.

    There it is torch.native_dropout, one op, where a CPU (and meta) has it made of three.
    """
    with (
        patch.object(dispatch, "device_path", lambda device: dispatch.Path("triton")),
        patch.object(F, "dropout", _native_dropout),
    ):
        yield


@contextmanager
def ops_of_a_gpu() -> Iterator[None]:
    """The same, and a dropout seed comes without an op: from the generator on the host, where a CPU draws it."""
    with paths_of_a_gpu(), patch.object(seeds, "dropout_seed", lambda device: torch.tensor(0)):
        yield
