"""GradScaler: unscaled within the step, skipped on overflow with nothing touched."""

import copy

import pytest
import torch
from support.optimizers import HAS_FUSED, SEVEN, copies, ours, parameters, set_gradients, state_tensors, theirs

SCALE = 1024.0


def scaled_step(optimizer, found_inf=0.0, scale=SCALE):
    """What GradScaler.step does with an optimizer that supports scaling."""
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(found_inf)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


@pytest.mark.parametrize("name", HAS_FUSED)
def test_gradients_are_unscaled_within_the_step(name):
    params = parameters([(3, 5), (1030,)])
    mine, plain = copies(params), copies(params)
    optimizer, reference = ours(name)(mine, fused=True), theirs(name)(plain)
    for step in range(3):
        set_gradients(step, mine, scale=SCALE)
        set_gradients(step, plain)
        scaled_step(optimizer)
        reference.step()
        for a, b in zip(mine, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)
            assert torch.equal(a.grad, b.grad)  # torch's fused steps leave the unscaled gradient behind


@pytest.mark.parametrize("found_inf", [1.0, 2.0])  # a sum over devices
@pytest.mark.parametrize("name", HAS_FUSED)
def test_an_overflow_touches_nothing(name, found_inf):
    settings = {"momentum": 0.9, "weight_decay": 0.1} if name == "SGD" else {}
    params = parameters([(3, 5), (1030,)])
    optimizer = ours(name)(params, fused=True, max_grad_norm=1.0, **settings)
    set_gradients(0, params, scale=SCALE)
    scaled_step(optimizer)
    before = copy.deepcopy(state_tensors(optimizer, params))
    set_gradients(1, params, scale=SCALE)
    params[0].grad[0, 0] = float("inf")
    scaled_step(optimizer, found_inf)
    after = state_tensors(optimizer, params)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key


@pytest.mark.parametrize("how", ["goes on", "checkpoint", "deepcopy"])
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_sgd_whose_first_step_overflows(dampening, how):
    """torch's fused SGD is left with a momentum buffer of whatever was in memory; the next step must be the first."""
    params = parameters([(3, 5), (1030,)])
    mine, plain = copies(params), copies(params)
    optimizer = ours("SGD")(mine, lr=0.1, momentum=0.9, dampening=dampening, fused=True)
    reference = theirs("SGD")(plain, lr=0.1, momentum=0.9, dampening=dampening)
    set_gradients(0, mine)
    scaled_step(optimizer, found_inf=1.0)
    if how == "checkpoint":
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = ours("SGD")(mine, lr=0.1, fused=True)
        optimizer.load_state_dict(saved)
    elif how == "deepcopy":
        optimizer, mine = copy.deepcopy((optimizer, mine))
    for step in (1, 2):
        set_gradients(step, mine, scale=SCALE)
        set_gradients(step, plain)
        scaled_step(optimizer)
        reference.step()
    for key, tensor in state_tensors(optimizer, mine).items():
        torch.testing.assert_close(tensor, state_tensors(reference, plain)[key], rtol=2e-6, atol=1e-6)


def test_a_scale_and_groups_that_count_on_the_host():
    """torch asserts that it is not asked to unscale; a group may have been added with fused=False."""
    params = parameters([(40,), (9,)])
    mine, plain = copies(params), copies(params)
    optimizer = ours("Adam")([{"params": mine[:1]}, {"params": mine[1:], "fused": False}], fused=True)
    reference = theirs("Adam")(plain)
    for step in range(3):
        set_gradients(step, mine, scale=SCALE)
        if step == 1:
            before = copy.deepcopy(state_tensors(optimizer, mine))
            scaled_step(optimizer, found_inf=1.0)
            for key, tensor in state_tensors(optimizer, mine).items():
                assert torch.equal(tensor, before[key]), key
            continue
        set_gradients(step, plain)
        scaled_step(optimizer)
        reference.step()
    for key, tensor in state_tensors(optimizer, mine).items():
        torch.testing.assert_close(tensor, state_tensors(reference, plain)[key], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", SEVEN)
def test_gradscaler_itself(name, fused, device):
    """torch.amp.GradScaler, through an overflow, against the same with torch's optimizer unfused."""
    if fused and name not in HAS_FUSED:
        pytest.skip(f"torch.optim.{name} has no fused")
    params = parameters([(3, 5), (40,)])
    runs = []
    for factory, settings in ((ours, {"fused": True} if fused else {}), (theirs, {})):
        own = copies(params)
        optimizer = factory(name)(own, lr=0.1, **settings)
        scaler = torch.amp.GradScaler(device.type, init_scale=64.0, growth_interval=2)
        for step in range(5):
            set_gradients(step, own, scale=scaler.get_scale())
            if step == 2:
                own[1].grad[3] = float("nan")
            scaler.scale(torch.zeros(()))  # GradScaler makes its tensors at the first scaling
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 128.0  # up after two steps, down at the overflow, up after two more
        runs.append(state_tensors(optimizer, own))
    for key, tensor in runs[0].items():
        torch.testing.assert_close(tensor, runs[1][key], rtol=2e-6, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_unscaling_where_torch_steps():
    """float64 parameters, which torch steps, in one optimizer with those the kernels step."""
    values = [torch.randn(6, dtype=torch.float64), torch.randn(9)]
    mine, plain = ([torch.nn.Parameter(value.clone()) for value in values] for _ in range(2))
    optimizer, reference = ours("Adam")(mine, fused=True, max_grad_norm=1.0), theirs("Adam")(plain)
    for step in range(4):
        for params, scale in ((mine, SCALE), (plain, 1.0)):
            generator = torch.Generator().manual_seed(step)
            for param in params:
                param.grad = scale * torch.randn(param.shape, generator=generator, dtype=param.dtype)
        scaled_step(optimizer, found_inf=float(step == 2))
        if step != 2:
            torch.nn.utils.clip_grad_norm_(plain, 1.0)
            reference.step()
    for key, tensor in state_tensors(optimizer, mine).items():
        torch.testing.assert_close(tensor, state_tensors(reference, plain)[key], rtol=1e-5, atol=1e-6)
