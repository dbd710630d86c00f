"""What these optimizers add to torch's: clipping within the step, l1, fp32 state and stochastic rounding."""

import pytest
import torch
from support.numerics import WORST_RATIO
from support.optimizers import SEVEN, copies, ours, parameters, set_gradients, state_tensors, theirs
from torch import nn

EPS = 2.0**-7  # of bf16


def assert_close(a, b, rtol=2e-6, atol=1e-6):
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        torch.testing.assert_close(tensor, b[key], rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("shapes", [[(3, 5), (1030,), (7,)], [(9,)] * 40], ids=["few", "many"])
@pytest.mark.parametrize("name", SEVEN)
def test_max_grad_norm_is_clip_grad_norm_before_the_step(name, shapes):
    params = parameters(shapes)
    mine, plain = copies(params), copies(params)
    optimizer, reference = ours(name)(mine, max_grad_norm=2.0), theirs(name)(plain)
    for step, scale in enumerate((1.0, 0.001, 100.0)):  # the second is not clipped
        set_gradients(step, mine, plain, scale=scale)
        gradients = [param.grad.clone() for param in mine]
        optimizer.step()
        norm = nn.utils.clip_grad_norm_(plain, 2.0)
        reference.step()
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
        assert all(torch.equal(param.grad, grad) for param, grad in zip(mine, gradients, strict=True))
    assert_close(state_tensors(optimizer, mine), state_tensors(reference, plain))


def test_the_norm_is_of_all_gradients_whoever_steps_them():
    """fp32, bf16, float64 (torch's step) and a missing one; in two groups, one of them frozen by lr = 0."""
    values = [torch.randn(40), torch.randn(9).bfloat16(), torch.randn(7, dtype=torch.float64), torch.randn(3)]
    for kinds in ((0, 1), (0, 1, 3), (0, 2, 3)):
        runs = []
        for factory, extra in ((ours, {"max_grad_norm": 0.5}), (theirs, {})):
            params = [nn.Parameter(values[i].clone()) for i in kinds]
            optimizer = factory("SGD")([{"params": params[:1], "lr": 0.0}, {"params": params[1:]}], lr=0.3, **extra)
            for step in range(2):
                generator = torch.Generator().manual_seed(step)
                for i, param in zip(kinds, params, strict=True):
                    param.grad = None if i == 3 else torch.randn(param.shape, generator=generator).to(param.dtype)
                norm = nn.utils.clip_grad_norm_(params, 0.5) if factory is theirs else None
                optimizer.step()
                norm = optimizer.grad_norm if norm is None else norm
            runs.append((float(norm), params))
        assert runs[0][0] == pytest.approx(runs[1][0], rel=5e-3 if 1 in kinds else 1e-6)
        for a, b in zip(runs[0][1], runs[1][1], strict=True):
            tolerance = EPS if a.dtype == torch.bfloat16 else 2e-3 * (1 in kinds) + 1e-6
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_spoils_what_it_spoils_in_torch(bad):
    params = parameters([(6,), (5,)])
    mine, plain = copies(params), copies(params)
    optimizer, reference = ours("SGD")(mine, max_grad_norm=1.0), theirs("SGD")(plain)
    set_gradients(0, mine, plain)
    mine[0].grad[2] = plain[0].grad[2] = bad
    optimizer.step()
    nn.utils.clip_grad_norm_(plain, 1.0)
    reference.step()
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=["kernels", "torch"])
@pytest.mark.parametrize("name", SEVEN)
def test_l1_adds_its_subgradient(name, kind, maximize):
    params = parameters([(3, 5), (40,)], kind)
    with torch.no_grad():
        params[0][1] = 0.0  # sign(0) = 0
    mine, plain = copies(params), copies(params)
    optimizer, reference = ours(name)(mine, l1=0.3, maximize=maximize), theirs(name)(plain, maximize=maximize)
    for step in range(3):
        set_gradients(step, mine, plain)
        for param in plain:
            param.grad += (-0.3 if maximize else 0.3) * param.detach().sign()
        optimizer.step()
        reference.step()
    assert_close(state_tensors(optimizer, mine), state_tensors(reference, plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SEVEN)
def test_fp32_state_is_that_of_fp32_training_on_rounded_parameters(name, dtype):
    flags = {"momentum": 0.9} if name == "SGD" else {"eps": 1e-6}
    params = parameters([(3, 5), (1030,)], dtype)
    mine, wide = copies(params), copies(params, torch.float32)
    optimizer = ours(name)(mine, state_dtype=torch.float32, **flags)
    reference = theirs(name)(wide, **flags)
    for step in range(5):
        set_gradients(step, mine)
        for a, b in zip(mine, wide, strict=True):
            b.grad = a.grad.float()
        optimizer.step()
        reference.step()
        with torch.no_grad():
            for param in wide:
                param.copy_(param.to(dtype))
    for a, b in zip(mine, wide, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=torch.finfo(dtype).eps, atol=1e-6)  # one unit, rarely
        assert torch.isclose(a.float(), b, rtol=0, atol=0).float().mean() > 0.99
        for key, value in reference.state[b].items():
            assert optimizer.state[a][key].dtype == torch.float32
            found = optimizer.state[a][key]
            torch.testing.assert_close(found, value.to(found.device), rtol=2e-5, atol=1e-6)  # of counts, torch's


@pytest.mark.parametrize("options", [{"state_dtype": torch.float32}, {"stochastic_rounding": True}], ids=str)
def test_low_precision_options_where_torch_steps(options, monkeypatch):
    """The same result without kernels, by torch's step on fp32 copies; bits may differ where rounding is a draw."""
    params = parameters([(30,)], torch.bfloat16)
    mine, eager = copies(params), copies(params)
    optimizer, fallback = ours("Adam")(mine, lr=0.1, **options), ours("Adam")(eager, lr=0.1, **options)
    for step in range(3):
        set_gradients(step, mine, eager)
        optimizer.step()
        with monkeypatch.context() as patch:
            patch.setattr("fastnn.optim.plan.is_served", lambda *_: False)
            fallback.step()
    assert fallback._plan.eager_params
    tolerance = 4 * EPS if "stochastic_rounding" in options else 0
    torch.testing.assert_close(*mine, *eager, rtol=tolerance, atol=tolerance)
    for key, value in optimizer.state[mine[0]].items():
        other = fallback.state[eager[0]][key]
        assert value.dtype == other.dtype
        torch.testing.assert_close(value, other, rtol=2 * EPS, atol=1e-6)


@pytest.mark.parametrize("path", ["kernels", "torch"])
def test_stochastic_rounding_keeps_what_rounding_to_nearest_loses(path, monkeypatch):
    """Steps of 1/16 of a unit in the last place: to nearest nothing ever moves; at random the mean moves as in fp32."""
    if path == "torch":
        monkeypatch.setattr("fastnn.optim.plan.is_served", lambda *_: False)
    count, steps, lr = 4000, 16, EPS / 16
    param = nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
    optimizer = ours("SGD")([param], lr=lr, stochastic_rounding=True)
    nearest = nn.Parameter(param.detach().clone())
    plain = ours("SGD")([nearest], lr=lr)
    for _ in range(steps):
        param.grad = -torch.ones_like(param)
        nearest.grad = param.grad.clone()
        optimizer.step()
        plain.step()
    assert torch.equal(nearest, torch.ones_like(nearest))
    moved = (param.float() - 1) / EPS  # in units; each element has moved by 1 on average, with a deviation below 1
    assert set(moved.unique().tolist()) <= {float(n) for n in range(steps + 1)}
    assert abs(moved.mean().item() - 1) < WORST_RATIO * (1 / count) ** 0.5
    assert 0.5 < moved.var().item() < 1.5  # draws of different steps and elements are independent
    neighbours = torch.corrcoef(torch.stack([moved[:-1], moved[1:]]))[0, 1]
    assert abs(neighbours.item()) < 4 / count**0.5


def test_stochastic_rounding_follows_the_seed_and_leaves_special_values_alone():
    special = torch.tensor([0.0, float("inf"), float("-inf"), float("nan"), 3.3e38, 1.0, -1.0]).bfloat16()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        params = [nn.Parameter(torch.randn(500, generator=torch.Generator().manual_seed(0)).bfloat16())]
        params.append(nn.Parameter(special.clone()))
        optimizer = ours("Adam")(params, lr=0.01, stochastic_rounding=True)
        for step in range(2):
            set_gradients(step, params)
            params[1].grad.zero_()
            optimizer.step()
        results.append(params[0].detach().clone())
        torch.testing.assert_close(params[1].detach(), special, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm must be at least 0, got -1.0"),
        ({"max_grad_norm": float("nan")}, ValueError, "max_grad_norm must be"),
        ({"max_grad_norm": "1"}, TypeError, "max_grad_norm must be a number, got '1'"),
        ({"l1": None}, TypeError, "l1 must be a number, got None"),
        ({"l1": -0.1}, ValueError, "l1 must be at least 0, got -0.1"),
        ({"state_dtype": torch.float16}, ValueError, "state_dtype must be None or torch.float32, got torch.float16"),
        ({"l1": 0.1, "differentiable": True}, RuntimeError, "do not support `differentiable`"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ours("Adam")(parameters([(3,)]), **arguments)
