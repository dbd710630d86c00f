"""What programs do to parameters, gradients, groups and state between steps, and what a step must not do to them."""

import copy
import gc
import inspect
import weakref

import pytest
import torch
from support.optimizers import SEVEN, copies, ours, parameters, set_gradients, state_tensors, theirs
from torch import nn

DAMPENED = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}


def pair(name, params, **settings):
    mine, plain = copies(params), copies(params)
    return (ours(name)(mine, **settings), mine), (theirs(name)(plain, **settings), plain)


def train(runs, steps, start=0):
    for step in range(start, start + steps):
        set_gradients(step, *(params for _, params in runs))
        for optimizer, _ in runs:
            optimizer.step()


def assert_same(runs, rtol=2e-6, atol=1e-6):
    found, expected = (state_tensors(*run) for run in runs)
    assert list(found) == list(expected)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["Adam", "Adagrad"])
def test_state_whose_data_is_replaced_in_place(name, fused):
    """The optimizer_to() idiom; the tables would still hold the old addresses."""
    runs = pair(name, parameters([(40,), (6, 8)]), fused=fused)
    train(runs, 3)
    for optimizer, _ in runs:
        for state in optimizer.state.values():
            for value in state.values():
                value.data = value.data.clone()
    train(runs, 3, start=3)
    assert_same(runs)


def test_one_kind_of_state_whose_data_is_replaced():
    """Noticed when its turn comes: the addresses of 16 entries are compared a step, old memory is kept till then."""
    params = parameters([(40,)])
    optimizer = ours("Adam")(params)
    train([(optimizer, params)], 1)
    state = optimizer.state[params[0]]
    state["exp_avg_sq"].data = state["exp_avg_sq"].data.clone()
    frozen = state["exp_avg_sq"].clone()
    train([(optimizer, params)], 4, start=1)
    assert not torch.equal(state["exp_avg_sq"], frozen)


def test_a_parameter_cut_to_its_beginning():
    """p.data = p.data[:3] stays at its address; what follows is no longer the optimizer's."""
    memory = torch.arange(6.0)
    param = nn.Parameter(memory)
    optimizer = ours("SGD")([param], lr=0.1)
    param.grad = torch.ones(6)
    optimizer.step()
    param.grad, param.data = None, param.data[:3]
    param.grad = torch.ones(3)
    rest = memory[3:].clone()
    optimizer.step()
    assert torch.equal(memory[3:], rest)
    torch.testing.assert_close(param.detach(), torch.arange(3.0) - 0.2)


def test_a_square_weight_transposed_in_place():
    runs = pair("SGD", parameters([(4, 4)]), lr=0.1)
    train(runs, 1)
    for _, params in runs:
        params[0].data = params[0].data.t()
    for step in (1, 2):
        grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
        for optimizer, params in runs:
            params[0].grad = grad.clone()  # contiguous
            optimizer.step()
    assert_same(runs)


def test_autograd_knows_what_a_step_has_written():
    """A second backward through a changed weight is torch's error, not a wrong gradient."""
    params = parameters([(3, 3)])
    optimizer = ours("AdamW")(params)
    x = torch.randn(2, 3, requires_grad=True)
    out = (x @ params[0]).square().sum()
    out.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("name", ["Adam", "NAdam"])
