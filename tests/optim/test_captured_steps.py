"""An optimizer's step in a CUDA graph: which numbers are live, what is counted, and what a capture needs."""

import pytest
import torch
from support.captures import BATCH, WARM_UP, Training, all_differ, capture
from support.optimizers import DEVICE, HAS_FUSED, ours
from torch import nn
from torch.nn import functional as F

import fastnn
from fastnn.kernels import tables
from fastnn.kernels.tables import Tables


@pytest.mark.parametrize("as_tensor", [True, False], ids=["tensor", "number"])
def test_rates_that_are_tensors_are_read_at_each_replay(as_tensor, graphs):
    lr = torch.tensor(0.1, device=DEVICE) if as_tensor else 0.1
    training = Training(fastnn, "AdamW", lr=lr, capturable=True)
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
    graph, _ = capture(training.step)
    state = training.optimizer.state[training.model[0].weight]
    before = training.model[0].weight.clone()
    for replays in range(4):
        assert training.model[1].num_batches_tracked == state["step"] == WARM_UP + replays
        assert torch.equal(training.model[0].weight, before) == (replays == 0)
        graph.replay()
        norm = torch.nn.utils.get_total_norm([p.grad for p in training.model.parameters()])
        torch.testing.assert_close(training.optimizer.grad_norm, norm)


def test_steps_as_they_are_between_replays(graphs):
    """With gradients of their own, at addresses that stay: neither reads what the other has put in its tables."""
    ends = []
    for use_graph in (True, False):
        training = Training(fastnn, "AdamW", lr=0.01, capturable=True)
        params = list(training.model.parameters())
        own = [torch.zeros_like(param) for param in params]

        def step(training=training, params=params, own=own):
            for param, grad in zip(params, own, strict=True):
                param.grad = grad.zero_()
            F.cross_entropy(training.model(training.x), training.y).backward()
            training.optimizer.step()

        graph = capture(training.step)[0] if use_graph else None
        for _ in range(0 if use_graph else WARM_UP):
            training.step()
        for between in (False, True, False, True, False):
            training.x.neg_()
            if between and graph is not None:
                graph.replay()
            else:
                step()
        ends.append(params)
    for mine, plain in zip(*ends, strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("name", HAS_FUSED)
def test_the_scale_of_gradients_and_skipped_steps(name, graphs):
    """fused=True: only then GradScaler leaves unscaling and overflow to the step, and reads nothing on the host."""
    training = Training(fastnn, name, lr=0.01, fused=True)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**8, growth_interval=2)

    def step():
        training.optimizer.zero_grad()
        loss = F.cross_entropy(training.model(training.x), training.y)
        scaler.scale(loss).backward()
        scaler.step(training.optimizer)
        scaler.update()
        return loss.detach()

    graph, _ = capture(step)
    state = training.optimizer.state[training.model[0].weight]
    assert (scaler.get_scale(), state.get("step", 3)) == (2.0**9, 3)  # SGD counts none
    training.x[0, 0] = float("inf")
    before = training.model[0].weight.clone()
    graph.replay()
    assert (scaler.get_scale(), state.get("step", 3)) == (2.0**8, 3)
    assert torch.equal(training.model[0].weight, before)
    training.x.normal_()
    graph.replay()
    assert (scaler.get_scale(), state.get("step", 4)) == (2.0**8, 4)
    assert not torch.equal(training.model[0].weight, before)


def test_random_rounding_draws_anew_at_each_replay(graphs):
    """A quarter of a unit in the last place: each step takes a unit from another quarter of the elements."""
    param = nn.Parameter(torch.full((4096,), 0.75, dtype=torch.bfloat16, device=DEVICE))
    optimizer = ours("SGD")([param], lr=2.0**-10, stochastic_rounding=True)
    param.grad = torch.ones_like(param)
    graph, _ = capture(optimizer.step)
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
    with pytest.raises(RuntimeError, match="capturable=True"):
        capture(training.step)


@pytest.fixture
def pinned(monkeypatch):
    """What is staged as for a GPU is in this list, which no capture adds to."""
    made = []

    def pinned_like(values):
        assert not fastnn.memory.is_capturing()
        made.append(torch.empty_like(values))
        return made[-1]

    monkeypatch.setattr(tables, "is_capturing", lambda device: fastnn.memory.is_capturing())
    monkeypatch.setattr(tables, "copies_from_pinned", lambda device: True)
    monkeypatch.setattr(tables, "pinned_like", pinned_like)
    monkeypatch.setattr(tables, "_set_aside", {})
    return made


def adamw_step():
    return Training(fastnn, "AdamW", lr=0.01, capturable=True).step


def clipped_step(dtypes=(torch.float32,) * 2):
    """Parameters of as many elements, in groups of their own."""
    params = [nn.Parameter(torch.ones(18, dtype=dtype)) for dtype in dtypes]
    optimizer = ours("SGD")([{"params": [param]} for param in params], lr=0.1)

    def step():
        for param in params:
            param.grad = torch.ones_like(param)
        fastnn.nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.step()

    return step


@pytest.mark.parametrize(
    "make",
    [adamw_step, clipped_step, lambda: clipped_step((torch.float32, torch.bfloat16))],
    ids=["AdamW", "clipping", "two dtypes"],
)
def test_what_a_capture_uploads_has_been_pinned_before(make, recorded, pinned, monkeypatch):
    stage, step = Tables._stage, make()

    def watched(self, name, values, dtype=torch.int64):
        staged = stage(self, name, values, dtype)
        assert any(staged is memory for memory in pinned), name
        return staged

    monkeypatch.setattr(Tables, "_stage", watched)
    for _ in range(2):  # as for another batch size
        capture(step)
