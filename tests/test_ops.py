"""The registered ops: their fakes, torch.compile over them, and where dropout seeds come from."""

import importlib
import pkgutil

import pytest
import torch
import torch._dynamo.testing
from support.blocks import KEY, Block
from torch.utils.flop_counter import FlopCounterMode

import fastnn
from fastnn import plans, runs, seeds

pytestmark = [
    pytest.mark.real_empty,
    # Dynamo itself instantiates autograd.Function while tracing.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def forward_arguments(norm="batch", linear=True, save=True, dtype=torch.float32, computed=None, N=10):
    block = Block(12, 5 if linear else N, N, dtype, norm, linear=linear, bias=linear, p=0.5)
    t = block.draw(torch.Generator().manual_seed(0))
    counter = torch.zeros((), dtype=torch.int64) if norm == "batch" else None
    return (
        t["x"], t.get("weight"), t.get("bias"), t.get("gamma"), t.get("beta"), t.get("running_mean"),
        t.get("running_var"), counter, torch.tensor(KEY), computed or dtype, norm, 0.1, 1e-5,
        "relu", 0.0, 0.0, 0.5, save,
    )  # fmt: skip


def backward_arguments():
    x, weight, bias, gamma, beta, _, _, _, seed, *_ = arguments = forward_arguments()
    out, saved = torch.ops.fastnn.block_forward(*arguments)
    tensors = torch.randn_like(out), x, weight, bias, gamma, beta, saved, seed
    return *tensors, out.dtype, "batch", "relu", 0.0, 0.0, 0.5, (True, True, True)


CHECKED = {"block_forward": forward_arguments, "block_backward": backward_arguments}


def test_every_op_that_is_registered_passes_opcheck():
    """A new op fails until it is listed above, with arguments to check it by."""
    for module in pkgutil.walk_packages(fastnn.__path__, "fastnn."):
        if module.name != "fastnn.__main__":
            importlib.import_module(module.name)
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastnn::")}
    assert registered == {f"fastnn::{name}" for name in CHECKED}
    for name, arguments in CHECKED.items():
        torch.library.opcheck(getattr(torch.ops.fastnn, name).default, arguments())


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("norm", ["batch", "running", "none"])
def test_forward_op_passes_opcheck(norm, linear, save):
    arguments = forward_arguments(norm, linear, save)
    torch.library.opcheck(torch.ops.fastnn.block_forward.default, arguments)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("norm", ["batch", "running", "none"])
def test_forward_op_of_an_odd_number_of_columns(norm, linear):
    """The statistics end 8 bytes before z, which nobody writes: all is checked but the comparison of those."""
    arguments = forward_arguments(norm, linear, N=9)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fastnn.block_forward.default, arguments, test_utils=checks)
    out, saved = torch.ops.fastnn.block_forward(*arguments)
    again, kept = torch.ops.fastnn.block_forward(*(t.clone() if isinstance(t, torch.Tensor) else t for t in arguments))
    assert torch.equal(out, again)
    z, stats = (0 if norm == "none" else 20), (0 if norm == "none" else 18)
    assert torch.equal(saved[:stats], kept[:stats])
    assert torch.equal(saved[z:], kept[z:])


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_ops_that_round_their_operands_pass_opcheck(norm):
    x, weight, bias, gamma, beta, _, _, _, seed, *_ = arguments = forward_arguments(norm, computed=torch.bfloat16)
    torch.library.opcheck(torch.ops.fastnn.block_forward.default, arguments)
    out, saved = torch.ops.fastnn.block_forward(*arguments)
    assert out.dtype == saved.dtype == torch.bfloat16
    given = (torch.randn_like(out), x, weight, bias, gamma, beta, saved, seed, out.dtype, norm, "relu", 0.0, 0.0, 0.5)
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(torch.ops.fastnn.block_backward.default, (*given, needs))


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False), (True, False, True)])
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("norm", ["batch", "running", "none"])
def test_backward_op_passes_opcheck(norm, linear, needs):
    x, weight, bias, gamma, beta, _, _, _, seed, *_ = arguments = forward_arguments(norm, linear)
    out, saved = torch.ops.fastnn.block_forward(*arguments)
    given = (torch.randn_like(out), x, weight, bias, gamma, beta, saved, seed, out.dtype, norm, "relu", 0.0, 0.0, 0.5)
    torch.library.opcheck(torch.ops.fastnn.block_backward.default, (*given, needs))


