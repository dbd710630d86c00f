"""What a run does otherwise than its layers called one by one: whom it calls, what it refuses; both sides of each."""

import copy
import pickle
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from support.launched import kernels_launched
from support.sequential_pair import cost, drawn, pair
from torch import nn
from torch.overrides import TorchFunctionMode

import fastnn

BLOCK = [nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()]


def models(layers=BLOCK):
    return pair("kernels", copy.deepcopy(layers))


def patched(owner, name, calls):
    original = getattr(owner, name)
    return patch.object(owner, name, lambda *given: calls.append(name) or original(*given))


@pytest.mark.parametrize(("owner", "name"), [(nn.Linear, "__call__"), (F, "linear")])
def test_patches_of_calls_and_functions_are_not_seen(owner, name):
    seen = []
    for model in models():
        calls = []
        model(drawn("kernels", 12, 4))
        with patched(owner, name, calls):
            model(drawn("kernels", 12, 4))
        seen.append(calls)
    assert seen == [[], [name]]


@pytest.mark.parametrize("name", ["linear", "batch_norm"])
def test_a_fused_model_sees_patches_of_functions(name):
    model = fastnn.fuse(models()[1])
    model(drawn("kernels", 12, 4))
    calls = []
    with patched(F, name, calls):
        model(drawn("kernels", 12, 4))
    assert calls == [name]


class Nothing(TorchFunctionMode):
    """Whose Linear gives zeros."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return out * 0 if function is F.linear else out


def test_modes_of_functions_change_no_run():
    ours, theirs = models([nn.Linear(4, 3), nn.Sigmoid()])
    fused, x = fastnn.fuse(copy.deepcopy(theirs)), drawn("kernels", 12, 4)
    expected = fused(x)
    with Nothing():
        torch.testing.assert_close(ours(x), expected)
        assert (theirs(x) == 0.5).all()
        assert (fused(x) == 0.5).all()


TRANSFORMS = {
    "vmap": lambda model, x: torch.vmap(model)(x[None]),
    "grad": lambda model, x: torch.func.grad(lambda x: cost(model(x)))(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_launch_no_kernel(transform):
    model, x = models()[0].eval(), drawn("kernels", 12, 4)
    with kernels_launched() as outside:
        model(x)
    with kernels_launched() as within:
        TRANSFORMS[transform](model, x)
    assert (len(outside) > 0, len(within)) == (True, 0)


class Named(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Linear(width, width), nn.ReLU())


class FusedNamed(fastnn.nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Linear(width, width), nn.ReLU())


def test_a_slice_of_a_subclass_is_a_plain_sequential():
    """torch calls the subclass's constructor with the layers."""
    assert type(FusedNamed(3)[:1]) is fastnn.nn.Sequential
    with pytest.raises(TypeError):
        Named(3)[:1]


def test_pickles_name_the_class():
    """What is loaded where fastnn is not installed is a state_dict."""
    ours, theirs = (pickle.dumps(model) for model in models())
    assert b"fastnn.nn.sequential" in ours
    assert b"fastnn" not in theirs
    assert all(b"fastnn" not in pickle.dumps(model.state_dict()) for model in models())


def test_a_refused_batch_is_not_counted():
    for model, counted in zip(models(), (0, 1), strict=True):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(drawn("kernels", 1, 4))
        assert model[1].num_batches_tracked == counted


def test_runs_before_the_one_that_refuses_have_run():
    """As torch's layers before the one that raises: statistics of the first run have moved."""
    for model in models([*BLOCK, nn.Linear(4, 2), nn.Tanh()]):
        before = model[1].running_mean.clone()
        with pytest.raises(RuntimeError):
            model(drawn("kernels", 12, 4))
        assert model[1].num_batches_tracked == 1
        assert not torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize(("p", "train", "errors"), [
    (2.0, True, (ValueError, ValueError)),
    (2.0, False, (None, ValueError)),
    (float("nan"), True, (ValueError, RuntimeError)),
])  # fmt: skip
def test_a_rate_out_of_range(p, train, errors):
    """Set after the constructor, which refuses it."""
    for model, error in zip(models([nn.Linear(4, 3), nn.Dropout(0.5)]), errors, strict=True):
        model.train(train)[1].p = p
        if error is None:
            model(drawn("kernels", 12, 4))
        else:
            with pytest.raises(error, match="dropout probability"):
                model(drawn("kernels", 12, 4))


@pytest.mark.parametrize("activation", [nn.LeakyReLU(-0.5, inplace=True), nn.ELU(-0.5, inplace=True)], ids=str)
def test_negative_slopes_in_place(activation):
    ours, theirs = models([nn.Linear(4, 3), activation])
    found = []
    for in_place in (True, False):
        ours[1].inplace = in_place
        x = drawn("kernels", 12, 4).requires_grad_()
        cost(ours(x)).backward()
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="negative slope which is not supported"):
        cost(theirs(drawn("kernels", 12, 4))).backward()


@pytest.mark.real_empty
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's of Functions
def test_a_cumulative_average_compiles_in_one_graph():
    """torch's BatchNorm1d takes the count to the host, where Dynamo ends the graph."""
    ours, theirs = models([nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=None), nn.Tanh()])
    x, plain = drawn("kernels", 12, 4), copy.deepcopy(theirs)
    torch.testing.assert_close(torch.compile(ours, backend="eager", fullgraph=True)(x), plain(x))
    torch.testing.assert_close(ours[1].running_mean, plain[1].running_mean)
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
        torch.compile(theirs, backend="eager", fullgraph=True)(x)
    torch.compiler.reset()


def test_importing_fastnn_imports_dynamo():
    for packages, imported in (("torch", "False"), ("torch, fastnn", "True")):
        code = f"import sys, {packages}; print('torch._dynamo' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == imported
