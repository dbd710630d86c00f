"""Whatever parameters and gradients look like: missing, late, empty, strided, unaligned, mixed, swapped, sparse."""

import copy

import pytest
import torch
from support.optimizers import SEVEN, copies, ours, parameters, set_gradients, state_tensors, theirs
from torch import nn

MOMENTUM = {"SGD": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}}


def pair(name, params, **settings):
    """(optimizer, parameters) of ours and of torch's, from the same values."""
    settings = MOMENTUM.get(name, {}) | settings
    mine, plain = copies(params), copies(params)
    return (ours(name)(mine, **settings), mine), (theirs(name)(plain, **settings), plain)


def assert_same(mine, plain, rtol=2e-6, atol=1e-6):
    found, expected = state_tensors(*mine), state_tensors(*plain)
    assert list(found) == list(expected)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", SEVEN)
def test_gradients_that_come_late_go_missing_and_come_back(name):
    """The second is torch's fused SGD's bug: TypeError when a first gradient comes later than its group's."""
    mine, plain = pair(name, parameters([(3, 5), (40,), (7,)]))
    for step, present in enumerate([(0,), (0, 1), (1,), (), (0, 1, 2), (2, 0)]):
        set_gradients(step, mine[1], plain[1])
        for params in (mine[1], plain[1]):
            for i, param in enumerate(params):
                param.grad = param.grad if i in present else None
        mine[0].step()
        plain[0].step()
        assert_same(mine, plain)


@pytest.mark.parametrize("path", ["kernels", "torch"])
def test_fused_sgd_whose_gradients_come_late(path, monkeypatch):
    """torch's raises TypeError when a first gradient comes later than its group's."""
    if path == "torch":
        monkeypatch.setattr("fastnn.optim.plan.is_served", lambda *_: False)
    params = parameters([(3, 5), (40,)])
    mine, plain = copies(params), copies(params)
    optimizer = ours("SGD")(mine, lr=0.1, momentum=0.9, dampening=0.5, fused=True)
    reference = theirs("SGD")(plain, lr=0.1, momentum=0.9, dampening=0.5)
    for step in range(4):
        set_gradients(step, mine, plain)
        if step < 2:
            mine[1].grad = plain[1].grad = None
        optimizer.step()
        reference.step()
    assert_same((optimizer, mine), (reference, plain))


