"""Clipping all gradients by their norm, beside torch's foreach implementation: the time that passes in a loop."""

from collections.abc import Iterator

import torch
from torch import nn

from bench import gate, gpu
from bench.measure import timed_row
from bench.roofline import Kernel
from bench.selection import StepCase, choose
from bench.workloads import PARAMETERS
from fastnn.nn.utils import clip_grad_norm_

BYTES = 12  # a gradient is read for the norm, then read and written
MAX_NORM = 1.0


def cases() -> Iterator[StepCase]:
    for name in PARAMETERS:
        for implementation in ("foreach", "fastnn"):
            yield StepCase(name, "fp32", implementation)


@choose(cases(), lambda case: True)
def bench_clip_grad_norm(case: StepCase, gpu_only: None, benchmark, record) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.empty(shape, device=gpu.DEVICE)) for shape in case.shapes]
    for param in params:
        param.grad = torch.randn_like(param)

    def clip() -> torch.Tensor:
        if case.implementation == "fastnn":
            return clip_grad_norm_(params, MAX_NORM)
        return nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)

    gate.check_clipping(params, MAX_NORM, clip)
    labels = case.labels
    record(timed_row(benchmark, labels, clip, {"fastnn": [Kernel(0, BYTES * labels["parameters"])]}))
