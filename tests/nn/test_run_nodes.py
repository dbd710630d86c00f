"""What autograd records of a run, where torch's layers record something else; both sides of each."""

import copy

import pytest
import torch
from support.launched import kernels_launched
from support.sequential_pair import cost, drawn, pair
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK = [nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()]


def models(layers=BLOCK):
    return pair("kernels", copy.deepcopy(layers))


def nodes_of(out):
    """Names of the graph's nodes, without the leaves."""
    found, waiting = [], [out.grad_fn]
    while waiting:
        node = waiting.pop()
        found.append(node.name())
        waiting += [edge for edge, _ in node.next_functions if edge is not None]
    return [name for name in found if "AccumulateGrad" not in name]


def test_a_run_is_one_node():
    ours, theirs = models([*BLOCK, nn.Linear(3, 2), nn.ReLU()])
    assert nodes_of(ours(drawn("kernels", 12, 4))) == ["BlockBackward"] * 2
    names = nodes_of(theirs(drawn("kernels", 12, 4)))
    assert {"ReluBackward0", "AddmmBackward0", "TanhBackward0", "NativeBatchNormBackward0"} <= set(names)


@pytest.mark.filterwarnings("ignore:(Anomaly Detection has been enabled|Error detected in)")
def test_anomaly_mode_names_the_run():
    for model, name in zip(models(), ("BlockBackward", "TanhBackward0"), strict=True):
        with torch.autograd.detect_anomaly():
            out = model(drawn("kernels", 12, 4).requires_grad_())
            with pytest.raises(RuntimeError, match=f"Function '{name}' returned nan"):
                out.backward(torch.full_like(out, torch.nan))


def test_what_is_within_a_run_is_kept_by_a_hook_alone():
    """torch makes an output of each child, which a forward hook shows; with a hook, a child of ours makes one too."""
    for model in models():
        kept = []
        model[0].register_forward_hook(lambda module, inputs, out, kept=kept: kept.append(out))
        out = model(drawn("kernels", 12, 4))
        kept[0].retain_grad()
        cost(out).backward()
        assert kept[0].grad.shape == (12, 3)
    ours, _ = models()
    assert len(nodes_of(ours(drawn("kernels", 12, 4)))) == 1
    ours[0].register_forward_hook(lambda *given: None)
    assert len(nodes_of(ours(drawn("kernels", 12, 4)))) > 1


def test_a_run_saves_its_input_z_statistics_and_seed():
    """And what its Linear and BatchNorm hold; torch saves inputs and outputs of each layer, and the mask."""
    saved = []
    for model in models([nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Dropout(0.5)]):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=shapes: s.append(tuple(t.shape)) or t, lambda t: t):
            model(drawn("kernels", 12, 4))
        saved.append(shapes)
    z_and_statistics = 2 * 3 + 2 + 12 * 3  # z begins at a multiple of 16 bytes
    assert saved[0] == [(12, 4), (3, 4), (3,), (3,), (3,), (z_and_statistics,), ()]
    assert saved[1].count((12, 3)) == 3
    assert (12, 4) in saved[1]


