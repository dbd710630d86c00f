"""Recipes: what kernels are given by address is what they are given as tensors, and when each is done."""

from functools import partial

import pytest
import torch
from support.blocks import PLANS, Block

from fastnn import dispatch, memory, plans, recipes, specs
from fastnn.kernels import launch

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def launched(monkeypatch):
    """Every launch as (how, what it is given), as if Triton compiled at once and nothing ran."""
    found = []

    def by_triton(self, arguments, keep):
        found.append(("tensors", self._pick(arguments)))
        self._compiled = keep or None

    def by_address(launches, arguments):
        found.extend(("addresses", one._pick(arguments)) for one in launches)

    monkeypatch.setattr(launch.Launch, "by_triton", by_triton)
    monkeypatch.setattr(launch, "by_address", by_address)
    return found


@pytest.fixture
def same_memory(monkeypatch):
    """Gives the allocations of each pass the memory of those before it; called before a pass."""
    pool, taken = [], []

    def allocate(device, size, strides, dtype):
        if len(taken) == len(pool):
            pool.append(torch.zeros(size, dtype=dtype, device=device))  # a backward has a thread of its own
        taken.append(pool[len(taken)])
        return taken[-1]

    monkeypatch.setattr(memory, "allocator", lambda device: partial(allocate, device))
    return taken.clear


def address(given):
    if isinstance(given, torch.Tensor):
        return given.data_ptr()
    if isinstance(given, launch.TensorDescriptor):
        return given.base.data_ptr(), given.block_shape
    return given or 0


def one_pass(block, inputs, launched, same_memory):
    same_memory()
    launched.clear()
    block.ours({name: tensor.detach() for name, tensor in inputs.items()})
    return {how for how, _ in launched}, [[address(given) for given in arguments] for _, arguments in launched]


CASES = [
    *(("batch", plan, {"bias": True}) for plan in PLANS),
    ("batch", "columns", {"linear": False}),
    ("batch", "split", {"linear": False, "affine": False}),
    ("running", "epilogue", {"grads": False}),
    ("running", "columns", {}),
    ("none", "epilogue", {"bias": True}),
    ("none", "split", {"linear": False}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("products", ["grouped", "library"])
@pytest.mark.parametrize(("norm", "plan", "settings"), CASES)
def test_addresses_are_those_of_the_tensors(norm, plan, settings, products, dtype, launched, same_memory):
    """Views into what is saved among them; the seed's number and every flag stay the same."""
    N = 24
    block = Block(40, 16 if settings.get("linear", True) else N, N, dtype, norm, p=0.5, **settings)
    inputs = block.draw(torch.Generator().manual_seed(0))
    with plans.forced_plan(plan, products):
        how, tensors = one_pass(block, inputs, launched, same_memory)
        assert how == {"tensors"}
        how, addresses = one_pass(block, inputs, launched, same_memory)
    assert how == {"addresses"}
    assert addresses == tensors
    assert len(tensors) >= 1 + block.grads


@pytest.mark.parametrize("name", ["x", "weight", "gamma", "running_mean", "g"])
def test_what_16_does_not_divide_is_never_launched_by_address(name, launched, same_memory):
    block = Block(40, 16, 24)
    inputs = block.draw(torch.Generator().manual_seed(0))
    whole = torch.empty(inputs[name].numel() + 1)
    inputs[name] = whole[1:].view(inputs[name].shape).copy_(inputs[name])
    for _ in range(2):
        one_pass(block, inputs, launched, same_memory)
    ways = [how for how, _ in launched]
    assert ways[0] == ("addresses" if name == "g" else "tensors")
    assert "tensors" in ways


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["x", "weight"])
def test_operands_at_odd_addresses_or_transposed_give_the_same_numbers(name, plan):
    """Descriptors take neither: those are copied."""
    block = Block(40, 16, 24, bias=True)
    inputs = block.draw(torch.Generator().manual_seed(0))
    operand = inputs[name]
    odd = torch.empty(operand.numel() + 1)[1:].view(operand.shape).copy_(operand)
    with plans.forced_plan(plan):
        expected = block.ours({key: tensor.detach().clone() for key, tensor in inputs.items()})
        for other in (odd, operand.t().contiguous().t()):
            found = block.ours({key: tensor.detach().clone() for key, tensor in inputs.items()} | {name: other})
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=key)


def spec_of(K=40, dtype=torch.bfloat16, operand=torch.bfloat16):
    x, weight = torch.empty(32, K, dtype=operand), torch.empty(24, K, dtype=operand)
    tensors = (x, weight, *[None] * 6)
    return specs.BlockSpec.of(tensors, dtype, launch.Settings(), None)


def test_descriptors_copy_rows_of_16_byte_multiples_that_need_no_cast(monkeypatch):
    assert spec_of().copies_tiles
    assert not spec_of(K=36).copies_tiles
    assert not spec_of(operand=torch.float32).copies_tiles
    monkeypatch.setattr(dispatch, "machine", lambda device: dispatch.Machine(108, 40 << 20, (8, 0)))
    assert not spec_of().copies_tiles


def test_a_recipe_is_made_once_for_a_problem_and_state():
    first = recipes.forward(spec_of(), True)
    assert recipes.forward(spec_of(), True) is first
    assert recipes.forward(spec_of(), False) is not first
    assert recipes.forward(spec_of(K=48), True) is not first
    with plans.forced_plan("apply"):
        assert recipes.forward(spec_of(), True) is not first


def test_numbers_given_as_integers_are_floats_to_the_kernels():
    """Triton makes a constant of an integer 1, and another type of any other."""
    values = launch.Settings("batch", momentum=1, eps=1, activation="elu", a=1, b=0).values(8, 8, 8, 4, True)
    assert [type(values[name]) for name in ("momentum", "eps", "act_a", "act_b")] == [float] * 4
