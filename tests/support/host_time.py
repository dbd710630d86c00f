"""Host time of an optimizer's step and of a block, ours beside torch's own in the same run; prints JSON rows.

Our kernels compile for sm_90 and are launched by a driver that only counts. torch's ops run on the CPU, on tensors so
small that their arithmetic is nothing; what is dispatched there would be launched on a GPU. torch's foreach step is not
among them: on a CPU it walks the tensors one by one, which no GPU does.

For processes in which TRITON_INTERPRET was not set when the kernels were imported.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import fastnn
from fastnn import dispatch
from support.ahead_of_time import stand_in_driver
from support.figures import Row
from support.optimizers import parameters, set_gradients

TENSORS = (10, 60, 300)
TURNS = 7
FUSED = "fuse"
Times = dict[str, list[float]]


def microseconds(step: Callable[[], Any], repeats: int) -> float:
    """Of one step among many, after as many that make caches its own: else each turn pays for the other's, 30 %."""
    for _ in range(repeats):
        step()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats * 1e6


def in_turns(steps: dict[str, Callable[[], Any]], repeats: int = 300) -> Times:
    """Several turns of each, one after the other, so that another process on the machine does not decide."""
    turns = [{name: microseconds(step, repeats) for name, step in steps.items()} for _ in range(TURNS)]
    return {name: [turn[name] for turn in turns] for name in steps}


def adam_steps(count: int) -> dict[str, Callable[[], Any]]:
    """Both have made their state."""
    params = parameters([(8,)] * count)
    set_gradients(0, params)
    optimizers = {"fused": torch.optim.Adam(params, fused=True), "fastnn": fastnn.optim.Adam(params, fused=True)}
    for optimizer in optimizers.values():
        optimizer.step()
    return {name: optimizer.step for name, optimizer in optimizers.items()}


class Nothing(torch.autograd.Function):
    """Saves what a block saves and makes gradients of the same shapes, without a launch: the least of a node."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty_like(tensors[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)


class Nodes(nn.Sequential):
    """Such a node in place of each block."""

    def forward(self, input: Tensor) -> Tensor:
        layers: Any = list(self)
        for linear, norm in zip(layers[::4], layers[1::4], strict=True):
            input = Nothing.apply(input, linear.weight, norm.weight, norm.bias)
        return input


class OneOpDropout(nn.Dropout):
    """Eager's on a GPU; a CPU makes three ops of it."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.native_dropout(input, self.p, True)[0]


def block_steps(blocks: int, backward: bool) -> dict[str, Callable[[], Any]]:
    """Forward, and backward if asked for, of Linear + BatchNorm1d + ReLU + Dropout on 8 x 8 elements, so many of them.

    Ours draws its seed by an op, as on a CPU; a GPU's generator is asked on the host, for about the same time.
    """
    x, g = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8)

    def step_of(make: Callable[..., nn.Module], dropout: type[nn.Module] = nn.Dropout) -> Callable[[], Any]:
        layers: list[nn.Module] = []
        for _ in range(blocks):
            layers += [nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), dropout(0.5)]
        model = make(*layers)
        leaves = [x, *model.parameters()]

        def step() -> None:
            for leaf in leaves:
                leaf.grad = None
            model(x).backward(g)

        return step if backward else lambda: model(x)

    return {
        "eager": step_of(nn.Sequential, OneOpDropout),
        "a node alone": step_of(Nodes),
        "fastnn": step_of(fastnn.nn.Sequential),
        FUSED: step_of(lambda *layers: fastnn.fuse(nn.Sequential(*layers))),
    }


def block_rows(launches: list[Any]) -> list[Row]:
    """Of one block, and of each of eight, among which a backward's start is shared."""
    found: list[Row] = []
    for blocks in (1, 8):
        for backward in (False, True):
            times = in_turns(block_steps(blocks, backward), repeats=400 // blocks)
            launches.clear()
            case = ("one" if blocks == 1 else f"each of {blocks}") + (" with its backward" if backward else " forward")
            each = {name: [turn / blocks for turn in turns] for name, turns in times.items()}
            fused = {"eager": each["eager"], "fastnn": each.pop(FUSED)}
            found += host_rows("host time of a block", case, each)
            found += host_rows("host time of a block in a model after fastnn.fuse", case, fused)
    return found


def host_rows(figure: str, case: str, times: Times) -> list[Row]:
    """The best turn of each: medians of turns moved by a factor of two while the machine had other work."""
    best = {name: min(turns) for name, turns in times.items()}
    rows: list[Row] = []
    for name, time_ in best.items():
        what = {"kind": "host", "figure": figure, "case": case, "implementation": name}
        rows.append({**what, "best_us": round(time_, 3)})
        if name == "fastnn":
            rows[-1]["ratios"] = {other: round(best[other] / time_, 3) for other in best if other != name}
    return rows


def kernels_taken() -> AbstractContextManager[Any]:
    """By tensors of any device."""
    return patch.object(dispatch, "device_path", lambda device: dispatch.Path("triton"))


def rows() -> list[Row]:
    torch.set_num_threads(1)
    found: list[Row] = []
    with stand_in_driver(90) as launches, kernels_taken():
        for count in TENSORS:
            times = in_turns(adam_steps(count))
            found += host_rows("host time of an optimizer step", f"Adam, {count} tensors", times)
        found += block_rows(launches)
    return found


if __name__ == "__main__":
    json.dump(rows(), sys.stdout)
