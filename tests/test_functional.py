"""The functional: errors that change nothing, input layouts, partial gradients, autocast, double backward."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.blocks import Block
from support.numerics import judge_once
from support.optimizers import DEVICE

from fastnn import dispatch, plans, reference
from fastnn.functional import BatchNorm, linear_batch_norm_act_dropout

PLANS = ("columns", "split")


def buffers(N):
    return torch.zeros(N), torch.ones(N), torch.zeros((), dtype=torch.int64)


def call(**overrides):
    """A training call of a (8, 5) -> (8, 6) block with one argument changed; returns the buffers too."""
    mean, var, counter = buffers(6)
    norm = overrides.pop("norm", {})
    arguments = {"input": torch.randn(8, 5), "weight": torch.randn(6, 5), "bias": torch.randn(6), "p": 0.5}
    arguments |= {"activation": "relu"} | overrides
    fields = {"running_mean": mean, "running_var": var, "num_batches_tracked": counter} | norm
    before = {name: None if t is None else t.clone() for name, t in fields.items() if isinstance(t, torch.Tensor)}
    try:
        return linear_batch_norm_act_dropout(**arguments, batch_norm=BatchNorm(**fields))
    except Exception:
        for name, tensor in before.items():
            assert torch.equal(fields[name], tensor), f"{name} changed by a call that raises"
        raise


WRONG = {
    "features": ({"input": torch.randn(8, 4)}, RuntimeError, r"input must be \(\*, K\) = \(\*, 5\), got \(8, 4\)"),
    "weight 3-D": ({"weight": torch.randn(2, 3, 5)}, RuntimeError, r"weight must be 2-D \(N, K\), got \(2, 3, 5\)"),
    "bias": ({"bias": torch.randn(5)}, RuntimeError, r"bias must be \(N,\) = \(6,\), got \(5,\)"),
    "dtype": (
        {"input": torch.randn(8, 5).half()},
        RuntimeError,
        "weight must have .* torch.float16, got torch.float32",
    ),
    "bias dtype": ({"bias": torch.randn(6).half()}, RuntimeError, "bias must have .* torch.float32, got torch.float16"),
    "integers": ({"input": torch.ones(8, 5, dtype=torch.int64)}, RuntimeError, "floating-point dtype, got torch.int64"),
    "scalar": ({"input": torch.tensor(1.0)}, RuntimeError, "at least one dimension, got a scalar"),
    "p above": ({"p": 1.5}, ValueError, "p must be between 0 and 1, got 1.5"),
    "p below": ({"p": -0.1}, ValueError, "p must be between 0 and 1, got -0.1"),
    "p nan": ({"p": float("nan")}, ValueError, "p must be between 0 and 1, got nan"),
    "one row": ({"input": torch.randn(1, 5)}, ValueError, r"more than 1 value per channel .* got input size \(1, 6\)"),
    "3-D": ({"input": torch.randn(2, 8, 5)}, ValueError, "input must be 2-D .* got 3-D"),
    "activation": ({"activation": "rleu"}, ValueError, "activation must be one of identity, relu, .* got 'rleu'"),
    "gamma": (
        {"norm": {"weight": torch.ones(5)}},
        RuntimeError,
        r"batch_norm.weight must be \(N,\) = \(6,\), got \(5,\)",
    ),
    "mean": ({"norm": {"running_mean": torch.ones(7)}}, RuntimeError, r"batch_norm.running_mean must be .* got \(7,\)"),
    "one statistic": ({"norm": {"running_var": None}}, ValueError, "given both or neither"),
    "eps": ({"norm": {"eps": 0.0}}, ValueError, "eps must be positive when training, got 0.0"),
    "mixed dtypes": ({"norm": {"weight": torch.ones(6).half()}}, RuntimeError, "must all be of dtype torch.float32"),
    "trained statistics": (
        {"norm": {"running_mean": torch.zeros(6, requires_grad=True)}},
        RuntimeError,
        "must not require a gradient",
    ),
    "no statistics": (
        {"norm": {"running_mean": None, "running_var": None, "training": False}},
        RuntimeError,
        "running_mean and running_var must be given",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_raises_torchs_type_and_changes_nothing(case):
    overrides, exception, message = WRONG[case]
    with pytest.raises(exception, match=message):
        call(**dict(overrides))


SAME_AS_TORCH = ["features", "dtype", "integers", "one row", "3-D", "gamma", "mean", "one statistic", "eps",
                 "mixed dtypes", "trained statistics", "no statistics"]  # fmt: skip


@pytest.mark.parametrize("kind", SAME_AS_TORCH)
def test_torch_raises_the_same_type(kind):
    """What torch.nn.functional says of the same arguments."""
    overrides, exception, _ = WRONG[kind]
    norm = {"running_mean": torch.zeros(6), "running_var": torch.ones(6), "training": True}
    norm |= overrides.get("norm", {})
    if kind == "3-D":
        with pytest.raises(exception):
            torch.nn.BatchNorm1d(6)(torch.randn(2, 8, 4, 6))
        return
    with pytest.raises(exception):
        F.batch_norm(F.linear(overrides.get("input", torch.randn(8, 5)), torch.randn(6, 5)), **norm)


@pytest.mark.parametrize("training", [True, False])
def test_statistics_that_require_a_gradient_serve_where_none_is_made(training):
    x, found = torch.randn(8, 6), []
    for function in (linear_batch_norm_act_dropout, None):
        mean, var = torch.zeros(6).requires_grad_(), torch.ones(6).requires_grad_()
        with torch.no_grad():
            if function is None:
                out = F.batch_norm(x, mean, var, training=training)
            else:
                out = function(x, batch_norm=BatchNorm(mean, var, training=training))
        found.append([out, mean, var])
    torch.testing.assert_close(*found)


def test_empty_batch_is_legal_and_counts():
    mean, var, counter = buffers(6)
    norm = BatchNorm(mean, var, torch.ones(6, requires_grad=True), torch.zeros(6), counter)
    weight = torch.randn(6, 5, requires_grad=True)
    out = linear_batch_norm_act_dropout(torch.randn(0, 5), weight, batch_norm=norm, activation="relu", p=0.5)
    out.sum().backward()
    assert out.shape == (0, 6)
    assert counter.item() == 1
    assert torch.equal(mean, torch.zeros(6))
    assert torch.equal(weight.grad, torch.zeros(6, 5))


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "strided rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "strided columns": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_and_gradient_layouts(layout, linear):
    block = Block(33, 12, 12, linear=linear, p=0.3)
    change = LAYOUTS[layout]

    def ours(inputs):
        for name in ("x", "g"):
            inputs[name] = change(inputs[name]).detach()
        assert torch.equal(inputs["x"], change(inputs["x"]))
        return block.ours(inputs)

    judge_once(ours, block.eager, block.draw(torch.Generator().manual_seed(0)), block.axes)


@pytest.mark.parametrize("plan", PLANS)
def test_expanded_gradient(plan):
    block = Block(33, 4, 12)

    def expanded(function):
        return lambda inputs: function(inputs | {"g": inputs["g"][:1].expand(33, 12)})

    inputs = block.draw(torch.Generator().manual_seed(0))
    inputs["g"] = inputs["g"][:1].expand(33, 12).contiguous()
    with plans.forced_plan(plan):
        judge_once(expanded(block.ours), block.eager, inputs, block.axes)


# The same examples every time: a bound that one draw in thousands breaks by chance would break a run in dozens.
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    M=st.integers(2, 90), K=st.integers(1, 40), N=st.integers(1, 90), bias=st.booleans(), affine=st.booleans(),
    norm=st.sampled_from(["batch", "running", "none"]), activation=st.sampled_from(["relu", "silu", "gelu"]),
    plan=st.sampled_from(["columns", "split", "epilogue", "apply"]), p=st.sampled_from([0.0, 0.2]),
    dtype=st.sampled_from(dispatch.KERNEL_DTYPES), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(M, K, N, bias, affine, norm, activation, plan, p, dtype, seed):
    block = Block(M, K, N, dtype, norm, bias=bias, affine=affine, activation=activation, p=p)
    # Two rows, or few, make xhat ±1 and its gradient a difference of equals: the floor is what is subtracted.
    floor = {"dx": 4, "dweight": 4} if M < 8 else {"dx": 1 / 4, "dweight": 1 / 4}
    floor = {name: factor * torch.finfo(dtype).eps * (M * N) ** 0.5 for name, factor in floor.items()}
    if norm != "batch":
        floor = {}
    with plans.forced_plan(plan):
        judge_once(block.ours, block.eager, block.draw(torch.Generator().manual_seed(seed)), block.axes, floor=floor)


@pytest.mark.parametrize("wanted", ["input", "weight", "bias", "gamma", "beta"])
@pytest.mark.parametrize("training", [True, False])
def test_gradient_of_one_tensor_alone_equals_its_part_of_all(wanted, training):
    leaves = {"input": torch.randn(20, 5), "weight": torch.randn(6, 5), "bias": torch.randn(6)}
    leaves |= {"gamma": torch.randn(6), "beta": torch.randn(6)}
    g = torch.randn(20, 6)

    def gradients(names):
        tensors = {name: t.clone().requires_grad_(name in names) for name, t in leaves.items()}
        norm = BatchNorm(torch.zeros(6), torch.ones(6), tensors["gamma"], tensors["beta"], training=training)
        out = linear_batch_norm_act_dropout(*(tensors[n] for n in ("input", "weight", "bias")), batch_norm=norm)
        out.backward(g)
        return {name: t.grad for name, t in tensors.items()}

    alone, together = gradients({wanted}), gradients(leaves.keys())
    # Several gradients are one launch of ours, one is the library's product.
    torch.testing.assert_close(alone[wanted], together[wanted])
    assert all(gradient is None for name, gradient in alone.items() if name != wanted)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("linear", [True, False])
def test_autocast_gives_eagers_dtypes_and_values(autocast_dtype, linear):
    x, weight, gamma = torch.randn(20, 6), torch.randn(6, 6), torch.rand(6) + 0.5
    results = []
    for function in (linear_batch_norm_act_dropout, eager_block):
        leaves = [t.clone().requires_grad_() for t in (x, weight, gamma)]
        with torch.autocast(DEVICE, autocast_dtype):
            norm = BatchNorm(torch.zeros(6), torch.ones(6), leaves[2])
            out = function(leaves[0], leaves[1] if linear else None, batch_norm=norm, activation="relu")
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
        results.append([out, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)


def eager_block(input, weight, *, batch_norm, activation):
    z = input if weight is None else F.linear(input, weight)
    norm = batch_norm
    return F.relu(F.batch_norm(z, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_double_backward_equals_eager_in_float64(training, p, monkeypatch):
    """A gradient penalty: the gradient's norm differentiated by everything."""
    seed = torch.tensor(77)
    monkeypatch.setattr("fastnn.seeds.dropout_seed", lambda device: seed)
    mask = reference.dropout_multiplier(seed, 16, 6, p)
    tensors = [torch.randn(16, 5), torch.randn(6, 5), torch.rand(6) + 0.5, torch.randn(6)]
    found = []
    for dtype in (torch.float32, torch.float64):
        x, weight, gamma, beta = leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in tensors]
        norm = BatchNorm(
            torch.zeros(6, dtype=dtype), torch.full((6,), 2.0, dtype=dtype), gamma, beta, training=training
        )
        if dtype == torch.float32:
            out = linear_batch_norm_act_dropout(x, weight, batch_norm=norm, activation="tanh", p=p)
        else:
            y = F.batch_norm(F.linear(x, weight), *norm[:4], training, norm.momentum, norm.eps)
            out = y.tanh() * mask
        (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out).cumsum(0), create_graph=True)
        gradient.square().mean().backward()
        found.append([gradient, *(leaf.grad for leaf in leaves)])
    for mine, exact in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=2e-4, atol=2e-5)


