"""Launches of a training step of a small MLP, ours and eager PyTorch's; prints the figure as JSON rows.

Ours are Triton's launches and the ops around them that run on a GPU: the library's products, and the bias gradient of
the last Linear. Eager's are ops, each of which launches at least one kernel. The loss is counted for neither.

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
    model: nn.Module, optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], launches: list[Launch]
) -> dict[str, list[str]]:
    """What each phase launches, by name."""
    found: dict[str, list[str]] = {}

    @contextmanager
    def phase(name: str, device: str) -> Iterator[None]:
        launches.clear()
        with OpsLog(device) as log:
            yield
        found[name] = [op.name for op in log.ops] + [launch.kernel for launch in launches]

    model.to("meta")
    x = torch.empty((BATCH, MLP.widths[0]), device="meta")
    with phase("forward", "meta"):
        out = model(x)
    g = torch.empty_like(out)
    with phase("backward", "meta"):
        out.backward(g)
    stepped = optimizer(list(model.parameters()))
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


def phases_of_both() -> dict[str, dict[str, list[str]]]:
    with stand_in_driver(90) as launches, ops_of_a_gpu():
        return {
            "fastnn": count_phases(fastnn.nn.Sequential(*MLP.layers()), our_adam, launches),
            "eager": count_phases(nn.Sequential(*MLP.layers()), eager_adam, launches),
        }


def rows() -> list[Row]:
    both = phases_of_both()
    counts = {who: {name: len(launched) for name, launched in phases.items()} for who, phases in both.items()}
    figure = f"launches of a training step of {MLP.name}, batch {BATCH}"
    found = []
    for phase in (*PHASES, "in total"):
        ours, theirs = (counts[who].get(phase, sum(counts[who].values())) for who in ("fastnn", "eager"))
        found += counted(figure, phase, "launches", ours, theirs)
    return found


if __name__ == "__main__":
    json.dump(rows(), sys.stdout)