@pytest.mark.parametrize("name", SEVEN)
def test_parameters_of_every_shape_and_layout(name):
    """Empty, of no dimension, transposed, channels last, permuted, with gaps; gradients contiguous and permuted."""
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    values = [
        torch.randn(0, 4), torch.randn(()), torch.randn(6, 4).t(), channels_last, torch.randn(3, 4, 5).permute(2, 0, 1),
        torch.randn(1, 9), torch.randn(4, 8)[:, ::2],
    ]  # fmt: skip
    mine, plain = pair(name, [nn.Parameter(value) for value in values])
    for step in range(3):
        set_gradients(step, mine[1], plain[1])
        for params in (mine[1], plain[1]):
            params[2].grad = params[2].grad.contiguous() if step else params[2].grad
            params[3].grad = params[3].grad.contiguous()
            params[4].grad = params[4].grad.permute(1, 2, 0).contiguous().permute(2, 0, 1)
            params[5].grad = params[5].grad.sum(1, keepdim=True).expand(1, 9)
        mine[0].step()
        plain[0].step()
        assert_same(mine, plain)
    for a, b in zip(mine[1], plain[1], strict=True):
        for key, value in plain[0].state[b].items():
            if key != "momentum_buffer":  # torch's has its first gradient's strides, ours its parameter's
                assert mine[0].state[a][key].stride() == value.stride(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unaligned_tensors(dtype):
    """DDP's bucket views start anywhere; neighbours in the same memory stay as they are."""
    memory, grads = torch.randn(2, 5000).to(dtype)
    before, places = memory.clone(), [(1, 1500), (1601, 4000), (4003, 4010)]
    params = [nn.Parameter(memory[a:b]) for a, b in places]
    plain = copies(params)
    optimizer, reference = ours("Adam")(params), theirs("Adam")(plain, fused=True)
    for _ in range(2):
        for param, twin, (a, b) in zip(params, plain, places, strict=True):
            param.grad, twin.grad = grads[a:b], grads[a:b].clone()
        optimizer.step()
        reference.step()
    assert_same((optimizer, params), (reference, plain), *((1e-2, 1e-2) if dtype == torch.bfloat16 else ()))
    inside = torch.zeros(5000, dtype=torch.bool)
    for a, b in places:
        inside[a:b] = True
    assert torch.equal(memory[~inside], before[~inside])
    assert not torch.equal(memory[inside], before[inside])


@pytest.mark.parametrize("name", SEVEN)
def test_dtypes_mixed_in_one_group(name):
    """Kernels for three dtypes, torch's own step for float64, in the same step."""
    dtypes = torch.float32, torch.bfloat16, torch.float64, torch.float16
    values = [torch.randn(40).to(dtype) for dtype in dtypes]
    mine, plain = pair(name, [nn.Parameter(value) for value in values])
    for step in range(2):
        for i, (a, b) in enumerate(zip(mine[1], plain[1], strict=True)):
            a.grad = torch.randn(40, generator=torch.Generator().manual_seed(10 * step + i)).to(a.dtype)
            b.grad = a.grad.clone()
        mine[0].step()
        plain[0].step()
    assert_same(mine, plain, rtol=2e-2, atol=2e-2)
    assert [len(bundle.params) for bundle in mine[0]._plan.bundles] == [1, 1, 1]
    exact = 2
    assert torch.equal(mine[1][exact], plain[1][exact])


def test_gradients_of_another_dtype():
    params = parameters([(40,), (8,)])
    plain = copies(params)
    optimizer, reference = ours("Adam")(params), theirs("Adam")(plain)
    for step in range(3):
        for param, twin in zip(params, plain, strict=True):
            param.grad = None
            param.grad_dtype = torch.bfloat16 if step == 1 else torch.float32
            grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
            param.grad, twin.grad = grad.to(param.grad_dtype), grad.float()
        optimizer.step()
        reference.step()
    assert_same((optimizer, params), (reference, plain))


def test_parameters_and_state_that_move_or_are_replaced():
    """p.data of another place or size, state entries set by hand, groups edited: each is seen at the next step."""
    mine, plain = pair("Adam", parameters([(40,), (6, 8), (9,)]))

    def swap_data(optimizer, params):
        params[0].data = params[0].data.clone()

    def shrink(optimizer, params):  # the same address, fewer elements
        params[1].data = params[1].data[:3]
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[params[1]][key] = optimizer.state[params[1]][key][:3].clone()

    def reset_moment(optimizer, params):
        optimizer.state[params[2]]["exp_avg_sq"] = torch.ones(9)

    def set_step(optimizer, params):
        optimizer.state[params[0]]["step"].fill_(7)
        optimizer.state[params[2]]["step"] = torch.tensor(5.0)

    def forget(optimizer, params):
        optimizer.state.pop(params[0])

    def remove(optimizer, params):
        del optimizer.param_groups[0]["params"][2]

    def add_group(optimizer, params):
        optimizer.add_param_group({"params": [params[2]], "lr": 0.3})

    def amsgrad_elsewhere(optimizer, params):
        optimizer.param_groups[1]["amsgrad"] = True
        optimizer.state.pop(params[2])

    changes = [lambda *_: None, swap_data, shrink, reset_moment, set_step, forget, remove, add_group, amsgrad_elsewhere]
    for step, change in enumerate(changes):
        for optimizer, params in (mine, plain):
            change(optimizer, params)
        set_gradients(step, mine[1], plain[1])
        mine[0].step()
        plain[0].step()
        assert_same(mine, plain)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # by torch's own Adagrad
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients_take_torchs_step(name):
    torch.manual_seed(0)
    embedding = nn.Embedding(20, 4, sparse=True)
    models = [nn.ModuleList([copy.deepcopy(embedding), nn.Linear(4, 3)]) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    settings = {"momentum": 0.9} if name == "SGD" else {}
    optimizers = ours(name)(models[0].parameters(), **settings), theirs(name)(models[1].parameters(), **settings)
    for step in range(3):
        words = torch.randint(20, (6,), generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model[1](model[0](words)).pow(2).sum().backward()
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert len(optimizers[0]._plan.eager_params) == 1


@pytest.mark.parametrize("name", SEVEN)
def test_a_sparse_gradient_in_the_last_group_changes_nothing(name):
    """torch has stepped the groups before it when it raises."""
    settings = {"weight_decay": 0.1}  # which Adagrad refuses with sparse gradients, and all but SGD without
    params = parameters([(20, 4), (20, 4), (9,)])
    optimizer = ours(name)([{"params": [param]} for param in params], **settings)
    set_gradients(0, params)
    optimizer.step()
    set_gradients(1, params)
    params[1].grad = params[1].grad.to_sparse()
    before = copy.deepcopy(state_tensors(optimizer, params))
    if name == "SGD":
        pytest.skip("torch.optim.SGD takes sparse gradients with weight decay")
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    for key, tensor in state_tensors(optimizer, params).items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("name", SEVEN)
def test_a_first_step_that_raises_leaves_no_state(name):
    params = parameters([(20, 4), (9,)])
    optimizer = ours(name)(params, weight_decay=0.1)
    count = len(optimizer.state)
    set_gradients(0, params)
    before = [param.detach().clone() for param in params]

    def closure():
        raise KeyError("of the loss")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    params[1].grad = params[1].grad.to_sparse()
    if name != "SGD":
        with pytest.raises(RuntimeError, match="sparse gradients"):
            optimizer.step()
    assert len(optimizer.state) == count
    for param, value in zip(params, before, strict=True):
        assert torch.equal(param, value)


def test_complex_and_differentiable_take_torchs_step():
    params = [nn.Parameter(torch.randn(6, dtype=torch.complex64)), *parameters([(5,)])]
    mine, plain = pair("Adam", params)
    for _ in range(2):
        for a, b in zip(mine[1], plain[1], strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine[0].step()
        plain[0].step()
    assert_same(mine, plain)
    lr = torch.tensor(0.1, requires_grad=True)
    start = torch.randn(4)
    outcomes = []
    for cls in (ours("SGD"), theirs("SGD")):
        weight = start.clone().requires_grad_()
        moved = weight.clone()
        optimizer = cls([moved], lr=lr, differentiable=True, foreach=False)  # torch's choice on a GPU is foreach
        moved.grad = torch.arange(4.0)
        optimizer.step()
        outcomes.append(torch.autograd.grad(moved.pow(2).sum(), [weight, lr]))
    for found, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_parameter_listed_twice_is_stepped_twice():
    """As torch does, with its warning; in one launch the two would race."""
    mine, plain = parameters([(9,)]), parameters([(9,)])
    results = []
    for cls, params in ((ours("SGD"), mine), (theirs("SGD"), plain)):
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = cls([params[0], params[0]], lr=0.1, momentum=0.9)
        set_gradients(0, params)
        optimizer.step()
        results.append(params[0].detach())
    assert torch.equal(*results)
