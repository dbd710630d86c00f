"""BatchNorm over several processes, whose rows and sums are handed round here in one process."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.interpreter import shuffled_grid
from torch import Tensor

from fastnn.kernels import synchronised
from fastnn.kernels.launch import Settings
from fastnn.kernels.tiles import split_tiles

MOMENTUM = 0.25


def values_of(M: int, N: int, momentum: float | None = MOMENTUM) -> dict:
    return Settings("batch", momentum, activation="relu").values(M, N, 0, 4, counts=True)


def joined(parts: list[Tensor], momentum: float | None, batches: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(3, N) mean, variance and rows of all; running mean and variance; the count of batches."""
    N = parts[0].shape[1]
    rows = torch.zeros(len(parts), 4, N)
    for part, row in zip(parts, rows, strict=True):
        if len(part):
            shape = split_tiles(len(part), N, 4, 4)
            steps = synchronised.launches(values_of(len(part), N), shape, len(parts))
            partials = torch.empty(shape.chunks, 3, N)
            steps.statistics.run(partials=partials, z=part)
            steps.pack.run(partials=partials, row=row)
    table, mean, var = torch.empty(3, N), torch.zeros(N), torch.ones(N)
    count = torch.tensor(batches)
    for step in synchronised.launches(values_of(1, N, momentum), split_tiles(1, N, 4, 4), len(parts)).join:
        step.run(rows=rows, joined=table, running_mean=mean, running_var=var, batches=count)
    return table, mean, var, count


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=70), st.sampled_from([1, 3, 130]), st.data())
def test_statistics_of_any_number_of_processes_are_joined(sizes, N, data):
    sizes[data.draw(st.integers(0, len(sizes) - 1))] += 2  # one row has no variance
    far = data.draw(st.sampled_from([0.0, 1e4]))
    generator = torch.Generator().manual_seed(sum(sizes))
    every = torch.randn(sum(sizes), N, generator=generator) + far
    momentum = data.draw(st.sampled_from([MOMENTUM, None]))
    table, mean, var, count = joined(list(every.split(sizes)), momentum, 4)
    exact, factor = every.double(), momentum or 1 / 5
    assert torch.equal(table[2], torch.full((N,), float(len(every))))
    torch.testing.assert_close(table[0].double(), exact.mean(0), rtol=2e-7, atol=1e-7)
    nearly = 1e-12 + (2 * far * torch.finfo(torch.float32).eps) ** 2  # means that are rounded apart
    torch.testing.assert_close(table[1].double(), exact.var(0, correction=0), rtol=2e-6, atol=nearly)
    torch.testing.assert_close(mean.double(), factor * exact.mean(0), rtol=5e-7, atol=1e-7)
    torch.testing.assert_close(var.double(), 1 - factor + factor * exact.var(0), rtol=2e-6, atol=2 * nearly)
    assert count.item() == 5


@pytest.mark.parametrize("momentum", [MOMENTUM, None])
def test_no_program_reads_what_another_of_its_launch_writes(momentum):
    parts = list(torch.randn(50, 400).split([20, 30]))
    expected = joined(parts, momentum, 4)
    with shuffled_grid(1):
        for mine, other in zip(joined(parts, momentum, 4), expected, strict=True):
            assert torch.equal(mine, other)
