"""A transformed model of the zoo trains as the plain one does, by the rule of support.numerics."""

import pytest
import torch
import torch.nn.functional as F
from support.published_models import MODELS
from support.training_pair import drops, judge_dropout, judge_step, judge_training
from torch import Tensor, nn

from fastnn import dispatch

# Where it goes on after a graph break, Dynamo asks tensors that are no leaves for .grad, and hides the warning of it
# from those who print it, not from those who raise it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

TRANSFORMS = {"recompiled": lambda model: torch.compile(model, backend="eager")}
WITH_DROPOUT = [name for name, published in MODELS.items() if drops(published.make())]
INTERPRETED = ("course DNN",)  # all of them would train in Triton's interpreter for six minutes of a core

transformed = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


@pytest.fixture(autouse=True)
def nothing_compiled():
    yield
    torch.compiler.reset()


@pytest.fixture
def eager_path(name, monkeypatch):
    """The many steps and draws of most models are computed by torch's ops, whatever op they are part of."""
    if name not in INTERPRETED:
        monkeypatch.setattr(dispatch, "HAS_KERNELS", False)


@pytest.mark.parametrize("name", MODELS)
def test_runs_are_of_the_model(name):
    modules = dict(MODELS[name].make().named_modules(remove_duplicate=False))
    for run in MODELS[name].runs:
        called = [type(modules[module]).__name__.lower() for module in run.modules]
        layers = [layer.lower().replace("_", "") for layer in run.layers]
        assert called == [layer for layer in layers if layer in called]


@transformed
@pytest.mark.parametrize("name", MODELS)
def test_a_step_in_each_mode(name, transform):
    judge_step(MODELS[name], transform)


@transformed
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("eager_path")
def test_twenty_steps(name, transform):
    judge_training(MODELS[name], transform)


@transformed
@pytest.mark.parametrize("name", WITH_DROPOUT)
@pytest.mark.usefixtures("eager_path")
def test_dropout(name, transform):
    judge_dropout(MODELS[name], transform)


def another_eps(model):
    model.bn2.eps = 2e-5
    return model


def frozen_statistics(model):
    model.bn1.momentum = 0.0
    return model


def statistics_stop(model):
    calls = []

    def stop(bn, inputs):
        calls.append(1)
        if len(calls) > 2:
            bn.momentum = 0.0

    model.bn1.register_forward_pre_hook(stop)
    return model


def zero_gradient(model):
    model.fc1.weight.register_hook(torch.zeros_like)
    return model


def larger_gradient(model):
    model.fc2.weight.register_hook(lambda gradient: 1.01 * gradient)
    return model


def another_key(model):
    model.bn3 = nn.BatchNorm1d(3)
    return model


def another_rate(model):
    model.drop.p = 0.5
    return model


def unscaled(model):
    model.drop.register_forward_hook(lambda drop, inputs, out: out * (1 - drop.p) if drop.training else None)
    return model


def drops_in_eval(model):
    model.drop.register_forward_hook(lambda drop, inputs, out: F.dropout(out, 0.3, not drop.training))
    return model


class AnotherMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return F.dropout(gradient, 0.3)


def another_mask_in_the_backward(model):
    model.drop.forward = lambda x: AnotherMask.apply(x) if model.drop.training else x
    return model


@pytest.mark.parametrize(
    ("judge", "transform", "complaint"),
    [
        (judge_step, another_eps, "train: output 0: error"),
        (judge_step, frozen_statistics, "train: bn1.running_mean: error"),
        (judge_step, zero_gradient, "train: gradient of fc1.weight: error"),
        (judge_step, larger_gradient, "train: gradient of fc2.weight: error"),
        (judge_step, another_key, "^keys"),
        (judge_training, frozen_statistics, "bn1.running_mean: error"),
        (judge_training, larger_gradient, "error"),
        (judge_training, statistics_stop, "bn1.running_mean: error"),
        (judge_dropout, another_rate, "variance over draws 2"),
        (judge_dropout, unscaled, "variance over draws"),
        (judge_dropout, another_mask_in_the_backward, "slope"),
        (judge_dropout, drops_in_eval, "eval: output 0: error"),
    ],
)
def test_a_wrong_transformation_is_caught(judge, transform, complaint):
    judge(MODELS["course DNN"], lambda model: model)
    with pytest.raises(AssertionError, match=complaint):
        judge(MODELS["course DNN"], transform)
