"""On a GPU, torch's own watch over host and device: no step of a training makes the host wait for the GPU.

tests/test_host_reads.py shows it without one, by the ops that are called.
"""

import pytest
import torch
from support.optimizers import DEVICE, HAS_FUSED, SEVEN
from torch import nn

import fastnn
from fastnn.nn.utils import clip_grad_norm_

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU and FASTNN_TEST_DEVICE=cuda")
M, K, N = 40, 16, 24
STATISTICS, PRODUCTS = ("columns", "split", "whole_batch", "epilogue"), ("grouped", "library")


@pytest.fixture
def watched():
    """watched(step): takes it three times, the last two where waiting raises."""

    def take(step):
        step()  # compiles, and makes tables and state
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return take


def test_waiting_raises(watched):
    with pytest.raises(RuntimeError, match="synchroniz"):
        watched(lambda: torch.ones(()).item())


def model_of(p=0.5):
    return fastnn.nn.Sequential(nn.Linear(K, N), nn.BatchNorm1d(N), nn.ReLU(), nn.Dropout(p), nn.Linear(N, 4))


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("statistics", STATISTICS)
def test_no_block_waits_by_any_plan(statistics, products, watched):
    model, x = model_of(), torch.randn(M, K)
    with fastnn.forced_plan(statistics, products):
        watched(lambda: model(x).square().sum().backward())


@pytest.mark.parametrize("clipped", [False, True], ids=["plain", "clipped"])
@pytest.mark.parametrize("name", SEVEN)
def test_no_optimizers_step_waits(name, clipped, watched):
    model, x = model_of(), torch.randn(M, K)
    flags = {"fused": True} if name in HAS_FUSED else {}
    flags |= {"max_grad_norm": 1.0} if clipped else {}
    optimizer = getattr(fastnn.optim, name)(model.parameters(), lr=1e-3, **flags)

    def step():
        model(x).square().sum().backward()
        if not clipped:
            clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    watched(step)
