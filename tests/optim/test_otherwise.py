"""Where an optimizer does otherwise than torch's: rounding, state, loading, steps that raise; both sides of each."""

import copy

import pytest
import torch
from support.launched import kernels_launched
from support.optimizers import HAS_FUSED, SEVEN, copies, ours, parameters, set_gradients, theirs
from torch import nn

from fastnn import optim
from fastnn.nn.utils import clip_grad_norm_

BOTH = pytest.mark.parametrize("library", [ours, theirs], ids=["fastnn", "torch"])
SHAPES = [(3, 5), (40,)]


def stepped(library, name, params=None, steps=1, **settings):
    params = parameters(SHAPES) if params is None else params
    optimizer = library(name)(params, **settings)
    for step in range(steps):
        set_gradients(step, params)
        optimizer.step()
    return optimizer, params


def test_seven_of_torchs_optimizers():
    """The others are torch.optim's alone; no name of ours is another's."""
    classes = {name for name, value in vars(torch.optim).items() if isinstance(value, type)}
    assert {name for name in classes if hasattr(optim, name)} == set(SEVEN) == set(optim.__all__) & classes
    assert {"Adamax", "RAdam", "LBFGS", "Rprop", "ASGD", "SparseAdam"} <= classes


@pytest.mark.parametrize("name", SEVEN)
def test_foreach_and_fused_choose_nothing(name):
    flags = [{"foreach": False}, {"foreach": True}, *([{"fused": True}] if name in HAS_FUSED else [])]
    results = []
    for settings in flags:
        optimizer, params = stepped(ours, name, **settings)
        set_gradients(1, params)
        with kernels_launched() as launched:
            optimizer.step()
        assert len(launched) == 1
        results.append(params)
    for params in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(params, results[0], strict=True))


# Arithmetic


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@BOTH
def test_16_bit_parameters_are_rounded_once(library, name):
    """What is stored is the step in float32, rounded; torch rounds after each of its operations."""
    settings = {"lr": 0.1, "weight_decay": 0.3} | ({"momentum": 0.9} if name == "SGD" else {})
    params = parameters([(500,)], torch.bfloat16)
    wide = copies(params, torch.float32)
    optimizer, exact = library(name)(params, **settings), theirs(name)(wide, **settings)
    set_gradients(0, params, wide)
    optimizer.step(), exact.step()
    assert torch.equal(params[0], wide[0].bfloat16()) == (library is ours)


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
@BOTH
def test_eps_that_float16_does_not_have(library, implementation):
    """Adam's 1e-8 is 0 there: torch's parameters without a gradient become NaN, but of its fused step."""
    params = [nn.Parameter(torch.ones(2, dtype=torch.float16))]
    params[0].grad = torch.tensor([0.0, 1.0], dtype=torch.float16)
    library("Adam")(params, **{implementation: True}).step()
    assert params[0][0].isnan() == (library is theirs and implementation == "foreach")
    assert params[0][1].isfinite()


@BOTH
def test_a_variance_that_rounds_below_zero(library):
    """Of a constant gradient, RMSprop's mean square may round to less than its mean squared."""
    gradients = torch.rand(200, generator=torch.Generator().manual_seed(0))
    params = [nn.Parameter(torch.zeros(200))]
    optimizer = library("RMSprop")(params, centered=True, alpha=0.5)
    for _ in range(60):
        params[0].grad = gradients.clone()
        optimizer.step()
    assert params[0].isnan().any() == (library is theirs)


def test_the_norm_to_clip_by_is_rounded_once():
    """torch's norm of a bfloat16 gradient is one itself, and the norm of these norms."""
    params = parameters([(3, 50), (60,), (7,)], torch.bfloat16)
    right = {clip_grad_norm_: [], nn.utils.clip_grad_norm_: []}
    for step in range(8):
        for clip, found in right.items():
            set_gradients(step, params)
            exact = torch.cat([param.grad.double().flatten() for param in params]).norm().bfloat16()
            found.append(bool(clip(params, 1e9) == exact))
    assert [all(found) for found in right.values()] == [True, False]


# State and checkpoints


@BOTH
def test_a_momentum_buffer_lies_as_its_parameter(library):
    """torch's is a copy of the first gradient."""
    param = nn.Parameter(torch.randn(3, 4))
    param.grad = torch.randn(4, 3).t()
    optimizer = library("SGD")([param], lr=0.1, momentum=0.9)
    optimizer.step()
    expected = param if library is ours else param.grad
    assert optimizer.state[param]["momentum_buffer"].stride() == expected.stride()


@BOTH
def test_count_tensors_are_replaced(library):
    """Those of all parameters are views of one, made with the plan; what is taken from the state before is left."""
    optimizer, params = stepped(library, "Adagrad", steps=0)
    before = optimizer.state[params[0]]["step"]
    set_gradients(0, params)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1
    assert before == (0 if library is ours else 1)


@BOTH
def test_autograd_counts_no_changes_of_state(library):
    """Of parameters it counts them in both: nothing else is saved for a backward in ordinary training."""
    optimizer, params = stepped(library, "Adam")
    found = params[0], optimizer.state[params[0]]["exp_avg"]
    before = [tensor._version for tensor in found]
    set_gradients(1, params)
    optimizer.step()
    assert [t._version > version for t, version in zip(found, before, strict=True)] == [True, library is theirs]


