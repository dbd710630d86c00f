"""Scalar parts of the rules: 1 - beta^step in fp32, and the chunks that the tables lay out."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnn.kernels import update_rules
from fastnn.kernels.tables import BLOCK, LARGEST_CHUNK, Tables, blocks_per_chunk


@triton.jit
def power_kernel(rest_ptr, exponent_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, update_rules.one_minus_power(tl.load(rest_ptr + i), tl.load(exponent_ptr + i)))


def test_one_minus_power_is_right_to_a_few_units_in_the_last_place():
    """1 - beta**step in fp32 would lose up to 1e-4 of it at the first steps, and with it the first updates."""
    betas = [0.0, 1e-3, 0.1, 0.5, 0.69, 0.71, 0.9, 0.99, 0.999, 0.9999, 0.999999]
    steps = [1, 2, 3, 10, 100, 693, 1000, 10_000, 1_000_000]
    pairs = [(1 - beta, step) for beta in betas for step in steps] + [(0.5, 1)] * 29
    rest, exponent = torch.tensor(pairs, dtype=torch.float64).float().T.contiguous()
    assert rest.numel() == 128
    out = torch.empty_like(rest)
    power_kernel[(1,)](rest, exponent, out, N=128)
    with np.errstate(divide="ignore"):  # log(0): beta = 0, all of it forgotten at once
        exact = -np.expm1(exponent.cpu().double().numpy() * np.log1p(-rest.cpu().double().numpy()))
    assert np.abs(out.cpu().double().numpy() / exact - 1).max() < 5e-7


@given(st.lists(st.integers(1, 300_000), min_size=1, max_size=20), st.sampled_from([1, 132, 148]))
@settings(max_examples=50, deadline=None)
def test_chunks_cover_every_element_once(sizes, multiprocessors):
    tables = Tables({}, sizes, [0] * len(sizes), torch.device("cpu"), multiprocessors)
    chunk = tables.blocks * BLOCK
    covered = [0] * len(sizes)
    for tensor, number in tables.chunks.tolist():
        assert number * chunk < sizes[tensor]
        covered[tensor] += min(chunk, sizes[tensor] - number * chunk)
    assert covered == sizes
    assert tables.programs == len(tables.chunks)


@pytest.mark.parametrize(("elements", "programs"), [(1_000_000, 4 * 132), (100_000_000, 4 * 132), (20_000, 19)])
def test_small_models_fill_the_machine_and_large_ones_take_large_chunks(elements, programs):
    tables = Tables({}, [elements], [0], torch.device("cpu"), 132)
    assert tables.programs >= programs
    assert tables.blocks == blocks_per_chunk([elements], 132) <= LARGEST_CHUNK
    assert elements < 10_000_000 or tables.blocks == LARGEST_CHUNK
