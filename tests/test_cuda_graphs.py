"""Steps in CUDA graphs: what a replay draws, reads and counts anew. Recorded on a CPU, and real ones on a GPU."""

import contextlib
from collections import Counter

import pytest
import torch
from support.numerics import judge_tensor
from support.optimizers import DEVICE, SEVEN, ours, state_tensors, theirs
from support.recorded_graph import recorded_graphs
from torch import nn
from torch.nn import functional as F

import fastnn
from fastnn import seeds
from fastnn.kernels.tables import Tables

WARM_UP, REPLAYS, BATCH = 3, 3, 12
SETTINGS = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True},  # has no counts
    "Adagrad": {"lr": 0.01, "fused": True},  # has no capturable
    **{name: {"lr": 0.01, "capturable": True} for name in ("Adam", "AdamW", "NAdam", "RMSprop")},
    "Adadelta": {"lr": 1.0, "capturable": True},
}


def skip_unless(kind):
    if kind == "cuda" and DEVICE != "cuda":
        pytest.skip("real CUDA graphs need a GPU and FASTNN_TEST_DEVICE=cuda")
    if kind == "recorded" and DEVICE == "cuda":
        pytest.skip("graphs are recorded in Triton's interpreter only")


@pytest.fixture(params=["recorded", "cuda"])
def graphs(request):
    skip_unless(request.param)
    with recorded_graphs() if request.param == "recorded" else contextlib.nullcontext():
        yield


@pytest.fixture
def recorded():
    skip_unless("recorded")
    with recorded_graphs():
        yield


def capture(step, warm_up=WARM_UP):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


class Training:
    """An MLP, its optimizer and a schedule; a step works on the batch in `x` and `y`."""

    def __init__(self, library, name, dtype=torch.float32, p=0.0, autocast=False, activation=nn.ReLU, **settings):
        generator = torch.Generator().manual_seed(1)
        self.model = library.nn.Sequential(
            nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), activation(), nn.Dropout(p),
            nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8), activation(), nn.Dropout(p),
            nn.Linear(8, 3),
        )  # fmt: skip
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, 0.5, 0.5, generator=generator)
        self.model.to(DEVICE, dtype)
        self.autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=autocast, cache_enabled=False)
        self.optimizer = getattr(library.optim, name)(self.model.parameters(), **settings)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.7)
        self.x = torch.zeros(BATCH, 6, device=DEVICE, dtype=dtype)
        self.y = torch.zeros(BATCH, device=DEVICE, dtype=torch.int64)
        self.losses = []

    def step(self):
        self.optimizer.zero_grad()
        with self.autocast:
            loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def train(self, step, batches, order=slice(None)):
        for x, y in batches:
            self.x.copy_(x[order])
            self.y.copy_(y[order])
            self.losses.append(step().clone())
            self.schedule.step()

    def results(self):
        state = state_tensors(self.optimizer, list(self.model.parameters()))
        return {"losses": torch.stack(self.losses), **state, **dict(self.model.named_buffers())}


def batches(count=WARM_UP + REPLAYS):
    generator = torch.Generator().manual_seed(2)
    draws = [torch.randn(BATCH, 6, generator=generator).to(DEVICE) for _ in range(count)]
    return [(x, torch.randint(3, (BATCH,), generator=generator).to(DEVICE)) for x in draws]


def graphed(training):
    """The training's step as replays."""
    graph, loss = capture(training.step, warm_up=0)

    def step():
        graph.replay()
        return loss

    return step


def assert_as_torch(name, optimizer_settings, **settings):
    """Three steps as they are and three replays, against six of torch.nn in float64; E of three orders of the rows."""
    tensor_rate = {"lr": torch.tensor(optimizer_settings["lr"], device=DEVICE)}
    mine = Training(fastnn, name, **settings, **optimizer_settings | tensor_rate)
    mine.train(mine.step, batches()[:WARM_UP])
    mine.train(graphed(mine), batches()[WARM_UP:])
    eager = []
    numbers = {key: value for key, value in optimizer_settings.items() if key not in ("capturable", "fused")}
    for dtype, order in ((torch.float64, 0), (torch.float32, 0), (torch.float32, 1), (torch.float32, 2)):
        autocast = settings.get("autocast", False) and dtype == torch.float32
        plain = Training(torch, name, dtype, **settings | {"autocast": autocast}, **numbers)
        rows = torch.randperm(BATCH, generator=torch.Generator().manual_seed(order))
        plain.train(plain.step, batches(), rows)
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
