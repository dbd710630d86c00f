"""What a training step of one block moves: accesses of [M, N] in device memory, rereads apart, nothing else stored.

One access is M·N distinct elements of one launch or one GEMM operand. A second read within a launch is a reread,
which L2 serves; one from registers does not occur at all.
"""

from dataclasses import dataclass

import pytest
import torch
from support.blocks import Block
from support.interpreter import count_accesses

from fastnn import dispatch

K = 5


@dataclass
class Counted:
    reads: float
    writes: float
    rereads: float
    launches: list[str]
    gemm: int

    @property
    def accesses(self) -> float:
        return self.reads + self.writes + self.gemm


def count_step(plan: str, M: int, N: int, monkeypatch: pytest.MonkeyPatch, **settings) -> Counted:
    block = Block(M, K, N, p=0.5, **settings)
    gemm_operands = []

    def watch(name):
        function = getattr(torch, name)

        def watched(*operands, out):
            gemm_operands.extend(t for t in (*operands, out) if t.shape in {(M, N), (N, M)})
            return function(*operands, out=out)

        monkeypatch.setattr(torch, name, watched)

    watch("mm")
    watch("addmm")
    with count_accesses() as counted, dispatch.forced_plan(plan):
        block.ours(block.draw(torch.Generator().manual_seed(0)))
    size = M * N * 4
    activations = counted.shaped(M, N)
    return Counted(
        sum(t.read for t in activations) / size,
        sum(t.written for t in activations) / size,
        sum(t.total_read - t.read + t.total_written - t.written for t in activations) / size,
        [launch.kernel for launch in counted.launches],
        len(gemm_operands),
    )


FORWARD_COLUMNS, FORWARD_SPLIT = ["columns_forward_kernel"], ["split_statistics_kernel", "apply_kernel"]
BACKWARD_COLUMNS, BACKWARD_SPLIT = ["columns_backward_kernel"], ["split_sums_kernel", "split_dz_kernel"]


def test_columns_in_registers_makes_8_accesses_and_rereads_nothing(monkeypatch):
    step = count_step("columns", 100, 24, monkeypatch)
    assert step.launches == FORWARD_COLUMNS + BACKWARD_COLUMNS
    assert (step.reads, step.writes, step.gemm, step.rereads) == (3, 2, 3, 0)
    assert step.accesses == 8


def test_streamed_columns_makes_8_accesses_and_rereads_3(monkeypatch):
    """z in the forward, g and z in the backward come a second time, from L2."""
    step = count_step("columns", 1100, 12, monkeypatch)
    assert step.launches == FORWARD_COLUMNS + BACKWARD_COLUMNS
    assert (step.accesses, step.rereads) == (8, 3)


@pytest.mark.parametrize("M", [100, 1100])
def test_split_makes_11_accesses_and_rereads_nothing(M, monkeypatch):
    step = count_step("split", M, 12, monkeypatch)
    assert step.launches == FORWARD_SPLIT + BACKWARD_SPLIT
    assert (step.reads, step.writes, step.gemm, step.rereads) == (6, 2, 3, 0)
    assert step.accesses == 11


def test_without_batch_norm_the_epilogue_writes_z_and_out(monkeypatch):
    step = count_step("epilogue", 100, 24, monkeypatch, norm="none", bias=True)
    assert step.launches == ["linear_forward_kernel", *BACKWARD_COLUMNS]
    assert (step.reads, step.writes, step.gemm, step.rereads) == (2, 3, 2, 0)


@pytest.mark.parametrize("plan", ["columns", "split"])
def test_of_activation_size_only_z_is_saved(plan):
    """No mask, no normalised copy, no gate."""
    block = Block(100, K, 24, p=0.5)
    saved = []
    with (
        dispatch.forced_plan(plan),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        block.ours(block.draw(torch.Generator().manual_seed(0)))
    assert [t.shape for t in saved if t.numel() >= 100 * 24] == [(100, 24)]
    others = sum(t.numel() * t.element_size() for t in saved if t.numel() < 100 * 24)
    inputs = 4 * (100 * K + K * 24 + 2 * 24)
    assert others == inputs + 4 * 2 * 24 + 8  # x, weight, gamma, beta; mean and rstd; the seed
