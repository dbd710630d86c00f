"""Accesses of [M, N] in device memory by a block, ours and eager PyTorch's; prints its figures as JSON rows.

One access is M·N distinct elements of one launch or one GEMM operand. A second read within a launch is a reread,
which L2 serves; one from registers does not occur at all. Eager's are the least its ops can make: each reads its
operands once and writes its results once; masks of bool are counted apart.

For processes in which TRITON_INTERPRET=1 was set before the kernels were imported, with tensors on the CPU.
"""

import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from fastnn import plans
from support.blocks import Block
from support.figures import Row, counted
from support.interpreter import count_accesses, without_waste
from support.ops_log import OpsLog, ops_of_a_gpu

K = 5
Case = tuple[str, int, int, dict[str, Any]]  # plans, M, N, and what else the block is
TRAINING: dict[str, Case] = {
    "whole batch": ("whole_batch grouped", 100, 24, {}),
    "columns in registers": ("columns library", 100, 24, {}),
    "columns streamed": ("columns library", 1100, 12, {}),
    "split": ("split library", 100, 12, {}),
    "epilogue with columns": ("epilogue columns library", 100, 24, {}),
    "epilogue with split": ("epilogue split library", 100, 24, {}),
    "without BatchNorm": ("epilogue library", 100, 24, {"norm": "none", "bias": True}),
}
EVAL: dict[str, Case] = {
    "eval": ("epilogue", 100, 24, {"norm": "running", "grads": False, "p": 0.0}),
}


@dataclass
class Traffic:
    reads: float
    writes: float
    rereads: float
    masks: float  # accesses of [M, N] tensors of another dtype
    launches: list[str]  # of Triton
    products: list[str]  # of the library
    gemm: int  # [M, N] operands of these

    @property
    def accesses(self) -> float:
        return self.reads + self.writes + self.gemm


def count_block(names: str, M: int, N: int, **settings: Any) -> Traffic:
    """Forward and, unless grads=False, backward of an fp32 block by these plans."""
    block = Block(M, K, N, **{"p": 0.5, **settings})
    products: list[str] = []
    operands: list[tuple[int, ...]] = []

    def watched(name: str) -> Any:
        function = getattr(torch, name)

        def product(*tensors: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            products.append(name)
            operands.extend(tuple(t.shape) for t in (*tensors, out))
            return function(*tensors, out=out)

        return patch.object(torch, name, product)

    with ExitStack() as stack:
        for name in ("mm", "addmm"):
            stack.enter_context(watched(name))
        accesses = stack.enter_context(count_accesses())
        stack.enter_context(plans.forced_plan(*names.split()))
        block.ours(block.draw(torch.Generator().manual_seed(0)))
    size = M * N * block.dtype.itemsize
    activations = [t for t in accesses.shaped(M, N) if t.dtype == block.dtype]
    masks = [t for t in accesses.shaped(M, N) if t.dtype != block.dtype]
    return Traffic(
        sum(t.read for t in activations) / size,
        sum(t.written for t in activations) / size,
        sum(t.total_read - t.read + t.total_written - t.written for t in activations) / size,
        sum((t.read + t.written) / (M * N * t.dtype.itemsize) for t in masks),
        [launch.kernel for launch in accesses.launches],
        products,
        sum(shape in {(M, N), (N, M)} for shape in operands),
    )


def eager_log(M: int, N: int, norm: str = "batch", bias: bool = False, grads: bool = True, p: float = 0.5) -> OpsLog:
    """The ops of torch.nn's layers for the same block, on meta tensors."""
    layers = [nn.Linear(K, N, bias=bias), nn.ReLU(), nn.Dropout(p)]
    if norm != "none":
        layers.insert(1, nn.BatchNorm1d(N))
    model = nn.Sequential(*layers).to("meta").train(norm != "running")
    x, g = torch.empty((M, K), device="meta", requires_grad=grads), torch.empty((M, N), device="meta")
    with ops_of_a_gpu(), torch.set_grad_enabled(grads), OpsLog() as log:
        out = model(x)
        if grads:
            out.backward(g)
    return log


def rows_of(case: str) -> list[Row]:
    names, M, N, settings = (TRAINING | EVAL)[case]
    phase = "a training step" if case in TRAINING else "eval"
    ours, theirs, shapes = count_block(names, M, N, **settings), eager_log(M, N, **settings), ((M, N), (N, M))
    accesses, masks = theirs.accesses(*shapes), theirs.accesses(*shapes, masks=True)
    launches = len(ours.launches) + len(ours.products)
    found = [
        *counted(f"accesses of [M, N] in {phase}", case, "accesses", ours.accesses, accesses),
        *counted(f"launches of a block in {phase}", case, "launches", launches, len(theirs.ops)),
    ]
    if case in TRAINING:
        found += counted(f"accesses of masks in {phase}", case, "accesses", ours.masks, masks)
        found += counted(f"rereads from L2 in {phase}", case, "rereads", ours.rereads)
    return found


def rows() -> list[Row]:
    found = [row for case in TRAINING | EVAL for row in rows_of(case)]
    return sorted(found, key=lambda row: row["figure"])


if __name__ == "__main__":
    without_waste()
    json.dump(rows(), sys.stdout)
