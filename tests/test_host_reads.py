"""No step reads device memory on the host: neither a plain one, which would wait, nor a captured one, which cannot.

Launches compute nothing here: what a kernel would have written is NaN, and nothing may be decided by it.
"""

import copy
import itertools
import math
from operator import methodcaller

import pytest
import torch
from support.captures import capture
from support.host_reads import NoHostReads
from support.optimizers import HAS_CAPTURABLE, HAS_FUSED, SEVEN, flag_combinations, ours, parameters
from torch import nn
from triton.runtime.interpreter import GridExecutor

import fastnn
from fastnn import ops, plans, recipes, seeds
from fastnn.nn.utils import clip_grad_norm_

ROWS, K, N = 40, 16, 24
STATISTICS = ("columns", "split", "whole_batch", "epilogue", "apply")
PRODUCTS = ("grouped", "library")


@pytest.fixture(autouse=True)
def launched(interpreted, monkeypatch):
    """The kernels by name, none of which runs."""
    found = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *_, **settings: found.append(self.fn.__name__))
    return found


def plainly(step, *host):
    """Twice: what is settled in the first call is found by the second. Seeds are the host's, as on a GPU."""
    with NoHostReads(*host), pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeds, "dropout_seed", lambda device: torch.scalar_tensor(7, dtype=torch.int64, device="cpu"))
        assert not ops.is_observed()  # or calls would go by the registered ops
        for _ in range(2):
            step()


def captured(step, *host):
    """Where all tensors are taken to be the device's."""
    capture(step)


@pytest.fixture(params=[plainly, captured])
def take(request):
    """Takes steps where reading raises: take(step, *tensors of the host)."""
    if request.param is captured:
        request.getfixturevalue("recorded")
    return request.param


@pytest.mark.parametrize("read", [bool, torch.nonzero, *map(methodcaller, ("item", "cpu", "tolist", "numpy"))])
@pytest.mark.parametrize("recipe", [recipes.Forward, recipes.Backward])
def test_a_read_in_a_forward_or_a_backward_would_show(recipe, read, take, monkeypatch):
    call = recipe.__call__

    def reading(self, x, *others):
        read(x.detach()[0, 0])
        return call(self, x, *others)

    monkeypatch.setattr(recipe, "__call__", reading)
    model, x = fastnn.nn.Sequential(nn.Linear(K, N), nn.ReLU()), torch.randn(ROWS, K)
    with pytest.raises(RuntimeError, match="on the host"):
        take(lambda: model(x).sum().backward())


BLOCKS = {
    "training": [nn.Linear(K, N), nn.BatchNorm1d(N), nn.ReLU(), nn.Dropout(0.5)],
    "cumulative statistics": [nn.Linear(K, N, bias=False), nn.BatchNorm1d(N, momentum=None), nn.GELU()],
    "statistics not kept": [nn.Linear(K, N), nn.BatchNorm1d(N, affine=False, track_running_stats=False), nn.SiLU()],
    "without BatchNorm": [nn.Linear(K, N), nn.LeakyReLU(), nn.Dropout(0.5)],
    "without Linear": [nn.BatchNorm1d(K), nn.ELU(), nn.Dropout(0.5)],
    "activation": [nn.Tanh(), nn.Dropout(1.0)],
    "Linear alone": [nn.Linear(K, N)],
    "MLP": [*fastnn.nn.MLP(K, [N, N, 3], norm_layer=nn.BatchNorm1d, dropout=0.2)],
}
MODES = {
    "train": (True, True, False),
    "train without gradients": (True, False, False),
    "eval": (False, True, False),
    "eval without gradients": (False, False, False),
    "train under autocast": (True, True, True),
    "eval under autocast": (False, False, True),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", BLOCKS)
def test_no_block_reads_the_device_by_any_plan(case, mode, take, launched):
    train, grads, autocast = MODES[mode]
    x = torch.randn(ROWS, K, requires_grad=grads)
    for plan, products in itertools.product(STATISTICS, PRODUCTS):
        model = fastnn.nn.Sequential(*copy.deepcopy(BLOCKS[case])).train(train)

        def step(model=model):
            with torch.autocast("cpu", enabled=autocast, cache_enabled=False), torch.set_grad_enabled(grads):
                out = model(x)
            if grads:
                out.backward(torch.ones_like(out))

        with plans.forced_plan(plan, products):
            take(step)
    assert launched or (case, grads) == ("Linear alone", False)  # which is torch's own


def settings_of(name, capturing):
    """Each flag of torch's, what we add, and where counts and rates may lie; a capture needs counts on the device."""
    on_device = {"fused": True} if name == "Adagrad" else {"capturable": True} if name in HAS_CAPTURABLE else {}
    found = list(flag_combinations(name))
    found += [{"max_grad_norm": 1.0, "l1": 0.1}, {"stochastic_rounding": True, "state_dtype": torch.float32}]
    found += [{"lr": torch.tensor(0.1)}, {"fused": True} if name in HAS_FUSED else {}, on_device]
    return [settings | (on_device if "fused" not in settings else {}) for settings in found] if capturing else found


@pytest.mark.parametrize("name", SEVEN)
def test_no_optimizers_step_reads_the_device(name, take, launched):
    """With some gradients missing in some steps, and with others elsewhere in each."""
    for settings in settings_of(name, take is captured):
        dtype = torch.bfloat16 if "state_dtype" in settings else torch.float32
        params = parameters([(3, 5), (1030,), (7,)], dtype)
        optimizer = ours(name)([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], **settings)
        on_device = settings.get("fused") or settings.get("capturable")
        counts = [] if on_device else [state["step"] for state in optimizer.state.values()]  # Adagrad's are there

        def steps(params=params, optimizer=optimizer):
            for some in (params, params, params[1:]):
                optimizer.zero_grad()
                for param in some:
                    param.grad = torch.ones_like(param)
                optimizer.step()

        take(steps, *counts)
        assert launched.count("step_kernel") >= 6, settings
        launched.clear()


@pytest.mark.parametrize("name", HAS_FUSED)
def test_no_scaled_step_reads_the_device(name, take):
    """By GradScaler, which leaves the overflow to a fused step."""
    params = parameters([(3, 5), (1030,)])
    optimizer, scaler = ours(name)(params, fused=True, max_grad_norm=1.0), torch.amp.GradScaler("cpu")
    loss = torch.ones(())

    def step():
        scaler.scale(loss)
        for param in params:
            param.grad = torch.ones_like(param)
        scaler.step(optimizer)
        scaler.update()

    take(step)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_clipping_reads_nothing(norm_type, take):
    params = [*parameters([(3, 5), (1030,)]), *parameters([(9,)], torch.bfloat16)]

    def step():
        for param in params:
            param.grad = torch.ones_like(param)
        return clip_grad_norm_(params, 0.5, norm_type)

    take(step)


def test_a_step_of_a_whole_training_reads_nothing(take):
    """Module, loss, clipping, optimizer and schedule, whose rate is the device's."""
    model = fastnn.nn.Sequential(*copy.deepcopy(BLOCKS["MLP"]))
    lr = torch.tensor(0.1)
    optimizer = ours("AdamW")(model.parameters(), lr=lr, capturable=True, max_grad_norm=1.0)
    x, y = torch.randn(ROWS, K), torch.zeros(ROWS, dtype=torch.int64)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        lr.mul_(0.9)

    take(step)