def test_steps_without_gradients_are_not_counted(name):
    runs = pair(name, parameters([(40,), (7,)]))
    train(runs, 1)
    for optimizer, params in runs:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # and so lay everything out anew
        for param in params:
            param.grad = None
        for _ in range(3):
            optimizer.step()
    assert_same(runs)
    train(runs, 2, start=1)
    assert_same(runs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_another_default_dtype(dtype):
    params = parameters([(40,), (1030,)])
    runs = pair("SGD", params, **DAMPENED)
    clipping = ours("SGD")(copies(params), max_grad_norm=1.0)
    own = clipping.param_groups[0]["params"]
    torch.set_default_dtype(dtype)
    try:
        train(runs, 2)
        for optimizer, _ in runs:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(runs, 2, start=2)
        train([(clipping, own)], 1)
        norm = clipping.grad_norm.double()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(runs)
    exact = torch.cat([param.grad.double().flatten() for param in own]).norm()
    torch.testing.assert_close(norm, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "extras", [{}, {"max_grad_norm": 0.1}, {"l1": 0.1}, {"state_dtype": torch.float32}], ids=str
)  # fmt: skip
def test_a_compiled_step_is_the_step(extras):
    """Under torch.compile torch's step is what is compiled, unless it would leave out what fastnn adds."""
    dtype = torch.bfloat16 if "state_dtype" in extras else torch.float32
    params = parameters([(30,), (4, 5)], dtype)
    compiled, plain = copies(params), copies(params)
    optimizers = ours("Adam")(compiled, lr=0.1, **extras), ours("Adam")(plain, lr=0.1, **extras)
    step = torch.compile(optimizers[0].step, backend="eager")
    for number in range(3):
        set_gradients(number, compiled, plain)
        step()
        optimizers[1].step()
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    calls: list = []
    optimizers[0].register_step_post_hook(lambda *_: calls.append(1))
    step()
    assert calls == [1]


def test_a_parameter_moved_to_the_next_group():
    runs = []
    for factory in (ours, theirs):
        params = parameters([(5,), (5,), (5,)])
        optimizer = factory("SGD")([{"params": params[:2], "lr": 1.0}, {"params": params[2:], "lr": 0.1}])
        train([(optimizer, params)], 1)
        first, second = (group["params"] for group in optimizer.param_groups)
        second.insert(0, first.pop())
        train([(optimizer, params)], 1, start=1)
        runs.append((optimizer, params))
    assert_same(runs)


def test_betas_in_a_list_that_is_written_to():
    runs = pair("NAdam", parameters([(40,)]), betas=[0.9, 0.99])
    train(runs, 1)
    for optimizer, _ in runs:
        optimizer.param_groups[0]["betas"][0] = 0.1
    train(runs, 2, start=1)
    assert_same(runs, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_listed_twice_with_fp32_state():
    param, wide = nn.Parameter(torch.ones(4, dtype=torch.bfloat16)), nn.Parameter(torch.ones(4))
    optimizer = ours("Adam")([param, param], lr=0.1, state_dtype=torch.float32)
    reference = theirs("Adam")([wide, wide], lr=0.1)
    for _ in range(3):
        param.grad, wide.grad = torch.ones_like(param), torch.ones_like(wide)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(param.float(), wide, rtol=2e-2, atol=2e-2)


def test_parameters_that_share_memory():
    """In one launch two programs would write the same element; torch's step takes them one after the other."""
    runs = []
    for factory in (ours, theirs):
        memory = torch.arange(12.0).reshape(3, 4).clone()
        params = [nn.Parameter(memory), nn.Parameter(memory[1:].detach()), nn.Parameter(torch.ones(5))]
        optimizer = factory("SGD")(params, lr=0.1, momentum=0.9)
        train([(optimizer, params)], 2)
        runs.append((optimizer, params))
    assert_same(runs)
    assert len(runs[0][0]._plan.eager_params) == 2


def test_lazy_gradients():
    """Negated and zero tensors of autograd, whose memory is not their value; a Parameter as a gradient."""
    runs = pair("AdamW", parameters([(8,), (8,), (8,)]))
    for step in range(3):
        z = torch.randn(8, dtype=torch.complex64, generator=torch.Generator().manual_seed(step))
        for optimizer, params in runs:
            params[0].grad = z.conj().imag if step else z.imag.clone()
            params[1].grad = torch._efficientzerotensor((8,), device=z.device) if step else torch.ones(8)
            params[2].grad = nn.Parameter(z.real.clone())
            optimizer.step()
    assert_same(runs)


def test_norms_of_former_steps_stay():
    params = parameters([(9,)])
    optimizer = ours("SGD")(params, lr=0.0, max_grad_norm=1)
    norms = []
    for step in (1.0, 2.0, 3.0):
        params[0].grad = torch.full((9,), step / 3)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    torch.testing.assert_close(torch.stack(norms), torch.tensor([1.0, 2.0, 3.0]))


def test_a_first_step_within_inference_mode():
    """State made there cannot be written outside, with torch's optimizers either."""
    runs = pair("NAdam", parameters([(9,)]))
    with torch.inference_mode():
        train(runs, 2)
        assert_same(runs)


def test_counts_of_other_dtypes():
    """Old checkpoints hold steps as integers, which torch's foreach refuses."""
    runs = pair("NAdam", parameters([(9,)]), foreach=False)
    train(runs, 2)
    for optimizer, params in runs:
        optimizer.state[params[0]]["step"] = torch.tensor(2, device="cpu")
    train(runs, 2, start=2)
    torch.testing.assert_close(runs[0][1][0], runs[1][1][0])


def test_nothing_is_kept_of_gradients_and_parameters_that_are_gone():
    params = parameters([(40,), (8,)])
    optimizer = ours("SGD")(params, **DAMPENED)
    train([(optimizer, params)], 1)
    grad = weakref.ref(params[0].grad)
    optimizer.zero_grad()
    gc.collect()
    assert grad() is None
    old = weakref.ref(params.pop(0))
    optimizer.state.clear()
    optimizer.param_groups[0]["params"] = params
    train([(optimizer, params)], 1)
    gc.collect()
    assert old() is None


def test_signatures_of_subclasses_of_subclasses():
    class First(ours("SGD")):
        def __init__(self, params, warm):
            super().__init__(params, lr=warm)

    class Second(First):
        pass

    assert list(inspect.signature(Second).parameters) == ["params", "warm"]
    assert "max_grad_norm" in inspect.signature(ours("AdamW")).parameters


@pytest.mark.parametrize("name", ["AdamW", "NAdam"])
def test_infinite_parameters_decay_to_themselves(name):
    flags = {"decoupled_weight_decay": True} if name == "NAdam" else {}
    params = [nn.Parameter(torch.tensor([1.0, float("inf"), float("-inf"), float("nan")]))]
    runs = pair(name, params, weight_decay=0.1, **flags)
    train(runs, 2)
    torch.testing.assert_close(runs[0][1][0], runs[1][1][0], equal_nan=True)


def test_tiny_gradients_with_eps_0():
    """Second moments are subnormal there; the kernels' square root must not flush them to 0."""
    params = [nn.Parameter(torch.zeros(6))]
    runs = pair("Adam", params, eps=0.0, lr=0.1)
    for optimizer, own in runs:
        own[0].grad = torch.tensor([1e-20, -1e-20, 3e-20, 1e-19, 1e-15, 1.0])
        optimizer.step()
    torch.testing.assert_close(runs[0][1][0], runs[1][1][0], rtol=2e-2, atol=0)  # of a few bits
    assert runs[0][1][0].isfinite().all()


def test_gradients_that_lie_otherwise_are_unscaled_in_place():
    params = parameters([(4, 6)])
    optimizer = ours("Adam")(params, fused=True)
    for _ in range(2):
        grad = torch.randn(6, 4).t()
        params[0].grad = 8.0 * grad
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        optimizer.step()
        assert torch.equal(params[0].grad, grad)


@pytest.mark.parametrize("name", SEVEN)
def test_wrong_state_raises_before_anything_changes(name):
    """A flag that asks for state which is not there, in the second group of an optimizer that torch steps."""
    flag = {"Adam": "amsgrad", "AdamW": "amsgrad", "RMSprop": "centered"}.get(name)
    if flag is None:
        pytest.skip("no flag of it asks for more state")
    params = parameters([(5,), (6,)], torch.float64)
    optimizer = ours(name)([{"params": [param]} for param in params])
    train([(optimizer, params)], 1)
    optimizer.param_groups[1][flag] = True
    before = copy.deepcopy(state_tensors(optimizer, params))
    with pytest.raises(KeyError):
        optimizer.step()
    for key, tensor in state_tensors(optimizer, params).items():
        assert torch.equal(tensor, before[key])


def test_counts_written_without_a_version():
    """Collectives and .data move no version counter: ranks that receive rank 0's state must step with its counts."""
    runs = pair("NAdam", parameters([(9,), (4,)]))
    train(runs, 1)
    for optimizer, params in runs:
        optimizer.state[params[0]]["step"].data.fill_(6)
        optimizer.state[params[0]]["mu_product"].data.fill_(0.3)
    train(runs, 2, start=1)
    assert_same(runs)


@pytest.mark.parametrize("wrong", [None, "fast", "0.1"])
def test_a_wrong_number_raises_as_long_as_it_is_there(wrong):
    params = parameters([(9,)])
    plain = theirs("SGD")(copies(params), lr=0.1)
    plain.param_groups[0]["lr"] = wrong
    with pytest.raises(TypeError):
        train([(plain, plain.param_groups[0]["params"])], 1)
    optimizer = ours("SGD")(params, lr=0.1)
    train([(optimizer, params)], 1)
    before = params[0].detach().clone()
    optimizer.param_groups[0]["lr"] = wrong
    for step in (1, 2):
        with pytest.raises(TypeError):
            train([(optimizer, params)], 1, start=step)
    assert torch.equal(params[0], before)
    fresh = ours("Adam")(params)
    fresh.param_groups[0]["betas"] = (0.9,) if wrong is None else (0.9, 0.99, 0.5)
    with pytest.raises(ValueError, match="unpack"):
        fresh.step()
    assert not fresh.state


def test_tensor_rates_whose_data_is_replaced():
    runs = []
    for factory in (ours, theirs):
        params, lr = parameters([(9,)]), torch.tensor(0.1)
        optimizer = factory("SGD")(params, lr=lr)
        for step, data in enumerate((None, torch.tensor(0.5), torch.tensor(0.02, dtype=torch.float64))):
            if data is not None:
                lr.data = data
            train([(optimizer, params)], 1, start=step)
        runs.append((optimizer, params))
    assert_same(runs)


def test_a_sparse_buffer_without_a_gradient():
    """An embedding that the first batch after a restart does not use."""
    runs = []
    for factory in (ours, theirs):
        params = [nn.Parameter(torch.ones(6, 2)), nn.Parameter(torch.ones(3))]
        optimizer = factory("SGD")(params, lr=0.1, momentum=0.9)
        params[0].grad = torch.eye(6, 2).to_sparse()
        params[1].grad = torch.ones(3)
        optimizer.step()
        params[0].grad = None
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        runs.append([param.detach() for param in params])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


def test_each_bundle_rounds_by_draws_of_its_own():
    params = [nn.Parameter(torch.linspace(1, 2, 900).bfloat16()) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "amsgrad": True}]
    optimizer = ours("Adam")(groups, lr=1e-3, stochastic_rounding=True)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert not torch.equal(*params)


def test_the_norm_of_no_gradient_is_zero():
    for dtype in (torch.float32, torch.float64):
        params = parameters([(9,)], dtype)
        optimizer = ours("SGD")(params, max_grad_norm=1.0)
        train([(optimizer, params)], 1)
        assert optimizer.grad_norm > 0
        optimizer.zero_grad()
        optimizer.step()
        assert optimizer.grad_norm == 0
