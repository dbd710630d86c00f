"""Calls of the functional that are settled once: for which tensors, and what makes them be settled anew."""

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from support.optimizers import DEVICE
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastnn
from fastnn import functional, plans, recipes
from fastnn.activations import ACTIVATIONS
from fastnn.functional import BatchNorm, linear_batch_norm_act_dropout
from fastnn.recipes import Backward as backward  # noqa: N813


@pytest.fixture
def checks(monkeypatch):
    """One entry for each call that is settled anew."""
    found, check = [], functional._check
    monkeypatch.setattr(functional, "_check", lambda *arguments: found.append(1) or check(*arguments))
    return found


def tensors_of_a_block(**changed):
    given = {"x": torch.randn(12, 8), "weight": torch.randn(6, 8), "bias": torch.randn(6), "gamma": torch.ones(6)}
    given |= {"beta": torch.zeros(6), "mean": torch.zeros(6), "var": torch.ones(6), "training": True, "p": 0.0}
    return given | {"activation": "relu", "momentum": 0.1, "eps": 1e-5} | changed


def both_blocks(given):
    """(ours, torch's), out and gradients by what asks for one."""
    results = []
    for fused in (True, False):
        norm = BatchNorm(
            given["mean"].clone(), given["var"].clone(), given["gamma"], given["beta"], None, given["training"],
            given["momentum"], given["eps"],
        )  # fmt: skip
        x, weight, bias = given["x"], given["weight"], given["bias"]
        if fused:
            activation, p = given["activation"], given["p"]
            out = linear_batch_norm_act_dropout(x, weight, bias, batch_norm=norm, activation=activation, p=p)
        else:
            y = F.batch_norm(F.linear(x, weight, bias), *norm[:4], norm.training, norm.momentum, norm.eps)
            out = ACTIVATIONS[given["activation"]].function(y, 0, 0)
        leaves = [t for t in (x, weight, given["gamma"]) if t.requires_grad and out.requires_grad]
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        results.append([out, *(torch.autograd.grad(out, leaves, g) if leaves else ()), *norm[:2]])
    return results


