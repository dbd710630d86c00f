"""torch.compile(model, backend="fastnn"): through the entry point, with Inductor for the rest."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import fastnn
from fastnn import seeds

pytestmark = [
    pytest.mark.usefixtures("nothing_compiled"),
    pytest.mark.real_empty,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # by AOTAutograd
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8)
        self.fc, self.bn, self.head = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = F.gelu(self.norm(self.conv(x))).max(2).values
        x = self.drop(F.relu(self.bn(self.fc(x))))
        return F.log_softmax(self.head(x).sin(), 1)


def test_installing_registers_it():
    assert "fastnn" in torch._dynamo.list_backends()


@pytest.mark.parametrize("settings", [{}, {"mode": "reduce-overhead"}, {"options": {"epilogue_fusion": False}}])
def test_a_step_of_inductor_equals_eagers(settings):
    """In one graph, for every batch size after the second."""
    plain = Net()
    plain.drop.p = 0.0
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, backend="fastnn", fullgraph=True, **settings)
    for B in (4, 6, 7) if not settings else (4,):
        x = torch.randn(B, 3, 5)
        outs = [call(x) for call in (plain, compiled)]
        torch.testing.assert_close(*outs)
        g = torch.randn_like(outs[0])
        for module, out in zip((plain, model), outs, strict=True):
            module.zero_grad()
            out.backward(g)
        for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))


def counted(model, x, monkeypatch):
    """Calls of our ops in the graphs that AOTAutograd makes, forward and backward."""
    found = []

    def compiler(graph, inputs):
        called = [str(part) for node in graph.graph.nodes for part in (node.target, *node.args[:1])]
        found.extend(name for name in called if name.startswith("fastnn."))  # or an argument of what functionalises it
        return make_boxed_func(graph.forward)

    inductor = aot_autograd(fw_compiler=compiler)
    monkeypatch.setattr("fastnn.compile.lookup_backend", lambda name: lambda *given, config_patches: inductor(*given))
    torch.compile(model, backend="fastnn", fullgraph=True)(x).sum().backward()
    return len(found)


@pytest.mark.parametrize("flagged", [True, False])
def test_runs_are_our_ops(flagged, monkeypatch):
    """Also where is_compiling() is False for AOTAutograd, as in torch 2.11."""
    if not flagged:
        monkeypatch.setattr("torch.compiler._compile_session_context", contextlib.nullcontext, raising=False)
    assert counted(Net(), torch.randn(4, 3, 5), monkeypatch) == 2 * 2
    own = fastnn.nn.Sequential(
        nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)
    )
    assert counted(own, torch.randn(4, 8), monkeypatch) == 2 * 2  # a Linear alone is Inductor's


def test_seeds_are_drawn_in_the_graph():
    """On a GPU too, where an eager call asks the generator on the host."""
    with torch._subclasses.FakeTensorMode(), torch._guards.tracing(torch._guards.TracingContext(None)):
        assert seeds.dropout_seed(torch.device("cuda", 0)).device.type == "cuda"


def test_each_step_drops_others():
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.5))
    nn.init.ones_(model[0].bias)
    nn.init.zeros_(model[0].weight)
    compiled = torch.compile(model, backend="fastnn")
    first, second = (compiled(torch.ones(64, 8)) != 0 for _ in range(2))
    for mask in (first, second, first == second):
        assert (mask.double().mean() - 0.5).abs() < 5 * 0.5 / 64


def test_fastnn_modules_keep_their_own_path():
    model = fastnn.nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU())
    x = torch.randn(12, 8)
    compiled = torch.compile(copy.deepcopy(model), backend="fastnn", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