def test_three_dimensional_input_without_batch_norm():
    x, weight = torch.randn(3, 4, 5), torch.randn(6, 5)
    out = linear_batch_norm_act_dropout(x, weight, activation="relu")
    torch.testing.assert_close(out, F.relu(F.linear(x, weight)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, on its way to jvp
def test_function_transforms_take_the_eager_path():
    weight, gamma = torch.randn(6, 5), torch.rand(6)
    x = torch.randn(4, 8, 5)

    def fused(x, weight):
        norm = BatchNorm(weight=gamma)
        return linear_batch_norm_act_dropout(x, weight, batch_norm=norm, activation="relu")

    def plain(x, weight):
        return F.relu(F.batch_norm(F.linear(x, weight), None, None, gamma, training=True))

    def squares(function):
        return lambda w: function(x[0], w).square().sum()

    torch.testing.assert_close(torch.vmap(fused, (0, None))(x, weight), torch.vmap(plain, (0, None))(x, weight))
    torch.testing.assert_close(torch.func.grad(squares(fused))(weight), torch.func.grad(squares(plain))(weight))
    tangent = torch.randn_like(weight)
    mine, theirs = (torch.func.jvp(lambda w, f=f: f(x[0], w), (weight,), (tangent,)) for f in (fused, plain))
    torch.testing.assert_close(mine, theirs)


def test_strided_vectors_are_read_and_written_where_they_are():
    """Columns of a larger matrix as bias, gamma, beta and running statistics: their neighbours stay as they were."""
    x, weight, store = torch.randn(9, 5), torch.randn(6, 5), torch.rand(6, 7)
    before = store.clone()
    bias, gamma, beta, mean, var = (store[:, i] for i in range(1, 6))
    norm = BatchNorm(mean, var, gamma, beta)
    out = linear_batch_norm_act_dropout(x, weight, bias, batch_norm=norm, activation="relu")
    b, g, be, m, v = (before[:, i].clone() for i in range(1, 6))
    expected = F.relu(F.batch_norm(F.linear(x, weight, b), m, v, g, be, training=True))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(store[:, 4:6], torch.stack([m, v], 1))
    assert torch.equal(store[:, [0, 1, 2, 3, 6]], before[:, [0, 1, 2, 3, 6]])


@pytest.mark.parametrize("graph", [False, True])
def test_tied_layers_and_hooks_under_create_graph(graph):
    """One Linear twice, and a hook that doubles: each is differentiated and fired once."""
    linear = torch.nn.Linear(4, 4)
    linear.bias.register_hook(lambda g: g * 2)
    x = torch.randn(6, 4)

    def fused(x):
        return linear_batch_norm_act_dropout(x, linear.weight, linear.bias, activation="tanh")

    def plain(x):
        return linear(x).tanh()

    parameters = list(linear.parameters())
    mine, theirs = (torch.autograd.grad(f(f(x)).square().sum(), parameters, create_graph=graph) for f in (fused, plain))
    torch.testing.assert_close(mine, theirs)


def test_what_the_kernels_do_not_serve_is_torchs():
    """Integers through elementwise layers, sparse weights, empty features."""
    integers = torch.tensor([[1, -2]])
    assert torch.equal(linear_batch_norm_act_dropout(integers, activation="relu"), F.relu(integers))
    x, sparse = torch.randn(3, 4), torch.eye(4).to_sparse()
    torch.testing.assert_close(linear_batch_norm_act_dropout(x, sparse, activation="relu"), F.relu(x))
    assert linear_batch_norm_act_dropout(x, torch.ones(0, 4), activation="relu").shape == (3, 0)


@pytest.mark.parametrize(
    ("x", "grad", "ours"),
    [
        (torch.ones(2, 4), True, True),  # its gradients are one launch
        (torch.ones(2, 3, 4), True, True),
        (torch.ones(1 << 21, 4), True, False),  # the library's products are worth their launches
        (torch.ones(2, 4, dtype=torch.float64), True, False),
        (torch.ones(2, 4), False, False),
    ],
    ids=["small", "3-D", "large", "float64", "no gradient"],
)
def test_linear_alone_is_torchs_own_where_it_saves_no_launch(x, grad, ours, monkeypatch):
    linear = torch.nn.Linear(4, 3, dtype=x.dtype)
    calls, own = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *arguments: calls.append(1) or own(*arguments))
    with torch.set_grad_enabled(grad):
        out = linear_batch_norm_act_dropout(x, linear.weight, linear.bias)
    assert (not calls) == ours
    torch.testing.assert_close(out[:2], own(x[:2], linear.weight, linear.bias))
