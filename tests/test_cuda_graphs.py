"""Steps in CUDA graphs: what a replay draws, reads and counts anew. Recorded on a CPU, and real ones on a GPU."""

import re
from pathlib import Path

import pytest
import torch
from support.captures import BATCH, WARM_UP, Training, all_differ, batches, capture
from support.numerics import judge_tensor
from support.optimizers import DEVICE, SEVEN
from torch import nn

import fastnn
from fastnn import seeds

README = (Path(__file__).parent.parent / "README.md").read_text()
REPLAYS = 3
SETTINGS = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True},  # has no counts
    # A large eps, or rounding chooses the sign of first steps whose gradient is next to nothing.
    "Adagrad": {"lr": 0.01, "eps": 1e-3, "fused": True},  # has no capturable
    **{name: {"lr": 0.01, "eps": 1e-3, "capturable": True} for name in ("Adam", "AdamW", "NAdam", "RMSprop")},
    "Adadelta": {"lr": 1.0, "capturable": True},
}


def assert_as_torch(name, optimizer_settings, **settings):
    """Three steps as they are and three replays, against six of torch.nn in float64; E of three orders of the rows."""
    tensor_rate = {"lr": torch.tensor(optimizer_settings["lr"], device=DEVICE)}
    mine = Training(fastnn, name, **settings, **optimizer_settings | tensor_rate)
    data = batches(WARM_UP + REPLAYS)
    graph, loss = capture(mine.step, lambda: mine.train(mine.step, data[:WARM_UP]))
    mine.train(lambda: (graph.replay(), loss)[1], data[WARM_UP:])
    eager = []
    numbers = {key: value for key, value in optimizer_settings.items() if key not in ("capturable", "fused")}
    for dtype, order in ((torch.float64, 0), (torch.float32, 0), (torch.float32, 1), (torch.float32, 2)):
        autocast = settings.get("autocast", False) and dtype == torch.float32
        plain = Training(torch, name, dtype, **settings | {"autocast": autocast}, **numbers)
        rows = torch.randperm(BATCH, generator=torch.Generator().manual_seed(order))
        plain.train(plain.step, data, rows)
        eager.append(plain.results())
    found = mine.results()
    assert found.keys() == eager[0].keys()
    for key, tensor in found.items():
        exact, *others = (run[key] for run in eager)
        if tensor.dim() == 0:
            torch.testing.assert_close(tensor, others[0], msg=lambda m, key=key: f"{key}: {m}", check_dtype=False)
        else:
            judge_tensor(key, tensor, exact, *others)


@pytest.mark.parametrize("name", SEVEN)
def test_replays_train_as_torch_does(name, graphs):
    """New batches through the static buffers, a rate that the schedule moves, running statistics and counts."""
    assert_as_torch(name, SETTINGS[name])


def test_replays_train_as_torch_does_under_autocast(graphs):
    """Smooth: a gate that bf16 flips in one of the two would be all that differs."""
    assert_as_torch("SGD", SETTINGS["SGD"], autocast=True, activation=nn.SiLU)


def block(p=0.5):
    layers = nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(p)
    return fastnn.nn.Sequential(*layers).to(DEVICE)


def masks_of(graph, out, replays=4):
    """What was kept, replay by replay."""
    found = []
    for _ in range(replays):
        graph.replay()
        found.append(out != 0)
    return found


def test_each_replay_draws_a_mask_of_its_own(graphs):
    """Also in the backward, and governed by torch.manual_seed."""
    model, x, g = block(), torch.randn(BATCH, 6, device=DEVICE), torch.randn(BATCH, 16, device=DEVICE)
    results = {}

    def step():
        out = model(x)
        results["out"] = out.detach()
        return torch.autograd.grad(out, model[1].bias, g)[0]

    graph, gradient = capture(step)
    out = results["out"]
    torch.manual_seed(0)
    masks = masks_of(graph, out)
    assert all_differ(masks)
    assert 0 < masks[-1].sum() < masks[-1].numel()
    torch.testing.assert_close(gradient, (2 * g * masks[-1]).sum(0), rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    again = masks_of(graph, out)
    assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))


def test_a_seed_of_the_host_would_show(recorded, monkeypatch):
    seed = torch.tensor(7)
    monkeypatch.setattr(seeds, "dropout_seed", lambda device: seed)
    model, x = block(), torch.randn(BATCH, 6)
    graph, out = capture(lambda: model(x).detach())
    assert not all_differ(masks_of(graph, out))


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # torch's own modules meet it here, too
def test_graphed_callables(graphs):
    """torch.cuda.make_graphed_callables: forward and backward are graphs of their own that share a seed."""
    model, x, g = block(), torch.randn(BATCH, 6, device=DEVICE), torch.randn(BATCH, 16, device=DEVICE)
    graphed = torch.cuda.make_graphed_callables(model, (torch.zeros_like(x),))
    model[1].reset_running_stats()  # which the warm-up has moved
    masks = []
    for _ in range(3):
        model.zero_grad()
        out = graphed(x)
        out.backward(g)
        masks.append(out != 0)
        torch.testing.assert_close(model[1].bias.grad, (2 * g * masks[-1]).sum(0), rtol=1e-5, atol=1e-5)
    assert all_differ(masks)
    assert model[1].num_batches_tracked == 3
    assert torch.equal(model.eval()(x), model(x))  # the plain forward again: no dropout


def test_the_readmes_step(graphs):
    """Narrower than it is written there, for the interpreter's sake."""
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "torch.cuda.graph(" in code]
    here = {'"cuda"': f'"{DEVICE}"', "torch.cuda.is_available()": "True", "784": "6", "100": "16"}
    for written, replacement in here.items():
        assert written in block
        block = block.replace(written, replacement)
    names: dict = {}
    exec(block, names)
    assert names["model"][1].num_batches_tracked == WARM_UP + len(names["batches"])
    assert names["lr"] < 1e-6
    assert 0 < names["loss"] < 10
