"""The dropout mask: Philox itself, the same wherever and however it is drawn, and as random as it must be."""

import numpy as np
import pytest
import torch
from support import philox
from support.blocks import KEY

from fastnn import ops, plans, reference
from fastnn.kernels import launch
from fastnn.kernels.dropout import threshold_and_scale
from fastnn.kernels.tiles import Tiles

# Known answers of the Random123 distribution (kat_vectors): rounds, counter, key, result.
ONES, PI = [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
KNOWN = [
    (7, [0] * 4, (0, 0), [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    (7, ONES, (0xFFFFFFFF, 0xFFFFFFFF), [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    (7, PI, (0xA4093822, 0x299F31D0), [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]),
    (10, [0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN)
def test_our_numpy_philox_gives_the_known_answers(rounds, counter, key, expected):
    assert philox.philox(np.array(counter), key, rounds).tolist() == expected


def multiplier_of_forward(M, N, p, key=KEY, tiles=None):
    """What the elementwise kernel multiplies ones by."""
    return dropped(torch.ones(M, N), p, tiles or Tiles(16, 32, 1, M, 1), key)


def dropped(z, p, tiles, key=KEY, seed=None):
    (apply,) = launch.forward_apply(launch.Settings(p=p).values(*z.shape, 0, 4, False), tiles)
    tensors = {"z": z, "out": torch.empty_like(z), "seed_ptr": seed, "seed": key}
    apply.by_triton(tuple(tensors.get(name) for name in launch.FORWARD), keep=False)
    return tensors["out"]


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 64), (70, 101)], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_kernel_and_reference_draw_the_mask_of_the_definition(shape, p):
    expected = torch.tensor(philox.multiplier(KEY, *shape, p))
    assert torch.equal(multiplier_of_forward(*shape, p), expected)
    assert torch.equal(reference.dropout_multiplier(torch.tensor(KEY), *shape, p), expected)


@pytest.mark.parametrize("tiles", [Tiles(16, 8, 1, 70, 1), Tiles(64, 16, 2, 64, 4), Tiles(8, 128, 3, 24, 2)], ids=str)
def test_mask_does_not_depend_on_tiles(tiles):
    assert torch.equal(multiplier_of_forward(70, 101, 0.3, tiles=tiles), multiplier_of_forward(70, 101, 0.3))


@pytest.mark.parametrize("plan", ["columns", "split", "whole_batch", "epilogue", "apply"])
@pytest.mark.parametrize("norm", ["batch", "running", "none"])
def test_forward_and_backward_of_every_plan_draw_one_mask(norm, plan):
    """Zeros of out, and of dy behind beta's gradient column by column, are the definition's."""
    M, N, p = 45, 19, 0.4
    multiplier = torch.tensor(philox.multiplier(KEY, M, N, p))
    x, weight, beta = torch.randn(M, 6), torch.randn(N, 6), torch.full((N,), 50.0, requires_grad=True)
    mean, var = torch.zeros(N), torch.ones(N)
    batch_norm = reference.BatchNorm(mean, var, torch.ones(N), beta, training=norm == "batch")
    bias = torch.full((N,), 50.0, requires_grad=True)
    with plans.forced_plan(plan):
        out = ops.block(x, weight, bias, None if norm == "none" else batch_norm, torch.tensor(KEY), "relu", 0, 0, p)
    assert torch.equal(out != 0, multiplier != 0)
    g = torch.randn(M, N)
    out.backward(g)
    gradient = bias.grad if norm == "none" else beta.grad
    torch.testing.assert_close(gradient, (g * multiplier).sum(0), rtol=1e-5, atol=1e-5)


def test_seed_in_device_memory_draws_the_same_mask():
    tiles = Tiles(16, 32, 1, 9, 1)
    given = dropped(torch.ones(9, 24), 0.5, tiles, key=0, seed=torch.tensor(KEY))
    assert torch.equal(given, multiplier_of_forward(9, 24, 0.5))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_over_rows_columns_and_neighbours(p):
    """Counts of kept elements within five binomial standard deviations, and no pair of neighbours more alike."""
    M, N = 512, 256
    kept = reference.dropout_multiplier(torch.tensor(KEY), M, N, p) > 0
    q = 1 - threshold_and_scale(p)[0] / 65536

    def check(counts, trials, probability):
        deviation = (trials * probability * (1 - probability)) ** 0.5
        assert (counts - trials * probability).abs().max() <= 5 * deviation

    check(kept.sum().double(), M * N, q)
    check(kept.sum(0).double(), M, q)
    check(kept.sum(1).double(), N, q)
    # Lags across the eight draws of a call, across calls, and the 32-row period of an old package's bug.
    for rows, cols in [(0, 1), (0, 2), (0, 4), (0, 7), (0, 8), (1, 0), (8, 0), (32, 0), (128, 0), (1, 1), (32, 32)]:
        both = kept[rows:, cols:] & kept[: M - rows, : N - cols]
        check(both.sum().double(), both.numel(), q * q)


def test_masks_of_different_keys_are_independent():
    keys = [KEY, KEY + 1, KEY + (1 << 32), 0]
    kept = [reference.dropout_multiplier(torch.tensor(key), 256, 128, 0.5) > 0 for key in keys]
    for i in range(4):
        for j in range(i):
            assert ((kept[i] == kept[j]).double().mean() - 0.5).abs() < 5 * 0.5 / (256 * 128) ** 0.5


@pytest.mark.parametrize("p", [0.0, 1e-9, 1 / 3, 0.5, 0.9999999, 1.0])
def test_scale_is_of_the_rate_drawn(p):
    threshold, scale = threshold_and_scale(p)
    kept = 65536 - threshold
    assert kept * scale == (65536 if kept else 0)
    assert abs(threshold / 65536 - p) <= 2**-16
    assert (kept == 0) == (p == 1)


def test_everything_dropped_is_multiplied_by_zero_as_in_torch():
    """NaN stays NaN and everything else becomes 0, at p = 1 and at a dropped element."""
    z = torch.tensor([[float("nan"), float("inf"), 1.0, -2.0]]).repeat(2, 2)
    out = dropped(z, 1.0, Tiles(16, 8, 1, 2, 1))
    expected = torch.nn.functional.dropout(z, 1.0)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
