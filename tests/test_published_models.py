"""fuse and the backend on models in the styles of published code: which runs they find, and that training stays equal.

By the rule of support.numerics, beside the plain model.
"""

import pytest
import torch
import torch.nn.functional as F
from support.published_models import MODELS
from support.training_pair import drops, judge_dropout, judge_step, judge_training
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager_decomp_partition

import fastnn
from fastnn import dispatch, rewriting

pytestmark = [
    pytest.mark.usefixtures("nothing_compiled"),
    # Where it goes on after a graph break, Dynamo asks tensors that are no leaves for .grad, and hides the warning of
    # it from those who print it, not from those who raise it.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

TRANSFORMS = {"fuse": fastnn.fuse, "backend": lambda model: torch.compile(model, backend="fastnn")}
WITH_DROPOUT = [name for name, published in MODELS.items() if drops(published.make())]
INTERPRETED = ("course DNN",)  # all of them would train in Triton's interpreter for six minutes of a core

transformed = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


@pytest.fixture(autouse=True)
def without_code(monkeypatch):
    """Inductor's frontend alone: its code for a CPU takes seconds a graph to compile, as test_backend.py lets it."""

    def inductor(graph, inputs, config_patches):
        return aot_eager_decomp_partition(graph, inputs)

    monkeypatch.setattr("fastnn.compile.lookup_backend", lambda name: inductor)


@pytest.fixture
def eager_path(name, monkeypatch):
    """The many steps and draws of most models are computed by torch's ops, whatever op they are part of."""
    if name not in INTERPRETED:
        monkeypatch.setattr(dispatch, "HAS_KERNELS", False)


def called(names):
    """As explain writes names: children of one container, by number, as "net.0-3"."""
    containers, children = zip(*(name.rpartition(".")[::2] for name in names), strict=True)
    if len(names) > 1 and len({*containers}) == 1 and all(child.isdigit() for child in children):
        return f"{names[0]}-{children[-1]}"
    return ", ".join(names)


def kinds(layers):
    return tuple(layer.lower().replace("_", "") for layer in layers)


@pytest.mark.parametrize("name", MODELS)
def test_explain_names_every_run(name):
    model = MODELS[name].make()
    explained = fastnn.explain(model, *MODELS[name].inputs(0))
    names = {id(module): name for name, module in model.named_modules()}  # of several, the first
    expected = {
        (called([names[id(model.get_submodule(module))] for module in run.modules]), kinds(run.layers))
        for run in MODELS[name].runs
    }
    found = {(row.modules, kinds(row.layers.split(" + "))) for row in explained.rows if row.fused}
    assert {run for run in found if len(run[1]) > 1} == expected
    assert all(row.reason for row in explained.rows if not row.fused)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("eager_path")
def test_the_backend_finds_the_runs_that_fuse_finds(name, monkeypatch):
    found, rewrite = [], rewriting.rewrite

    def recorded(*given, **options):
        found.append(rewrite(*given, **options))
        return found[-1]

    monkeypatch.setattr(rewriting, "rewrite", recorded)
    runs = []
    for transform in TRANSFORMS.values():
        found.clear()
        transform(MODELS[name].make())(*MODELS[name].inputs(0))
        runs.append([[str(node) for node in run.layers] for graph in found for run in graph if len(run.layers) > 1])
    assert runs[0] == runs[1]
    assert len(runs[0]) == len(MODELS[name].runs)


@pytest.mark.parametrize("name", MODELS)
def test_unfused_is_the_original(name):
    model = MODELS[name].make()
    before = dict(model.__dict__)
    assert fastnn.unfuse(fastnn.fuse(model)) is model
    assert model.__dict__ == before


@transformed
@pytest.mark.parametrize("name", MODELS)
def test_a_step_in_each_mode(name, transform, request):
    if transform is not fastnn.fuse:  # the same graphs
        request.getfixturevalue("eager_path")
    judge_step(MODELS[name], transform)


@transformed
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("eager_path")
def test_twenty_steps(name, transform):
    judge_training(MODELS[name], transform)


@pytest.mark.parametrize("name", WITH_DROPOUT)
@pytest.mark.usefixtures("eager_path")
def test_dropout(name):
    judge_dropout(MODELS[name], fastnn.fuse)


def test_dropout_through_the_backend():
    judge_dropout(MODELS["course DNN"], TRANSFORMS["backend"])


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