@BOTH
def test_loading_keeps_flags(library):
    optimizer, params = stepped(theirs, "Adam", foreach=False)
    other = library("Adam")(copies(params), fused=True)
    other.load_state_dict(optimizer.state_dict())
    expected = (True, None) if library is ours else (None, False)
    assert (other.param_groups[0]["fused"], other.param_groups[0]["foreach"]) == expected


@BOTH
def test_loading_copies_counts(library):
    """torch's two optimizers then share them, and each counts the other's steps."""
    optimizer, params = stepped(library, "Adam")
    twins = copies(params)
    twin = library("Adam")(twins)
    twin.load_state_dict(optimizer.state_dict())
    set_gradients(1, twins)
    twin.step()
    assert optimizer.state[params[0]]["step"] == (1 if library is ours else 2)


@BOTH
def test_a_count_shared_by_all_parameters_is_one_each(library):
    """As in checkpoints of older torch."""
    optimizer, params = stepped(library, "Adam")
    checkpoint, step = copy.deepcopy(optimizer.state_dict()), torch.tensor(1.0)
    for state in checkpoint["state"].values():
        state["step"] = step
    optimizer.load_state_dict(checkpoint)
    set_gradients(1, params)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == (2 if library is ours else 1 + len(params))


@BOTH
def test_nadams_product_keeps_its_dtype(library):
    optimizer, params = stepped(library, "NAdam", parameters(SHAPES, torch.bfloat16))
    twin = library("NAdam")(copies(params))
    twin.load_state_dict(optimizer.state_dict())
    expected = torch.float32 if library is ours else torch.bfloat16
    assert twin.state_dict()["state"][0]["mu_product"].dtype == expected


@BOTH
def test_copies_know_that_gradscaler_may_leave_unscaling_to_them(library):
    optimizer = library("Adam")(parameters(SHAPES), fused=True)
    assert optimizer._step_supports_amp_scaling
    assert hasattr(copy.deepcopy(optimizer), "_step_supports_amp_scaling") == (library is ours)


def test_what_fastnn_adds_is_in_no_checkpoint():
    """It is the constructor's, here and there."""
    extras = {"max_grad_norm": 1.0, "l1": 0.1, "state_dtype": torch.float32, "stochastic_rounding": True}
    optimizer, params = stepped(ours, "Adam", **extras)
    plain = stepped(theirs, "Adam")[0].state_dict()
    assert optimizer.state_dict().keys() == plain.keys()
    assert optimizer.state_dict()["param_groups"] == plain["param_groups"]
    other = ours("Adam")(copies(params))
    other.load_state_dict(optimizer.state_dict())
    assert (other.max_grad_norm, other.l1, other.state_dtype, other.stochastic_rounding) == (None, 0.0, None, False)


@BOTH
def test_what_fastnn_adds_is_no_groups(library):
    """A group takes any key, and says nothing of those that it does not know."""
    params = parameters(SHAPES)
    before = [param.detach().clone() for param in params]
    optimizer = library("SGD")([{"params": params, "l1": 5.0, "max_grad_norm": 1e-3}], lr=0.1)
    set_gradients(0, params)
    optimizer.step()
    for param, value in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), value - 0.1 * param.grad)


# Steps that raise or are skipped


@BOTH
def test_a_step_that_raises_has_stepped_nothing(library):
    """torch has stepped the groups before the one that it refuses."""
    params = parameters([(20, 4), (20, 4)])
    optimizer = library("Adam")([{"params": [param]} for param in params])
    set_gradients(0, params)
    params[1].grad = params[1].grad.to_sparse()
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert torch.equal(params[0], before) == (library is ours)
    assert len(optimizer.state) == (0 if library is ours else 1)


@BOTH
def test_fused_sgd_takes_first_gradients_that_come_late(library):
    params = parameters(SHAPES)
    optimizer = library("SGD")(params, lr=0.1, momentum=0.9, fused=True)
    for present in (1, 2):
        set_gradients(0, params[:present])
        if library is theirs and present == 2:
            with pytest.raises(TypeError):
                optimizer.step()
        else:
            optimizer.step()


@BOTH
def test_fused_sgd_skips_its_first_step(library):
    """torch keeps the memory that it took for the buffer, and goes on with what was there."""
    params = parameters(SHAPES)
    optimizer = library("SGD")(params, lr=0.1, momentum=0.9, fused=True)
    for found_inf in (1.0, 0.0):
        set_gradients(0, params)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(found_inf)
        optimizer.step()
    expected = stepped(theirs, "SGD", lr=0.1, momentum=0.9)[1]
    same = [torch.allclose(a, b) for a, b in zip(params, expected, strict=True)]
    assert same == [library is ours] * 2


# torch.compile


@pytest.mark.parametrize(("extras", "launches"), [({}, 0), ({"l1": 0.1}, 1)], ids=["plain", "l1"])
def test_what_is_compiled_is_torchs_step(extras, launches):
    """In place of our launch, unless it would leave out what fastnn adds."""
    optimizer, params = stepped(ours, "Adam", **extras)
    set_gradients(1, params)
    with kernels_launched() as launched:
        torch.compile(optimizer.step, backend="eager")()
    assert len(launched) == launches
    with kernels_launched() as launched:
        optimizer.step()
    assert len(launched) == 1