@pytest.mark.parametrize("plan", ["grouped", "library"])
def test_gradients_of_transposed_operands_pass_opcheck(plan):
    x, weight, dz = torch.randn(8, 20).t(), torch.randn(8, 6).t(), torch.randn(20, 6)
    given = (dz, x, weight, None, None, None, dz.flatten(), None, dz.dtype, "none", "relu", 0.0, 0.0, 0.0)
    with plans.forced_plan(plan):
        torch.library.opcheck(torch.ops.fastnn.block_backward.default, (*given, (True, True, False)))


def mlp(p=0.5):
    return fastnn.nn.MLP(7, [16, 16, 3], norm_layer=torch.nn.BatchNorm1d, dropout=p)


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_compiles_without_a_break_and_equals_eager(backend):
    torch.manual_seed(1)
    model = mlp(p=0.0)
    compiled_model = mlp(p=0.0)
    compiled_model.load_state_dict(model.state_dict())
    compiled = torch.compile(compiled_model, backend=backend, fullgraph=True)
    for _ in range(2):
        x = torch.randn(20, 7)
        results = [f(x) for f in (model, compiled)]
        torch.testing.assert_close(*results)
        g = torch.randn_like(results[0])
        for out in results:
            out.backward(g)
    for (name, mine), theirs in zip(compiled_model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    for mine, theirs in zip(compiled_model.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_dynamos_graph_holds_the_runs():
    """A node each, of every batch size: torch 2.11 has its is_exporting() True in all it traces."""
    found = []

    def backend(graph, inputs):
        found.append([node.target for node in graph.graph.nodes].count(fastnn.functional.block))
        return graph.forward

    compiled = torch.compile(mlp(), backend=backend, fullgraph=True)
    compiled(torch.randn(12, 7)), compiled(torch.randn(20, 7))
    assert set(found) == {3}


def test_global_hook_is_obeyed_while_compiling():
    model = mlp(p=0.0)
    x = torch.randn(12, 7)
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, out: out * 2 if isinstance(module, torch.nn.Linear) else None
    )
    try:
        compiled = torch.compile(lambda x: model(x), backend="eager")(x)
        torch.testing.assert_close(compiled, model(x))
    finally:
        handle.remove()


def test_batch_sizes_compile_at_most_twice():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = torch.compile(mlp(), backend=counter, fullgraph=True)
    for M in (12, 20, 33, 5, 64, 7, 8, 100, 2, 31):
        model(torch.randn(M, 7)).sum().backward()
    assert counter.frame_count <= 2


@pytest.mark.parametrize("needs_input", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_flop_are_those_of_torchs_layers(training, frozen, needs_input):
    """Of products, as torch counts them: the input's gradient, the weights' where they are trained. Runs as they are
    found in a module, whose own forward leaves them to torch under the counter's global hooks."""
    linear, norm, relu = torch.nn.Linear(7, 16), torch.nn.BatchNorm1d(16).train(training), torch.nn.ReLU()
    last = torch.nn.Linear(16, 3), torch.nn.Tanh()
    linear.requires_grad_(not frozen)
    counts = []
    for call in (runs.apply, lambda run, x: torch.nn.Sequential(*run)(x)):
        with FlopCounterMode(display=False) as counter:
            hidden = call((linear, norm, relu), torch.randn(20, 7, requires_grad=needs_input))
            call(last, hidden).sum().backward()
        counts.append(counter.get_flop_counts()["Global"])
    assert counts[0].keys() == {torch.ops.fastnn.block_forward, torch.ops.fastnn.block_backward}
    assert sum(counts[0].values()) == sum(counts[1].values()) > 2 * 20 * (7 * 16 + 16 * 3)


def test_the_flop_counter_follows_single_layers():
    """By a global hook, under which no run is fused: its table is by modules, as of torch's Sequential."""
    counts = []
    for kind in (fastnn.nn.Sequential, torch.nn.Sequential):
        model = kind(torch.nn.Linear(7, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(20, 7, requires_grad=True)).sum().backward()
        counts.append(counter.get_flop_counts())
    assert counts[0] == counts[1]
    assert "Sequential.0" in counts[0]


def kept_masks(model, x):
    """Which outputs of two dropout layers over ones survive; the layers see the same shape."""
    return [layer(x) != 0 for layer in model]


def two_layers():
    """Activation + dropout runs on inputs of one shape: only the seeds can tell their masks apart."""
    return [fastnn.nn.Sequential(torch.nn.ReLU(), torch.nn.Dropout(0.5)) for _ in range(2)]


@pytest.mark.parametrize("compiled", [False, True])
def test_two_layers_never_share_a_mask(compiled):
    """AOTAutograd merges equal calls of most custom random ops; torch.randint it leaves alone."""
    layers = two_layers()

    def both(x):
        return tuple(kept_masks(layers, x))

    function = torch.compile(both, backend="aot_eager", fullgraph=True) if compiled else both
    ones = torch.ones(64, 64)
    first, second = function(ones)
    third, _ = function(ones)
    for a, b in [(first, second), (first, third)]:
        assert ((a == b).double().mean() - 0.5).abs() < 5 * 0.5 / 64


def test_manual_seed_reproduces_and_forking_restores():
    layer = two_layers()[0]
    ones = torch.ones(32, 32)
    torch.manual_seed(5)
    first, second = layer(ones), layer(ones)
    torch.manual_seed(5)
    with torch.random.fork_rng():
        torch.testing.assert_close(layer(ones), first, rtol=0, atol=0)
    assert torch.equal(layer(ones), first)
    assert torch.equal(layer(ones), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_with_a_consistent_mask(preserve, reentrant):
    """d out / d x of ReLU + dropout at positive x is the mask: what the forward showed or, drawn anew, its own."""
    layer = two_layers()[0]
    x = torch.ones(32, 32, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant, preserve_rng_state=preserve)
    out.backward(torch.ones_like(out))
    assert set(x.grad.unique().tolist()) == {0.0, 2.0}
    if preserve:
        assert torch.equal(x.grad, out.detach())


class StubGenerator:
    """The part of a CUDA generator that seeds are made of."""

    def __init__(self, seed, offset=0):
        self.seed, self.offset = seed, offset

    def initial_seed(self):
        return self.seed

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        self.offset = offset


def test_cuda_seeds_come_from_the_generators_seed_and_offset_without_a_launch(monkeypatch):
    generator = StubGenerator(123)
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    device = torch.device("cuda", 0)
    found = [seeds.dropout_seed(device) for _ in range(100)]
    assert all(seed.is_cpu and seed.dtype == torch.int64 and seed.dim() == 0 and seed >= 0 for seed in found)
    assert len({seed.item() for seed in found}) == 100
    assert generator.offset == 400  # torch's offsets are multiples of 4
    generator.offset = 0
    assert seeds.dropout_seed(device).item() == found[0].item()
    generator.seed, generator.offset = 124, 0
    assert seeds.dropout_seed(device).item() not in {seed.item() for seed in found}


def test_on_a_side_stream_seeds_are_drawn_on_the_device(monkeypatch):
    """As in a capture, which is only ever on one: its warm-up must load the same kernels."""
    generator = StubGenerator(123)
    drawn = []
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7 if index == 1 else 0, raising=False)
    monkeypatch.setattr(torch, "randint", lambda *args, device, **kwargs: drawn.append(device))
    seeds.dropout_seed(torch.device("cuda", 1))
    assert drawn == [torch.device("cuda", 1)]
    assert generator.offset == 0


def test_forced_plan_reaches_the_kernels_and_is_undone():
    block = Block(40, 4, 8)
    inputs = block.draw(torch.Generator().manual_seed(0))
    with plans.forced_plan("split"):
        assert plans.statistics_plan(40, 8, 4, torch.device("cpu")) == "split"
        block.ours(inputs)
    assert plans.statistics_plan(40, 8, 4, torch.device("cpu")) == "columns"


def test_buffers_moved_by_the_kernels_count_as_changed():
    """Autograd must see the in-place update, as it does torch's."""
    arguments = forward_arguments("batch")
    versions = [t._version for t in arguments[5:8]]
    torch.ops.fastnn.block_forward(*arguments)
    assert all(t._version > version for t, version in zip(arguments[5:8], versions, strict=True))


@pytest.mark.parametrize("affine", [True, False])
def test_double_backward_through_16_bit_running_statistics(affine):
    norm = torch.nn.BatchNorm1d(6, affine=affine)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    layers = [torch.nn.Linear(8, 6), norm, torch.nn.Tanh()]
    x, g, found = torch.randn(5, 8), torch.randn(5, 6), []
    for dtype, container in ((torch.bfloat16, fastnn.nn.Sequential), (torch.float64, torch.nn.Sequential)):
        model = container(*layers).to(torch.bfloat16).to(dtype).eval()
        leaf = x.bfloat16().to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf), leaf, g.to(dtype), create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), leaf)[0])
    torch.testing.assert_close(found[0].double(), found[1], rtol=0.1, atol=0.1 * found[1].abs().max().item())
