"""The constructors, errors, signatures, hooks, closures and subclasses of torch.optim."""

import inspect

import pytest
import torch
from support.optimizers import HAS_CAPTURABLE, HAS_FUSED, SEVEN, copies, ours, parameters, set_gradients, theirs
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

WRONG = [
    {"lr": -1.0}, {"eps": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, 1.0)}, {"weight_decay": -1.0},
    {"momentum": -1.0}, {"nesterov": True}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, {"alpha": -1.0},
    {"rho": 2.0}, {"lr_decay": -1.0}, {"momentum_decay": -1.0}, {"initial_accumulator_value": -1.0},
    {"lr": torch.tensor([0.1, 0.2])}, {"lr": torch.tensor(0.1), "foreach": True}, {"fused": True, "foreach": True},
    {"fused": True, "differentiable": True}, {"betas": (0.9, torch.tensor(0.9))}, {"no_such": 1},
]  # fmt: skip


@pytest.mark.parametrize("name", SEVEN)
def test_every_constructor_error_is_torchs(name):
    for arguments in WRONG:
        try:
            theirs(name)(parameters([(3,)]), **arguments)
        except Exception as error:
            with pytest.raises(type(error)):
                ours(name)(parameters([(3,)]), **arguments)
        else:
            ours(name)(parameters([(3,)]), **arguments)
    for params in ([], torch.zeros(3), [1], {"params": []}, [{"params": {torch.zeros(1)}}], [torch.zeros(1) * 1]):
        try:
            theirs(name)(params)
        except Exception as error:
            with pytest.raises(type(error)):
                ours(name)(params)
        else:
            ours(name)(params)


@pytest.mark.parametrize("name", SEVEN)
def test_class_signature_defaults_and_groups_are_torchs(name):
    mine, plain = inspect.signature(ours(name)), inspect.signature(theirs(name))
    added = ["max_grad_norm", "l1", "state_dtype", "stochastic_rounding"]
    assert list(mine.parameters) == [*plain.parameters, *added]
    assert all(mine.parameters[key] == value for key, value in plain.parameters.items())
    assert issubclass(ours(name), theirs(name))
    optimizer, reference = ours(name)(parameters([(3,)]), l1=0.1), theirs(name)(parameters([(3,)]))
    assert optimizer.defaults == reference.defaults
    assert optimizer.param_groups[0].keys() == reference.param_groups[0].keys()
    assert repr(optimizer) == repr(reference)


@pytest.mark.parametrize("name", SEVEN)
def test_every_flag_is_accepted_and_steps(name):
    flags = [{"foreach": True}, {"foreach": False}, {"maximize": True}, {"differentiable": True}]
    flags += [{"fused": True}, {"fused": False}] if name in HAS_FUSED else []
    flags += [{"capturable": True}] if name in HAS_CAPTURABLE else []
    for settings in flags:
        params = parameters([(5,)])
        with torch.no_grad():
            own = [param.clone() for param in params] if "differentiable" in settings else params
        before = own[0].detach().clone()
        optimizer = ours(name)(own, lr=0.1, **settings)
        set_gradients(0, own) if own is params else setattr(own[0], "grad", torch.ones(5))
        optimizer.step()
        assert not torch.equal(own[0], before), settings


def test_hooks_fire_once_and_closures_run_once():
    params = parameters([(5,)])
    torch.optim.Adam(copies(params))  # which patches torch's class: its step then calls hooks, too
    for kind in ("kernels", "torch"):
        own = copies(params, torch.float32 if kind == "kernels" else torch.float64)
        optimizer = ours("Adam")(own)
        calls = []

        def note(what, calls=calls):
            return lambda *_: calls.append(what)

        handles = [
            optimizer.register_step_pre_hook(note("pre")),
            optimizer.register_step_post_hook(note("post")),
            register_optimizer_step_pre_hook(note("global pre")),
            register_optimizer_step_post_hook(note("global post")),
        ]

        def closure(own=own, calls=calls):
            assert torch.is_grad_enabled()
            calls.append("closure")
            for param in own:
                param.grad = torch.ones_like(param)
            return 7.0

        assert optimizer.step(closure) == 7.0
        assert calls == ["global pre", "pre", "closure", "post", "global post"]
        assert optimizer.state[own[0]]["step"].item() == 1
        for handle in handles:
            handle.remove()
        assert optimizer.step() is None
        assert len(calls) == 5


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # torch 2.11's, of itself
def test_the_profiler_sees_the_step():
    params = parameters([(5,)])
    optimizer = ours("Adam")(params)
    set_gradients(0, params)
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert "Optimizer.step#Adam.step" in {event.key for event in profile.key_averages()}


def test_subclasses_may_override_the_step():
    calls = []

    class Counting(ours("SGD")):
        def __init__(self, params, lr):
            super().__init__(params, lr=lr, momentum=0.9)

        def step(self, closure=None):
            calls.append("step")
            return super().step(closure)

    params = parameters([(5,)])
    optimizer = Counting(params, 0.1)
    assert list(inspect.signature(Counting).parameters) == ["params", "lr"]
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    set_gradients(0, params)
    before = params[0].detach().clone()
    optimizer.step()
    assert calls == ["step", "post"]
    assert not torch.equal(params[0], before)


def test_without_kernels_the_step_is_torchs(monkeypatch):
    """On a CPU without the interpreter, or where Triton is missing."""
    from fastnn import dispatch

    monkeypatch.setattr(dispatch, "device_path", lambda device: dispatch.Path("eager", "for the test"))
    for name in SEVEN:
        mine, plain = parameters([(5,), (2, 3)]), parameters([(5,), (2, 3)])
        optimizer, reference = ours(name)(mine), theirs(name)(plain)
        for step in range(3):
            set_gradients(step, mine, plain)
            optimizer.step()
            reference.step()
        assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True)), name
        assert not optimizer._plan.bundles


def test_ordinary_training_makes_one_plan(monkeypatch):
    """Gradients set to None each step, schedules and missing gradients do not lay the tables out anew."""
    from fastnn.optim import engine

    made = []

    class CountedPlan(engine.Plan):
        def __init__(self, optimizer):
            made.append(1)
            super().__init__(optimizer)

    monkeypatch.setattr(engine, "Plan", CountedPlan)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1), torch.nn.Linear(1, 3))
    optimizer = ours("NAdam")(model.parameters(), max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(6):
        optimizer.zero_grad(set_to_none=step != 3)
        out = model(torch.randn(7, 4)) if step != 4 else model[2](torch.randn(7, 8))
        (out * torch.randn_like(out)).sum().backward()
        optimizer.step()
        schedule.step()
    assert len(made) == 1
