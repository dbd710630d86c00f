"""Steps in CUDA graphs: what a replay draws, reads and counts anew. Recorded on a CPU, and real ones on a GPU."""

import contextlib
from collections import Counter

import pytest
import torch
from support.numerics import judge_tensor
from support.optimizers import DEVICE, SEVEN, ours, state_tensors
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


def all_differ(masks):
    return not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


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


@pytest.mark.parametrize("as_tensor", [True, False], ids=["tensor", "number"])
def test_rates_that_are_tensors_are_read_at_each_replay(as_tensor, graphs):
    lr = torch.tensor(0.1, device=DEVICE) if as_tensor else 0.1
    training = Training(fastnn, "AdamW", lr=lr, capturable=True)
    training.train(training.step, batches(1))
    graph, _ = capture(training.step)
    if as_tensor:
        lr.zero_()
    else:
        training.optimizer.param_groups[0]["lr"] = 0.0
    before = training.model[0].weight.clone()
    graph.replay()
    assert torch.equal(training.model[0].weight, before) == as_tensor


def test_counts_move_with_the_replays_alone(graphs):
    """A capture is no step. BatchNorm's batches, the optimizer's steps, and the norm of each step's gradients."""
    training = Training(fastnn, "NAdam", lr=0.01, capturable=True, max_grad_norm=0.5)
    training.train(training.step, batches(1))
    graph, _ = capture(training.step)
    state = training.optimizer.state[training.model[0].weight]
    before = training.model[0].weight.clone()
    for replays in range(4):
        assert training.model[1].num_batches_tracked == state["step"] == 1 + WARM_UP + replays
        assert torch.equal(training.model[0].weight, before) == (replays == 0)
        graph.replay()
        norm = torch.nn.utils.get_total_norm([p.grad for p in training.model.parameters()])
        torch.testing.assert_close(training.optimizer.grad_norm, norm)


def test_the_scale_of_gradients_and_skipped_steps(graphs):
    """fused=True is what has GradScaler leave unscaling and overflow to the step, which it else reads."""
    training = Training(fastnn, "Adam", lr=0.01, fused=True)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**8, growth_interval=2)
    training.x.normal_()

    def step():
        training.optimizer.zero_grad()
        loss = F.cross_entropy(training.model(training.x), training.y)
        scaler.scale(loss).backward()
        scaler.step(training.optimizer)
        scaler.update()
        return loss.detach()

    graph, _ = capture(step, warm_up=2)
    state = training.optimizer.state[training.model[0].weight]
    assert (scaler.get_scale(), state["step"]) == (2.0**9, 2)
    training.x[0, 0] = float("inf")
    before = training.model[0].weight.clone()
    graph.replay()
    assert (scaler.get_scale(), state["step"]) == (2.0**8, 2)
    assert torch.equal(training.model[0].weight, before)
    training.x.normal_()
    graph.replay()
    assert (scaler.get_scale(), state["step"]) == (2.0**8, 3)
    assert not torch.equal(training.model[0].weight, before)


def test_random_rounding_draws_anew_at_each_replay(graphs):
    """A quarter of a unit in the last place: each step takes a unit from another quarter of the elements."""
    param = nn.Parameter(torch.full((4096,), 0.75, dtype=torch.bfloat16, device=DEVICE))
    optimizer = ours("SGD")([param], lr=2.0**-10, stochastic_rounding=True)
    param.grad = torch.ones_like(param)
    graph, _ = capture(optimizer.step, warm_up=1)
    moved = []
    for _ in range(3):
        before = param.detach().clone()
        graph.replay()
        moved.append(before != param)
        assert moved[-1].float().mean().item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 4096) ** 0.5)
    assert all_differ(moved)


def test_clipping_reads_the_norm_of_each_replay(graphs):
    model = nn.Linear(6, 3, device=DEVICE)
    optimizer = ours("SGD")(model.parameters(), lr=0.1)
    x = torch.ones(BATCH, 6, device=DEVICE)

    def step():
        optimizer.zero_grad()
        model(x).sum().backward()
        norm = fastnn.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        return norm

    graph, norm = capture(step)
    for scale in (1.0, 3.0):
        x.fill_(scale)
        before = [p.detach().clone() for p in model.parameters()]
        graph.replay()
        torch.testing.assert_close(norm, torch.tensor(BATCH * (18 * scale**2 + 3) ** 0.5, device=DEVICE))
        change = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
        torch.testing.assert_close(change.norm(), torch.tensor(0.05, device=DEVICE), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["Adam", "Adagrad"])
def test_counts_on_the_host_refuse_a_capture(name, recorded):
    training = Training(fastnn, name, lr=0.01)
    training.train(training.step, batches(1))
    with pytest.raises(RuntimeError, match="capturable=True"):
        capture(training.step)


def test_graphed_callables(graphs):
    """torch.cuda.make_graphed_callables: forward and backward are graphs of their own that share a seed."""
    model, x, g = block(), torch.randn(BATCH, 6, device=DEVICE), torch.randn(BATCH, 16, device=DEVICE)
    keys = [key for key, _ in model.named_parameters()]
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
    assert keys == [key for key, _ in model.named_parameters()]
    assert torch.equal(model.eval()(x), model(x))  # the plain forward again: no dropout


def test_what_a_capture_uploads_has_been_set_aside_before(recorded, monkeypatch):
    """A capture may not ask for pinned memory: of each table one of that shape is left from a step before it."""
    left = Counter()
    stage = Tables._stage

    def counted(self, name, values, dtype=torch.int64):
        staged = stage(self, name, values, dtype)
        capturing = fastnn.memory.is_capturing()
        left[name, staged.shape] = left[name, staged.shape] - 1 if capturing else 1
        assert left[name, staged.shape] >= 0, name
        return staged

    monkeypatch.setattr(Tables, "_stage", counted)
    training = Training(fastnn, "AdamW", lr=0.01, capturable=True)
    training.train(training.step, batches(1))
    for _ in range(2):  # as for another batch size
        capture(training.step)