FORMS = {
    "rows": {"x": torch.randn(13, 8)},
    "columns": {name: torch.rand(7) for name in ("bias", "gamma", "beta", "mean", "var")}
    | {"weight": torch.randn(7, 8)},
    "strides": {"x": torch.randn(8, 12).t()},
    "a gradient": {"weight": torch.randn(6, 8, requires_grad=True)},
    "dtype": {
        name: tensor.bfloat16() for name, tensor in tensors_of_a_block().items() if isinstance(tensor, torch.Tensor)
    },
    "no bias": {"bias": None},
    "eval": {"training": False},
    "activation": {"activation": "tanh"},
    "momentum": {"momentum": 0.3},
    "eps": {"eps": 0.1},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_call_is_settled_once_for_each_form(form, checks):
    """Another form is settled anew and gives what torch gives, and so does the first form afterwards."""
    for given in (tensors_of_a_block(), tensors_of_a_block(), tensors_of_a_block(**FORMS[form]), tensors_of_a_block()):
        tolerance = 0.05 if given["x"].dtype == torch.bfloat16 else 1e-5
        for mine, theirs in zip(*both_blocks(given), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    assert len(checks) == 2


@pytest.mark.parametrize("around", ["no_grad", "inference_mode", "autocast", "tf32", "plan", "mode"])
def test_what_is_around_a_call_settles_it_anew(around, checks, monkeypatch):
    given = tensors_of_a_block(weight=torch.randn(6, 8, requires_grad=True))

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    contexts = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast(DEVICE, torch.bfloat16),
        "tf32": lambda: patch.object(plans, "fp32_precision", lambda: "tf32"),
        "plan": lambda: plans.forced_plan("split"),
        "mode": Mode,
    }
    both_blocks(given)
    with contexts[around]():
        mine, theirs = both_blocks(given)
        assert mine[0].dtype == theirs[0].dtype
        assert mine[0].requires_grad == theirs[0].requires_grad
        torch.testing.assert_close(mine[0], theirs[0], rtol=0.05, atol=0.05)
    both_blocks(given)
    both_blocks(given)
    assert len(checks) == (3 if around == "plan" else 2)  # leaving a plan is a change, too


def test_a_call_of_a_settled_form_still_raises_for_another(checks):
    given = tensors_of_a_block()
    both_blocks(given)
    with pytest.raises(RuntimeError, match="input must be"):
        both_blocks(given | {"x": torch.randn(12, 9)})
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        both_blocks(given | {"x": torch.randn(1, 8)})
    with pytest.raises(ValueError, match="probability"):
        linear_batch_norm_act_dropout(given["x"], given["weight"], given["bias"], p=1.5)


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("form", ["csr", "csc", "coo"])
def test_sparse_weights_are_torchs(form):
    """Dynamo's guards end the process at compressed ones."""
    weight = getattr(torch.randn(6, 8), f"to_sparse_{form}" if form != "coo" else "to_sparse")()
    x = torch.randn(12, 8)
    for _ in range(2):
        found = linear_batch_norm_act_dropout(x, weight, activation="relu")
        torch.testing.assert_close(found, F.relu(F.linear(x, weight)))


def test_numbers_in_tensors_are_read_at_each_call():
    x, p = torch.randn(64, 64), torch.tensor(0.1)
    norm = BatchNorm(torch.zeros(64), torch.ones(64), momentum=torch.tensor(0.0), eps=torch.tensor(1e-5))
    linear_batch_norm_act_dropout(x, batch_norm=norm)
    assert not norm.running_mean.any()
    norm.momentum.fill_(1.0)
    linear_batch_norm_act_dropout(x, batch_norm=norm)
    torch.testing.assert_close(norm.running_mean, x.mean(0))
    for rate in (0.1, 0.9):
        dropped = linear_batch_norm_act_dropout(x.abs() + 1, activation="relu", p=p.fill_(rate)) == 0
        assert dropped.float().mean().item() == pytest.approx(rate, abs=0.03)


def negative(tensor):
    return torch._neg_view(tensor.detach().clone())


def block_of(kind):
    torch.manual_seed(3)
    return kind(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU())


@pytest.mark.parametrize("where", ["input", "gradient", "weight"])
def test_negative_views_are_negated(where):
    x, g, found = torch.randn(12, 8), torch.randn(12, 16), []
    for kind in (torch.nn.Sequential, fastnn.nn.Sequential):
        model, leaf = block_of(kind), x.clone().requires_grad_()
        if where == "weight":
            model[0].weight = torch.nn.Parameter(negative(model[0].weight))
        out = model(negative(x) if where == "input" else leaf)
        out.backward(negative(g) if where == "gradient" else g)
        found.append([out, *(parameter.grad for parameter in model[1].parameters()), model[0].weight.grad])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_batched_gradients():
    x, model = torch.randn(5, 8), fastnn.nn.Sequential(torch.nn.Linear(8, 3), torch.nn.ReLU())
    one_by_one = torch.autograd.functional.jacobian(model, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(model, x, vectorize=True), one_by_one)


@pytest.mark.parametrize("offset", [16, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [True, False])
def test_what_is_saved_may_come_back_anywhere_in_memory(offset, dtype, train):
    def pack(tensor):
        store = torch.full((offset + tensor.numel(),), 7.0).to(tensor.dtype)
        store[offset:] = tensor.detach().reshape(-1)
        return store, tensor.shape

    def unpack(packed):
        return packed[0][offset:].view(packed[1])

    model, found = block_of(fastnn.nn.Sequential).to(dtype).train(train), []
    for hooks in (nullcontext(), torch.autograd.graph.saved_tensors_hooks(pack, unpack)):
        x = torch.linspace(-1, 1, 96).view(12, 8).to(dtype).requires_grad_()
        with hooks:
            out = model(x)
        found.append(torch.autograd.grad(out.square().sum(), [x, *model.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_counter_on_another_device_is_torchs():
    norm = BatchNorm(torch.zeros(8), torch.ones(8), num_batches_tracked=torch.tensor(0, device="meta"))
    settled = functional._settle(functional.ops.tensors_of(torch.ones(4, 8), None, None, norm), norm, "relu", (0, 0), 0)
    assert settled is None


def test_gradients_follow_the_settings_of_their_own_time(monkeypatch):
    given = tensors_of_a_block(weight=torch.randn(6, 8, requires_grad=True))
    norm = BatchNorm(given["mean"], given["var"])
    made = []
    monkeypatch.setattr(recipes, "Backward", lambda *arguments: made.append(1) or backward(*arguments))
    for setting, count in (("tf32", 1), ("ieee", 2), ("ieee", 2)):
        out = linear_batch_norm_act_dropout(given["x"], given["weight"], batch_norm=norm)
        monkeypatch.setattr(plans, "fp32_precision", lambda setting=setting: setting)
        out.sum().backward()
        monkeypatch.setattr(plans, "fp32_precision", lambda: "ieee")
        assert len(made) == count


def test_pre_dispatch_tracing_records_the_op():
    model = block_of(fastnn.nn.Sequential).eval().requires_grad_(False)
    graph = make_fx(model, pre_dispatch=True)(torch.randn(12, 8))
    assert "fastnn.block_forward" in graph.code
