"""A step of each optimizer beside torch's foreach, fused and compiled step: the time that passes in a training loop."""

from collections.abc import Iterator

import torch
from support.optimizers import HAS_FUSED, SEVEN
from torch import nn

from bench import gate, gpu
from bench.measure import timed_row
from bench.models import compiled, make_optimizer
from bench.roofline import Kernel
from bench.selection import StepCase, choose
from bench.workloads import PARAMETERS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SETTINGS = {"SGD": {"momentum": 0.9}}  # torch's foreach Nesterov step adds momentum to the gradients themselves
STATES = {"SGD": 1, "RMSprop": 1, "Adagrad": 1}  # a parameter's, the others keep two
NO_GRAPHS = ("Adagrad",)  # torch's cannot be captured


def cases() -> Iterator[StepCase]:
    for optimizer in SEVEN:
        fused = ["fused"] * (optimizer in HAS_FUSED)
        for name in PARAMETERS:
            for dtype in DTYPES:
                for implementation in ("foreach", *fused, "compiled step", "fastnn"):
                    yield StepCase(name, dtype, implementation, optimizer)
                for implementation in ("foreach", *fused, "fastnn") if optimizer not in NO_GRAPHS else ():
                    yield StepCase(name, dtype, implementation, optimizer, graphed=True)


def quick(case: StepCase) -> bool:
    plain = case.dtype == "fp32" and not case.graphed and case.implementation != "compiled step"
    return plain and case.optimizer in ("SGD", "AdamW", "NAdam")


@choose(cases(), quick)
def bench_optimizer(case: StepCase, gpu_only: None, benchmark, record) -> None:
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    # So small that a step is not lost in their rounding, in which the gate could see nothing.
    params = [nn.Parameter((0.01 * torch.randn(shape, device=gpu.DEVICE)).to(dtype)) for shape in case.shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    settings = SETTINGS.get(case.optimizer, {})
    optimizer = make_optimizer(case.optimizer, params, case.implementation, case.graphed, **settings)
    step = compiled(optimizer.step, "compile") if case.implementation == "compiled step" else optimizer.step
    step()  # makes the state
    if case.graphed:
        step = gpu.capture(step)
    gate.check_step(optimizer, step)
    labels = case.labels
    accesses = 3 + 2 * STATES.get(case.optimizer, 2)  # parameter and states read and written, gradient read
    work = {"fastnn": [Kernel(0, accesses * dtype.itemsize * labels["parameters"])]}
    record(timed_row(benchmark, labels, step, work))
