"""What a training step must cost at least: the work of each kernel, and the time a device needs for it.

A model, not a measurement. Accesses of [M, N]: ours as counted by the benches; eager's op by op, BatchNorm in two
passes each way; torch.compile's as its generated kernels read and write for the same layers (torch 2.13, sm_90: from
512 rows on two kernels forward and several backward, below one each way).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench import gpu
from bench.workloads import Workload
from fastnn import plans

LAUNCH_SECONDS = 2e-6  # assumed of a kernel that has nothing to do
PERSISTENT_ROWS = 512  # from here on torch.compile splits a column's reduction
ITEMSIZE = {"fp32": 4, "tf32": 4, "bf16": 2}  # of an activation
COMPUTED = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
ADAM_BYTES = 28  # per fp32 parameter: parameter and two moments read and written, gradient read


@dataclass(frozen=True)
class Kernel:
    flops: int
    bytes: int


def gemm(M: int, N: int, K: int, itemsize: int) -> Kernel:
    """Each matrix moved once."""
    return Kernel(2 * M * N * K, itemsize * (M * K + N * K + M * N))


def _passes(M: int, N: int, itemsize: int, *accesses: int, masks: int = 0) -> list[Kernel]:
    """A kernel for each number of accesses of [M, N]; the last also moves that many masks of bytes."""
    kernels = [Kernel(0, count * M * N * itemsize) for count in accesses]
    return [*kernels[:-1], Kernel(0, kernels[-1].bytes + masks * M * N)]


def _fastnn(M: int, N: int, itemsize: int, p: float) -> tuple[list[Kernel], list[Kernel]]:
    columns = plans.statistics_plan(M, N, itemsize, gpu.DEVICE) == "columns"
    forward, backward = ((2,), (3,)) if columns else ((1, 2), (2, 3))
    return _passes(M, N, itemsize, *forward), _passes(M, N, itemsize, *backward)


def _eager(M: int, N: int, itemsize: int, p: float) -> tuple[list[Kernel], list[Kernel]]:
    dropout = 1 if p > 0 else 0
    forward = _passes(M, N, itemsize, 1, 2, 2, *[2] * dropout, masks=dropout)
    backward = _passes(M, N, itemsize, 2, 3, 3, *[2] * dropout, masks=dropout)
    return forward, backward


def _compile(M: int, N: int, itemsize: int, p: float) -> tuple[list[Kernel], list[Kernel]]:
    masks = 1 if p > 0 else 0
    forward, backward = ((2,), (3,)) if M < PERSISTENT_ROWS else ((1, 2), (2, 4, 3))
    return _passes(M, N, itemsize, *forward, masks=masks), _passes(M, N, itemsize, *backward, masks=masks)


POINTWISE: dict[str, Callable] = {"fastnn": _fastnn, "eager": _eager}


def _casts(elements: int, dtype: str) -> list[Kernel]:
    """What autocast launches for a tensor of fp32, either way."""
    return [Kernel(0, 6 * elements)] if dtype == "bf16" else []


def _reads_fp32(M: int, K: int, N: int, dtype: str, implementation: str) -> bool:
    """Whether nothing is cast under autocast, as ours of small products round operands in registers."""
    if implementation != "fastnn" or dtype != "bf16":
        return False
    return plans.rounds_operands(M, N, K, torch.bfloat16, gpu.DEVICE, "batch", True)


def block(
    M: int, K: int, N: int, dtype: str, p: float, implementation: str, inner: bool = True
) -> dict[str, list[Kernel]]:
    """Kernels of one Linear + BatchNorm1d + ReLU + Dropout by phase; inside gpu.precision(dtype), which plans ask.

    The input of an inner one needs a gradient, and under autocast is cast.
    """
    itemsize, ours = ITEMSIZE[dtype], implementation == "fastnn"
    product, out = gemm(M, N, K, itemsize), Kernel(0, M * N * itemsize)
    operands = _casts(N * K, dtype) + _casts(M * K * inner, dtype)
    if _reads_fp32(M, K, N, dtype, implementation):
        product, operands = Kernel(product.flops, product.bytes + 2 * (M * K + N * K)), []
    forward, backward = POINTWISE.get(implementation, _compile)(M, N, itemsize, p)
    plan = plans.batch_norm_plan(M, N, K, COMPUTED[dtype], gpu.DEVICE) if ours else ""
    if plan == "epilogue":
        forward = _passes(M, N, itemsize, 2)
    forward = [_together(product, out)] if plan == "whole_batch" else [product, *forward]
    products = [product] * (1 + inner)
    if ours and inner and plans.linear_backward_plan(M, N, K, COMPUTED[dtype], gpu.DEVICE) == "grouped":
        products = [_together(*products)]
    phases = {"forward": [*operands, *forward], "backward": [*backward, *products, *operands]}
    folded = ours and plans.linear_plan(M, N, K, COMPUTED[dtype], gpu.DEVICE) == "epilogue"
    evaluated = [*operands, product] if folded else [*operands, product, *_passes(M, N, itemsize, 2)]
    return phases | {"training step": phases["forward"] + phases["backward"], "eval": evaluated}


def mlp(workload: Workload, M: int, dtype: str, implementation: str) -> list[Kernel]:
    """Kernels of a training step of the whole stack with Adam's; the first layer's input needs no gradient."""
    first = _reads_fp32(M, *workload.blocks[0], dtype, implementation)
    kernels = [] if first else _casts(M * workload.widths[0], dtype)
    for position, (K, N) in enumerate(workload.blocks):
        kernels += block(M, K, N, dtype, workload.p, implementation, inner=position > 0)["training step"]
    if workload.head is not None:
        kernels += [gemm(M, workload.head, workload.widths[-1], ITEMSIZE[dtype])] * 3
    return [*kernels, Kernel(0, ADAM_BYTES * workload.parameters)]


def _together(*kernels: Kernel) -> Kernel:
    return Kernel(sum(kernel.flops for kernel in kernels), sum(kernel.bytes for kernel in kernels))


def floor(kernels: list[Kernel], bytes_rate: float, flops_rate: float, launch: float = 0.0) -> float:
    """Seconds that these kernels take one after another, each at the device's bandwidth or arithmetic rate."""
    return sum(max(kernel.bytes / bytes_rate, kernel.flops / flops_rate, launch) for kernel in kernels)
