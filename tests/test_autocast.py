"""Autocast: kernels of small products round fp32 operands themselves, and gradients are in each tensor's own dtype."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.blocks import BUFFERS, Block
from support.launched import kernels_launched
from support.numerics import judge, judge_once
from support.ops_log import OpsLog
from support.optimizers import DEVICE, HAS_FUSED
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import fastnn
from fastnn import plans
from fastnn.functional import BatchNorm, linear_batch_norm_act_dropout

DTYPES = (torch.bfloat16, torch.float16)
# Smooth: one flipped gate outweighs all else, and rounding x and W moves many.
BLOCKS = {
    "whole batch": {"norm": "batch", "bias": True, "activation": "silu", "p": 0.3},
    "epilogue": {"norm": "none", "bias": True, "activation": "silu", "p": 0.3},
    "eval": {"norm": "running", "bias": True, "activation": "silu", "grads": False},
    "eval with gradients": {"norm": "running", "bias": True, "activation": "silu"},  # is cast outside
    "Linear": {"norm": "none", "bias": True, "activation": "identity"},
}
FORWARDS = {"whole batch": "whole_batch_forward_kernel", "epilogue": "linear_forward_kernel"}
FORWARDS |= {"eval": "linear_forward_kernel", "Linear": "linear_forward_kernel"}


def block_of(case, dtype, device, M=35, K=27, N=21):
    return Block(M, K, N, autocast=dtype, device=device, **BLOCKS[case])


def draw_of(block, x_dtype=torch.float32):
    """x in fp32, as a first layer has it, or as the layer before has left it."""

    def draw(generator):
        inputs = block.draw(generator)
        return inputs | {"x": inputs["x"].to(x_dtype)}

    return draw


def launched(function):
    """Kernels of ours, and casts, by name."""
    with kernels_launched() as kernels, OpsLog(DEVICE) as log:
        function()
    return kernels, [op.name for op in log.ops if op.name == "_to_copy"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["first layer", "later layer"])
@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_are_as_accurate_as_eager(case, first, dtype, device):
    block = block_of(case, dtype, device)
    draw = draw_of(block, torch.float32 if first else dtype)
    judge(block.ours, block.eager, draw, block.axes, draws=16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 1), (3, 5, 3), (16, 16, 8), (65, 33, 130)], ids=str)
@pytest.mark.parametrize("case", ["epilogue", "eval", "Linear"])
def test_shapes(case, shape, dtype, device):
    M, _, N = shape
    block = block_of(case, dtype, device, *shape)
    # Gradients are stored in fp32, but a rounding is one of the computation's dtype.
    floor = dict.fromkeys(block.axes.keys() & {"dx", "dweight", "dbias"}, torch.finfo(dtype).eps * (M * N) ** 0.5)
    judge_once(block.ours, block.eager, block.draw(torch.Generator().manual_seed(1)), block.axes, floor=floor)


@pytest.mark.parametrize("M", [8, 40, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_of_whole_batches(dtype, M, device):
    block = block_of("whole batch", dtype, device, M, 43, 19)
    judge_once(block.ours, block.eager, block.draw(torch.Generator().manual_seed(1)), block.axes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FORWARDS)
def test_rounding_in_registers_gives_the_bits_of_a_cast(case, dtype, device):
    """Of the whole forward, which statistics and running statistics follow."""
    block = block_of(case, dtype, device)
    inputs = block.draw(torch.Generator().manual_seed(3))
    cast = {name: inputs[name].to(dtype) for name in ("x", "weight", "bias")}
    mine, theirs = ({name: t.clone() for name, t in (inputs | changed).items()} for changed in ({}, cast))
    found, expected = block.ours(mine), block.ours(theirs)
    if case == "Linear":  # whose cast operands the library multiplies
        torch.testing.assert_close(found["out"], expected["out"], rtol=torch.finfo(dtype).eps, atol=1e-6)
    else:
        assert all(torch.equal(found[name], expected[name]) for name in expected.keys() & {"out", *BUFFERS})
    assert found["out"].dtype == expected["out"].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FORWARDS)
def test_no_cast_is_launched(case, dtype, device):
    block = block_of(case, dtype, device)
    inputs = block.draw(torch.Generator().manual_seed(0))
    kernels, casts = launched(lambda: block.ours(inputs))
    backward = {"whole batch": ["columns_backward_kernel"], "epilogue": ["columns_backward_kernel"]}.get(case, [])
    assert kernels == [FORWARDS[case], *backward, *["linear_backward_kernel"] * block.grads]
    assert casts == []


def test_products_of_the_library_are_cast_outside(interpreted, device):  # a GPU's backward has a thread of its own
    block = block_of("whole batch", torch.bfloat16, device)
    inputs = block.draw(torch.Generator().manual_seed(0))
    with plans.forced_plan("whole_batch", "library"):
        kernels, casts = launched(lambda: block.ours(inputs))
    assert kernels == ["whole_batch_forward_kernel", "columns_backward_kernel"]
    assert len(casts) == 6  # x, weight and bias, and their gradients


@pytest.mark.parametrize(
    ("M", "N", "K", "norm", "save", "rounds"),
    [
        (64, 100, 784, "batch", True, True),
        (512, 40, 100, "batch", True, True),
        (600, 40, 600, "batch", True, False),  # more rows than a whole batch
        (64, 10, 100, "none", True, True),
        (64, 100, 784, "running", False, True),
        (64, 100, 784, "running", True, False),  # the library's product, for z
        (512, 100, 784, "batch", True, False),  # more of x than a program reads in the time of a launch
        (4096, 4096, 4096, "none", False, False),
    ],
)
def test_whose_operands_are_rounded_in_registers(M, N, K, norm, save, rounds):
    assert plans.rounds_operands(M, N, K, torch.bfloat16, torch.device("cpu"), norm, save) == rounds


@pytest.mark.parametrize("names", ["x", "weight", "bias", "gamma", "beta", "x+weight", "weight+bias", "x+bias+gamma"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_any_subset_are_in_their_tensors_dtypes(names, training):
    drawn = {"x": torch.randn(20, 5).bfloat16(), "weight": torch.randn(6, 5), "bias": torch.randn(6)}
    drawn |= {"gamma": torch.rand(6) + 0.5, "beta": torch.randn(6)}
    g = torch.randn(20, 6).bfloat16()

    def eager(x, weight, bias, *, batch_norm, activation):
        y = F.linear(x, weight, bias)
        return F.silu(F.batch_norm(y, *batch_norm[:4], batch_norm.training))

    results = []
    for function in (linear_batch_norm_act_dropout, eager):
        leaves = {name: t.clone().requires_grad_(name in names.split("+")) for name, t in drawn.items()}
        norm = BatchNorm(torch.zeros(6), torch.ones(6), leaves["gamma"], leaves["beta"], training=training)
        with torch.autocast(DEVICE, torch.bfloat16):
            out = function(*(leaves[name] for name in ("x", "weight", "bias")), batch_norm=norm, activation="silu")
        out.backward(g)
        results.append({name: leaf.grad for name, leaf in leaves.items()})
    mine, theirs = results
    for name, gradient in mine.items():
        assert (gradient is None) == (theirs[name] is None) == (name not in names.split("+"))
        if gradient is not None:
            assert gradient.dtype == drawn[name].dtype
            if name == "bias" and training:
                assert torch.equal(gradient, torch.zeros(6))
            else:
                torch.testing.assert_close(gradient, theirs[name], rtol=0.05, atol=0.1)


@pytest.mark.parametrize("grads", [True, False])
def test_a_linear_alone_in_a_sequential(grads):
    model = fastnn.nn.Sequential(nn.Linear(9, 5))
    x, g = torch.randn(7, 3, 9), torch.randn(7, 3, 5).bfloat16()

    def step():
        with torch.autocast(DEVICE, torch.bfloat16), torch.set_grad_enabled(grads):
            out = model(x)
        assert (out.shape, out.dtype) == ((7, 3, 5), torch.bfloat16)
        if grads:
            out.backward(g)

    assert launched(step) == (["linear_forward_kernel", *["linear_backward_kernel"] * grads], [])
    assert all((p.grad is not None) == grads for p in model.parameters())


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_double_backward_equals_eagers(training, x_dtype):
    """A gradient penalty reaches the fp32 leaves, as in eager, whose ops it is made of."""
    drawn = [torch.randn(16, 5).to(x_dtype), torch.randn(6, 5), torch.randn(6), torch.rand(6) + 0.5, torch.randn(6)]
    g = torch.randn(16, 6).bfloat16()

    def eager(x, weight, bias, *, batch_norm, activation):
        return F.batch_norm(F.linear(x, weight, bias), *batch_norm[:4], batch_norm.training).tanh()

    found = []
    for function in (linear_batch_norm_act_dropout, eager):
        x, weight, bias, gamma, beta = leaves = [t.clone().requires_grad_() for t in drawn]
        norm = BatchNorm(torch.zeros(6), torch.full((6,), 2.0), gamma, beta, training=training)
        with torch.autocast(DEVICE, torch.bfloat16):
            out = function(x, weight, bias, batch_norm=norm, activation="tanh")
        (gradient,) = torch.autograd.grad(out, x, g, create_graph=True)
        gradient.square().mean().backward()
        found.append([gradient.detach(), *(leaf.grad for leaf in leaves if leaf is not bias)])
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


@pytest.mark.real_empty
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_traced_calls_cast_outside_and_compile_at_most_twice():
    """Once more for the batch size as a symbol: no guard asks how large the product is."""
    calls, frames = [], []
    model = fastnn.nn.Sequential(nn.Linear(7, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    def compiler(graph, examples):
        frames.append(graph)
        calls.append(sum(node.target is torch.ops.aten._to_copy.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=compiler, bw_compiler=lambda graph, examples: make_boxed_func(graph.forward))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for M in (12, 20, 33, 5000):
        with torch.autocast(DEVICE, torch.bfloat16):
            assert compiled(torch.randn(M, 7)).dtype == torch.bfloat16
    assert len(frames) <= 2
    assert min(calls) >= 3  # of the input and two weights


@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce:RuntimeWarning")  # numpy's, of inf - inf
def test_an_overflow_is_found_and_the_step_skipped():
    model = fastnn.nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for scale in (2.0**30, 2.0**10):
        scaler = torch.amp.GradScaler(DEVICE, init_scale=scale)
        with torch.autocast(DEVICE, torch.float16):
            out = model(torch.randn(20, 6))
        optimizer.zero_grad()
        scaler.scale(out.float().square().mean()).backward()
        scaler.step(optimizer)
        same = [torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        assert all(same) == (scale == 2.0**30)


def trained_by_gradscaler(library, name, dtype, overflow, **settings):
    """Six steps, the third of which overflows: after each the scale, parameters and buffers, the optimizer's state."""
    generator = torch.Generator().manual_seed(1)
    layers = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 3)
    model = library.nn.Sequential(*layers)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.2, 0.5, generator=generator)
    optimizer = getattr(library.optim, name)(model.parameters(), lr=0.05, **settings)
    scaler, seen = torch.amp.GradScaler(DEVICE, init_scale=2.0**6, growth_interval=2), []
    for step in range(6):
        infinite = overflow if step == 2 else None
        x = torch.randn(20, 6, generator=generator) * (torch.inf if infinite == "input" else 1)
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype):
            out = model(x)
        loss = (out.float() - 1).square().mean() * (torch.inf if infinite == "loss" else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        state = [dict(optimizer.state[parameter]) for parameter in model.parameters()]
        seen.append(copy.deepcopy([scaler.get_scale(), dict(model.state_dict()), state]))
    return seen


@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce:RuntimeWarning")  # numpy's, of inf - inf
@pytest.mark.parametrize("overflow", ["loss", "input"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "settings"), [("SGD", {"momentum": 0.9}), ("Adam", {"amsgrad": True}), ("NAdam", {})])
def test_training_by_gradscaler_through_an_overflow_is_torchs(name, settings, fused, dtype, overflow):
    """The overflow moves buffers as torch's forward does, and neither a parameter nor the optimizer's state."""
    if fused and name not in HAS_FUSED:
        pytest.skip(f"torch.optim.{name} has no fused")
    own = settings | ({"fused": True} if fused else {})
    found = trained_by_gradscaler(fastnn, name, dtype, overflow, **own)
    expected = trained_by_gradscaler(torch, name, dtype, overflow, **settings)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05, equal_nan=True, check_device=False)  # of counts
    assert [scale for scale, *_ in found] == [64.0, 128.0, 64.0, 64.0, 128.0, 128.0]
    (_, before, state), (_, after, later) = found[1:3]
    moved = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert moved == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    torch.testing.assert_close(later, state, rtol=0, atol=0)
    assert not any(torch.equal(found[5][1][key], tensor) for key, tensor in after.items() if "weight" in key)
