"""Modules under torch.compile and torch.export: no graph break, two compiles, masks of their own, torch's results."""

import copy
import io

import pytest
import torch
from support.sequential_pair import cost, drawn, pair, stack, state_of
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastnn
from fastnn import functional

pytestmark = [
    pytest.mark.usefixtures("nothing_compiled"),
    pytest.mark.real_empty,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # by AOTAutograd
]
BATCHES = (12, 20, 33, 5, 64, 7, 8, 100, 2, 31)


class Shared(nn.Module):
    """One block twice."""

    def __init__(self, make):
        super().__init__()
        self.block = make(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.GELU())

    def forward(self, x):
        return self.block(self.block(x))


# A bias before BatchNorm has a gradient of rounding noise in eager: none has one.
MODULES = {
    "block": lambda make: make(*fastnn.nn.LinearBatchNormReLUDropout(4, 6, p=0.0, bias=False)),
    "MLP": lambda make: make(*fastnn.nn.MLP(4, [6, 5], norm_layer=nn.BatchNorm1d, activation_layer=nn.ELU, bias=False)),
    "no Linear": lambda make: make(nn.BatchNorm1d(4), nn.Softplus(), nn.Dropout(0.0)),
    "no statistics kept": lambda make: make(
        nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, affine=False, track_running_stats=False)
    ),
    "nested": lambda make: make(make(nn.Linear(4, 6), nn.SiLU()), nn.LayerNorm(6), nn.Linear(6, 3), nn.Sigmoid()),
    "in place": lambda make: make(nn.Linear(4, 6), nn.LeakyReLU(0.1, inplace=True), nn.Linear(6, 3), nn.ReLU(True)),
    "shared": Shared,
}


def both(case):
    """The same layers in fastnn's containers and in torch's, with random statistics."""
    ours, theirs = (MODULES[case](make) for make in (fastnn.nn.Sequential, nn.Sequential))
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm1d) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    theirs.load_state_dict(ours.state_dict())
    assert not any(isinstance(module, fastnn.nn.Sequential) for module in theirs.modules())
    return ours, theirs


def results(call, model):
    """Outputs, gradients and buffers of two steps, then of one in eval; then without gradients."""
    found = []
    for seed, train in enumerate((True, True, False)):
        model.train(train).zero_grad()
        x = drawn("kernels", 12, 4, seed=seed).requires_grad_()
        out = call(x)
        cost(out, seed).backward()
        found.append([out.detach(), x.grad, *copy.deepcopy(state_of(model))])
    with torch.no_grad():
        return [*found, call(x)]


@pytest.mark.parametrize("case", MODULES)
def test_modules_compile_without_a_graph_break_and_are_torchs(case):
    ours, theirs = both(case)
    counter = CompileCounterWithBackend("aot_eager")
    found = results(torch.compile(ours, backend=counter, fullgraph=True), ours)
    torch.testing.assert_close(found, results(theirs, theirs), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 3  # train, eval, and without gradients
    for graph in counter.graphs:
        assert any(node.target is functional.block for node in graph.graph.nodes)


@pytest.mark.parametrize("mode", ["train", "eval", "without gradients"])
def test_ten_batch_sizes_are_two_compilations_and_each_is_torchs(mode):
    ours, theirs = pair("kernels", stack())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours.train(mode == "train"), backend=counter, fullgraph=True)
    theirs.train(mode == "train")
    for rows in BATCHES:
        found = []
        for model, call in ((ours, compiled), (theirs, theirs)):
            model.zero_grad()
            with torch.set_grad_enabled(mode != "without gradients"):
                out = call(drawn("kernels", rows, 4, seed=rows))
            if out.requires_grad:
                cost(out).backward()
            found.append([out, *state_of(model)])
        del found[0][1]["0.bias"], found[1][1]["0.bias"]  # exact zeros, and rounding noise
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)  # of two rows are ±1: differences of equals
    assert len(set(BATCHES)) == 10
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_layers_draw_masks_of_their_own_which_the_backward_draws_again(backend):
    """Two layers alike, whose gradient by inputs of one is the mask: partitioners may recompute, and merge, calls."""
    layers = [fastnn.nn.Sequential(nn.ReLU(), nn.Dropout(0.5)) for _ in range(2)]
    compiled = torch.compile(lambda x, y: (layers[0](x), layers[1](y)), backend=backend, fullgraph=True)

    def step():
        leaves = [torch.ones(64, 64, requires_grad=True) for _ in layers]
        outs = compiled(*leaves)
        torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
        for leaf, out in zip(leaves, outs, strict=True):
            assert torch.equal(leaf.grad, out)
        return [out != 0 for out in outs]

    torch.manual_seed(5)
    (first, second), (third, _) = step(), step()
    for one, other in ((first, second), (first, third), (second, third)):
        assert ((one == other).double().mean() - 0.5).abs() < 5 * 0.5 / 64
    torch.manual_seed(5)
    again, _ = step()
    assert torch.equal(again, first)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("case", MODULES)
def test_an_exported_model_in_eval_runs_without_us(case, strict):
    """torch.export's own program: of aten's ops alone, saved, loaded and run on batches of any size."""
    ours, theirs = (model.eval() for model in both(case))
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(ours, (drawn("kernels", 12, 4),), dynamic_shapes=({0: rows},), strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    with torch.device("cpu"):  # the loader fills tensors of the default device from the CPU's memory
        loaded = torch.export.load(file)
    called = {str(node.target) for node in loaded.graph.nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") for name in called)
    program = loaded.module()
    for M in (12, 5, 31):
        x = drawn("kernels", M, 4, seed=M)
        torch.testing.assert_close(program(x), theirs(x))