CHANGED = {  # between forward and backward, with what is frozen before
    "Linear's bias": (lambda model, x: model[0].bias, ""),
    "BatchNorm's bias": (lambda model, x: model[1].bias, ""),
    "a frozen Linear's input": (lambda model, x: x, "0.weight"),
    "a frozen Linear's weight": (lambda model, x: model[0].weight, "0.weight"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_a_run_saves_may_not_change_in_place(case):
    tensor, frozen = CHANGED[case]
    for model, raises in zip(models(), (True, False), strict=True):
        x = drawn("kernels", 12, 4)
        if frozen:
            model.get_parameter(frozen).requires_grad_(False)
        out = model(x)
        with torch.no_grad():
            tensor(model, x).mul_(2)
        if raises:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                cost(out).backward()
        else:
            cost(out).backward()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_may_change_in_place(name, train):
    """As of an average of weights, or a broadcast of buffers."""
    ours, theirs = models()
    found = []
    for change in (False, True):
        own, x = copy.deepcopy(ours).train(train), drawn("kernels", 12, 4).requires_grad_()
        out = own(x)
        if change:
            getattr(own[1], name).mul_(2)
        cost(out).backward()
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=0, atol=0)
    out = theirs.train(train)(drawn("kernels", 12, 4))
    getattr(theirs[1], name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cost(out).backward()


def test_gradients_in_eval_are_by_the_statistics_of_their_forward():
    """torch's kernels read them again in the backward, and do not see that a forward in training has moved them."""
    for model, by_those_of_the_forward in zip(models(), (True, False), strict=True):
        found = []
        for moves in (False, True):
            own = copy.deepcopy(model).eval()
            x = drawn("kernels", 12, 4).requires_grad_()
            out = own(x)
            if moves:
                own.train()(drawn("kernels", 12, 4, seed=5))
            cost(out).backward()
            found.append(x.grad)
        assert torch.equal(*found) == by_those_of_the_forward


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid])
def test_an_output_may_change_in_place(activation):
    """Of activations whose derivative torch takes from it."""
    ours, theirs = models([nn.Linear(4, 3), activation()])
    found = []
    for double in (lambda out: out.mul_(2), lambda out: out * 2):
        x = drawn("kernels", 12, 4).requires_grad_()
        cost(double(ours(x))).backward()
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cost(theirs(drawn("kernels", 12, 4)).mul_(2)).backward()


def test_results_of_3d_inputs_are_views():
    ours, theirs = models([nn.Linear(4, 3), nn.Tanh()])
    x = drawn("kernels", 2, 5, 4)
    assert ours(x)._is_view()
    with pytest.raises(RuntimeError, match="Can't detach views in-place"):
        ours(x).detach_()
    assert theirs[:1](x)._is_view()  # a Linear's
    assert not theirs(x)._is_view()
    assert not theirs(x).detach_().requires_grad


def test_gradients_of_a_run_arrive_together():
    orders = []
    for model in models([*BLOCK, nn.Linear(3, 2)]):
        order = []
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name, order=order: order.append(name))
        cost(model(drawn("kernels", 12, 4))).backward()
        orders.append(order)
    assert orders[0] == ["3.weight", "3.bias", "0.weight", "1.weight", "0.bias", "1.bias"]
    assert orders[1] == ["3.bias", "3.weight", "1.weight", "1.bias", "0.bias", "0.weight"]


def test_a_bias_before_batch_statistics_has_a_gradient_without_a_graph():
    for model, graph in zip(models(), (False, True), strict=True):
        loss = cost(model(drawn("kernels", 12, 4)))
        weight, bias = torch.autograd.grad(loss, [model[0].weight, model[0].bias], create_graph=True)
        assert weight.requires_grad
        assert bias.requires_grad == graph


@pytest.mark.parametrize("graph", [False, True])
def test_a_backward_with_a_graph_runs_torchs_ops(graph):
    ours, _ = models()
    loss = cost(ours(drawn("kernels", 12, 4)))
    with kernels_launched() as names:
        torch.autograd.grad(loss, list(ours.parameters()), create_graph=graph)
    assert bool(names) != graph


class Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_modes_and_profilers_see_one_op():
    seen, profiled, x = [], [], drawn("kernels", 12, 4)
    for model in models():
        with Log() as log:
            model(x)
        seen.append(log.names)
        with torch.profiler.profile(acc_events=True) as profile:  # of which torch 2.11 warns otherwise
            model(x)
        profiled.append({event.key for event in profile.key_averages()})
    assert seen[0] == ["fastnn.block_forward.default"]
    assert {"aten.addmm.default", "aten.native_batch_norm.default", "aten.tanh.default"} <= set(seen[1])
    assert "Block" in profiled[0]
    assert {"aten::linear", "aten::batch_norm", "aten::tanh"} <= profiled[1] - profiled[0]
