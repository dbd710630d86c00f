"""Bytes that an optimizer's step moves per parameter, and its launches; prints these figures as JSON rows.

For processes in which TRITON_INTERPRET=1 was set before the kernels were imported, with tensors on the CPU.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from support.figures import Row, counted
from support.interpreter import count_accesses, without_waste
from support.ops_log import Op, OpsLog
from support.optimizers import SEVEN, ours, parameters, set_gradients, theirs

SHAPES: list[tuple[int, ...]] = [(3, 5), (1030,), (2048,), (7,)]
ELEMENTS = 15 + 1030 + 2048 + 7
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_NORM = 1.0


@dataclass(frozen=True)
class Step:
    """Bytes of parameters, gradients and states; rereads are second reads or writes within a launch."""

    read: int
    written: int
    rereads: int
    launches: list[str]

    @property
    def per_parameter(self) -> float:
        return (self.read + self.written) / ELEMENTS


def tensors_of(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> dict[str, Tensor]:
    """Parameters, gradients and the states of their shape."""
    found: dict[str, Tensor] = {f"param {i}": param for i, param in enumerate(params)}
    found |= {f"grad {i}": param.grad for i, param in enumerate(params) if param.grad is not None}
    for i, param in enumerate(params):
        state = optimizer.state.get(param, {})
        found |= {f"{name} {i}": value for name, value in state.items() if value.shape == param.shape}
    return found


def count_launches(tensors: dict[str, Tensor], act: Callable[[], Any]) -> Step:
    """What the launches of `act` do to these tensors."""
    with count_accesses(tensors) as counted_:
        act()
    of = [bytes_ for launch in counted_.launches for bytes_ in launch.named.values()]
    return Step(
        sum(b.read for b in of),
        sum(b.written for b in of),
        sum(b.total_read - b.read + b.total_written - b.written for b in of),
        [launch.kernel for launch in counted_.launches],
    )


def count_step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> Step:
    """Of a step whose state is there already."""
    return count_launches(tensors_of(optimizer, params), optimizer.step)


def our_step(name: str, dtype: torch.dtype = torch.float32, **flags: Any) -> Step:
    """The second step of ours on SHAPES."""
    params = parameters(SHAPES, dtype)
    optimizer = ours(name)(params, **flags)
    set_gradients(0, params)
    optimizer.step()
    return count_step(optimizer, params)


def eager_step(name: str, dtype: torch.dtype, clipped: bool) -> tuple[float, int]:
    """(bytes per parameter, launches) of torch's foreach step, at least: its ops read and write their operands once.

    On meta tensors; step counts lie on the CPU, as in torch's default, and are not counted. Clipping refuses meta
    tensors, and is counted on those of a CPU.
    """
    logs: list[Op] = []
    make: Any = theirs(name)
    for device in ("meta", "cpu") if clipped else ("meta",):
        params = [nn.Parameter(torch.empty(shape, dtype=dtype, device=device)) for shape in SHAPES]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer = make(params, foreach=True)
        optimizer.step()
        with OpsLog(device) as log:
            if device == "meta":
                optimizer.step()
            else:
                torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        logs += log.ops
    operands = [operand for op in logs for operand in (*op.reads, *op.writes)]
    moved = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in operands if shape in SHAPES)
    return moved / ELEMENTS, len(logs)


def rows_of(name: str, dtype: str = "fp32", clipped: bool = False) -> list[Row]:
    case = f"{name}, {dtype}" + ", clipped" * clipped
    step = our_step(name, DTYPES[dtype], max_grad_norm=MAX_NORM if clipped else None)
    moved, launches = eager_step(name, DTYPES[dtype], clipped)
    return [
        *counted("bytes of an optimizer step per parameter", case, "bytes", step.per_parameter, moved),
        *counted("launches of an optimizer step", case, "launches", len(step.launches), launches),
    ]


def rows() -> list[Row]:
    cases = product(SEVEN, DTYPES, (False, True))
    return sorted((row for case in cases for row in rows_of(*case)), key=lambda row: row["figure"])


if __name__ == "__main__":
    without_waste()
    json.dump(rows(), sys.stdout)
