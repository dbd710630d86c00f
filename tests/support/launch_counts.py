"""Launches of a training step of a small MLP, ours and eager PyTorch's; prints the figure as JSON rows.

Ours are Triton's launches and the ops around them that run on a GPU: the library's products, and the bias gradient of
the last Linear. Eager's are ops, each of which launches at least one kernel. The loss is counted for neither. Autocast
knows no meta tensors: under it the step is taken on the CPU, where our launches run nothing.

For processes in which TRITON_INTERPRET was not set when the kernels were imported.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

import fastnn
from bench.workloads import WORKLOADS
from support.ahead_of_time import Launch, stand_in_driver
from support.figures import Row, counted
from support.ops_log import OpsLog, ops_of_a_gpu

MLP = WORKLOADS["notes-mlp"]
BATCH = MLP.batches[0]
PHASES = ("forward", "backward", "optimizer step")


def count_phases(
    model: nn.Module,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    launches: list[Launch],
    autocast: bool,
) -> dict[str, list[str]]:
    """What each phase launches, by name."""
    found: dict[str, list[str]] = {}

    @contextmanager
    def phase(name: str, device: str) -> Iterator[None]:
        launches.clear()
        with OpsLog(device) as log:
            yield
        found[name] = [op.name for op in log.ops] + [launch.kernel for launch in launches]

    device = "cpu" if autocast else "meta"
    model.to(device)
    x = torch.zeros((BATCH, MLP.widths[0]), device=device)
    with phase("forward", device), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x)
    g = torch.zeros_like(out)
    with phase("backward", device):
        out.backward(g)
    stepped = optimizer(list(model.to("meta").parameters()))
    stepped.step()  # which makes the state
    with phase("optimizer step", stepped.param_groups[0]["params"][0].device.type):
        stepped.step()
    return found


def eager_adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """As torch has it by default on a GPU. Its step counts lie on the CPU, and are not counted."""
    return torch.optim.Adam(params, foreach=True)


def our_adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """On copies that have addresses. Capturable: no step is counted on the host, so that every op would be a launch."""
    here = [nn.Parameter(torch.zeros(p.shape)) for p in params]
    for param in here:
        param.grad = torch.zeros_like(param)
    return fastnn.optim.Adam(here, capturable=True)


def phases_of_both(autocast: bool) -> dict[str, dict[str, list[str]]]:
    with stand_in_driver(90) as launches, ops_of_a_gpu():
        return {
            "fastnn": count_phases(fastnn.nn.Sequential(*MLP.layers()), our_adam, launches, autocast),
            "eager": count_phases(nn.Sequential(*MLP.layers()), eager_adam, launches, autocast),
        }


def rows() -> list[Row]:
    found = []
    for autocast in (False, True):
        both = phases_of_both(autocast)
        counts = {who: {name: len(launched) for name, launched in phases.items()} for who, phases in both.items()}
        figure = f"launches of a training step of {MLP.name}, batch {BATCH}" + ", bf16 autocast" * autocast
        for phase in (*PHASES, "in total"):
            ours, theirs = (counts[who].get(phase, sum(counts[who].values())) for who in ("fastnn", "eager"))
            found += counted(figure, phase, "launches", ours, theirs)
    return found


if __name__ == "__main__":
    json.dump(rows(), sys.stdout)
