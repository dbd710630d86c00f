"""An optimizer's step inside torch.compile is torch's own, graph for graph, and the kernels go on where it left off."""

import copy

import pytest
import torch
from support.launched import kernels_launched
from support.optimizers import SEVEN, copies, ours, parameters, set_gradients, state_tensors, theirs
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.lr_scheduler import ExponentialLR

import fastnn

pytestmark = [
    pytest.mark.usefixtures("nothing_compiled"),
    pytest.mark.real_empty,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # by AOTAutograd
]
FLAGS = {"SGD": {"momentum": 0.9, "nesterov": True}, "Adam": {"amsgrad": True}, "RMSprop": {"centered": True}}


def compiled_steps(optimizer, params):
    """The graphs of five steps as (op, target) of their nodes, by a schedule; and the kernels launched."""
    schedule = ExponentialLR(optimizer, 0.7)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(optimizer.step, backend=counter)
    with kernels_launched() as launched:
        for number in range(5):
            set_gradients(number, params)
            step()
            schedule.step()
    graphs = [[(node.op, str(node.target)) for node in graph.graph.nodes] for graph in counter.graphs]
    return graphs, launched


@pytest.mark.parametrize("name", SEVEN)
def test_a_compiled_step_is_torchs_own_to_the_bit(name):
    """As many graphs of the same nodes, no launch of ours, and a rate that a schedule moves."""
    found = []
    for factory in (ours, theirs):
        params = parameters([(30,), (4, 5)])
        optimizer = factory(name)(params, lr=torch.tensor(0.1), weight_decay=0.1, **FLAGS.get(name, {}))
        found.append((compiled_steps(optimizer, params), state_tensors(optimizer, params)))
    ((graphs, launches), mine), ((expected, _), plain) = found
    assert graphs == expected
    assert sum(map(len, graphs)) > 5
    assert launches == []
    assert mine.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in mine.items())


@pytest.mark.parametrize("name", SEVEN)
def test_compiled_steps_and_those_of_the_kernels_take_turns(name):
    """One state for both: counts above all, which each keeps its own way."""
    params, compiled, found = parameters([(30,), (4, 5)]), (False, True, True, False, True, False), []
    for factory in (ours, theirs):
        own, launches = copies(params), []
        optimizer = factory(name)(own, lr=0.1)
        steps = optimizer.step, torch.compile(optimizer.step, backend="eager")
        for number, by_compiler in enumerate(compiled):
            set_gradients(number, own)
            with kernels_launched() as launched:
                steps[by_compiler]()
            launches.append(len(launched))
        found.append((launches, state_tensors(optimizer, own)))
    (launches, mine), (_, plain) = found
    assert launches == [1, 0, 0, 1, 0, 1]
    torch.testing.assert_close(mine, plain, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", SEVEN)
def test_a_training_step_compiled_as_a_whole_is_torchs(name):
    """Forward, backward and step of our module and our optimizer in one compiled function."""
    layers = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    ends = []
    for library, container in ((fastnn, fastnn.nn.Sequential), (torch, nn.Sequential)):
        model = container(*copy.deepcopy(layers))
        optimizer = getattr(library.optim, name)(model.parameters(), lr=0.01)

        def step(x, y, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            value = loss.detach()
            loss.backward()
            optimizer.step()
            return value

        taken = torch.compile(step, backend="aot_eager") if library is fastnn else step
        generator = torch.Generator().manual_seed(3)
        batches = [(torch.randn(12, 6, generator=generator), torch.arange(12) % 3) for _ in range(4)]
        losses = [taken(*batch) for batch in batches]
        ends.append([torch.stack(losses), dict(model.state_dict())])
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)
