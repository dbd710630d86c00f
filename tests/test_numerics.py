"""Proves the judge of the numerical tests: eager torch passes against itself, known mistakes are caught."""

from collections.abc import Callable

import pytest
import torch
from support.numerics import Function, Tensors, judge, judge_once
from torch import Tensor
from torch.nn import functional

pytestmark = pytest.mark.usefixtures("on_host")  # what mistakes are caught by was measured there
M, K, N = 48, 24, 16
LEAVES = {"x": "MK", "weight": "NK", "bias": "N", "gamma": "N", "beta": "N"}
AXES = LEAVES | {"mean": "N", "var": "N", "cotangent": "MN", "out": "MN"}
AXES |= {f"d{name}": letters for name, letters in LEAVES.items()}
LINEAR = {name: AXES[name] for name in ("x", "weight", "bias", "out")}


def draw(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensors:
    """Inputs of `layer`: x (M, K), weight (N, K), cotangent (M, N), all others (N,)."""
    sizes = {"M": M, "K": K, "N": N}
    names = [*LEAVES, "mean", "var", "cotangent"]
    inputs = {n: torch.randn([sizes[s] for s in AXES[n]], generator=generator) for n in names}
    inputs["weight"] /= K**0.5
    inputs["var"].exp_()
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def draw_bf16(generator: torch.Generator) -> Tensors:
    return draw(generator, torch.bfloat16)


def draw_linear(generator: torch.Generator) -> Tensors:
    return {name: tensor for name, tensor in draw_bf16(generator).items() if name in LINEAR}


def layer(t: Tensors) -> Tensors:
    """Linear, BatchNorm that updates mean and var in place, ReLU; and the gradients."""
    leaves = [t[name].requires_grad_() for name in LEAVES]
    x, weight, bias, gamma, beta = leaves
    z = functional.linear(x, weight, bias)
    out = functional.relu(functional.batch_norm(z, t["mean"], t["var"], gamma, beta, training=True))
    gradients = torch.autograd.grad(out, leaves, t["cotangent"])
    names = [f"d{name}" for name in LEAVES]
    return {"out": out, "mean": t["mean"], "var": t["var"], **dict(zip(names, gradients, strict=True))}


def linear(t: Tensors) -> Tensors:
    return {"out": functional.linear(t["x"], t["weight"], t["bias"])}


def backwards(t: Tensors) -> Tensors:
    """`layer` with rows and features in reverse order: the same result, summed in another order."""

    def flip(tensors: Tensors) -> Tensors:
        return {name: tensor.detach().flip(list(range(tensor.dim()))) for name, tensor in tensors.items()}

    return flip(layer(flip(t)))


def rounded(t: Tensor) -> Tensor:
    return t.bfloat16()


def truncated(t: Tensor) -> Tensor:
    bits = t.detach().contiguous().view(torch.int32) & -0x10000  # the upper half of a float32 is a bfloat16
    return bits.view(torch.float32).bfloat16()


def once(function: Function, cast: Callable[[Tensor], Tensor]) -> Function:
    """`function` as a fused kernel does it: float32 throughout, then a single cast (none from float64)."""

    def fused(t: Tensors) -> Tensors:
        if t["x"].dtype == torch.float64:
            return function(t)
        return {name: cast(out) for name, out in function({n: v.float() for n, v in t.items()}).items()}

    return fused


def changed(function: Function, change: Callable[[Tensor], Tensor], name: str = "out") -> Function:
    def different(t: Tensors) -> Tensors:
        outputs = {key: value.detach() for key, value in function(t).items()}
        return outputs | {name: change(outputs[name])}

    return different


def inputs(seed: int = 0) -> Tensors:
    return draw(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ours", [layer, backwards])
def test_eager_passes_against_itself(ours: Function, dtype: torch.dtype) -> None:
    judge(ours, layer, lambda generator: draw(generator, dtype), AXES)


def test_a_fused_result_more_accurate_than_eager_passes() -> None:
    judge(once(layer, rounded), layer, draw_bf16, AXES)


def test_a_truncating_cast_is_caught() -> None:
    judge(once(linear, rounded), linear, draw_linear, LINEAR)
    with pytest.raises(AssertionError, match=r"^out: mean ratio 1\.[67]\d*, limit 1\.25"):
        judge(once(linear, truncated), linear, draw_linear, LINEAR)


def test_a_truncating_cast_of_the_whole_layer_is_caught_by_an_eager_that_rounds_once() -> None:
    # Eager in bfloat16 rounds z as well and so hides a truncation of out: the bar must be one rounding.
    judge(once(layer, rounded), once(layer, rounded), draw_bf16, AXES)
    with pytest.raises(AssertionError, match=r"mean ratio 1\.[67]\d*, limit 1\.25"):
        judge(once(layer, truncated), once(layer, rounded), draw_bf16, AXES)


def one_pass(t: Tensors) -> Tensors:
    x = t["x"]
    mean = x.mean(0)
    var = (x * x).mean(0) - mean * mean
    return {"out": (x - mean) * (var.clamp_min(0) + 1e-5).rsqrt()}


def two_passes(t: Tensors) -> Tensors:
    centred = t["x"] - t["x"].mean(0)
    return {"out": centred * ((centred * centred).mean(0) + 1e-5).rsqrt()}


def batch_norm(t: Tensors) -> Tensors:
    return {"out": functional.batch_norm(t["x"], None, None, training=True)}


def test_a_one_pass_variance_is_caught() -> None:
    def far(generator: torch.Generator) -> Tensors:
        """x (64, 8): columns of spread 1 around means of 1e3 to 1e4."""
        means = 1e3 + 9e3 * torch.rand(8, generator=generator)
        return {"x": torch.randn(64, 8, generator=generator) + means}

    axes = {"x": "MN", "out": "MN"}
    judge(two_passes, batch_norm, far, axes)
    with pytest.raises(AssertionError, match=r"^out, draw 0: error .* \(ratio \d\.?\d*e\+05 to eager's error\)"):
        judge(one_pass, batch_norm, far, axes)


def only(function: Function, name: str) -> Function:
    return lambda t: {name: function(t)[name]}


def put(value: float) -> Callable[[Tensor], Tensor]:
    def change(out: Tensor) -> Tensor:
        out = out.clone()
        out[5, 7] = value
        return out

    return change


@pytest.mark.parametrize(
    ("given", "change"),
    [
        pytest.param(torch.nan, torch.nan_to_num, id="nan missing"),
        pytest.param(0.0, put(torch.nan), id="nan added"),
        pytest.param(torch.inf, torch.neg, id="inf of the wrong sign"),
        pytest.param(torch.inf, torch.nan_to_num, id="inf missing"),
        pytest.param(torch.inf, put(torch.nan), id="nan for inf"),
        pytest.param(0.0, put(torch.inf), id="inf added"),
    ],
)
def test_misplaced_nan_and_inf_are_caught(given: float, change: Callable[[Tensor], Tensor]) -> None:
    t = {name: tensor for name, tensor in inputs().items() if name in LINEAR}
    t["x"][5, 3] = given
    judge_once(linear, linear, t, LINEAR)
    with pytest.raises(AssertionError, match=r"^out, the given inputs: .* at \[5, \d+\], eager"):
        judge_once(changed(linear, change), linear, t, LINEAR)


def test_finite_entries_are_judged_beside_nan() -> None:
    t = {name: tensor for name, tensor in inputs().items() if name in LINEAR}
    t["x"][5, 3] = torch.nan
    with pytest.raises(AssertionError, match=r"^out, the given inputs: error"):
        judge_once(changed(linear, lambda out: out * 1.02), linear, t, LINEAR)


def test_overflow_of_the_stored_dtype_is_eagers() -> None:
    def square(t: Tensors) -> Tensors:
        return {"out": t["x"] * t["x"].abs()}

    t = {"x": torch.tensor([[1.0, 300.0], [-300.0, 2.0]], dtype=torch.float16)}
    axes = {"x": "MN", "out": "MN"}
    judge_once(square, square, t, axes)
    for change in (torch.nan_to_num, torch.neg):
        with pytest.raises(AssertionError, match=r"eager inf, float64 90000"):
            judge_once(changed(square, change), square, t, axes)


def test_overflow_of_a_permuted_eager_does_not_loosen_the_bound() -> None:
    def total(t: Tensors) -> Tensors:
        return {"out": t["x"][:, 0] + t["x"][:, 1] + t["x"][:, 2]}

    x = torch.ones(8, 3)
    x[0] = torch.tensor([6e4, -6e4, 3e4])  # 6e4 + 3e4 is inf in float16, and only 6e4 - 6e4 comes first here
    axes = {"x": "MK", "out": "M"}
    judge_once(total, total, {"x": x.half()}, axes)
    with pytest.raises(AssertionError, match=r"^out, the given inputs: error \d.*, limit \d"):
        judge_once(changed(total, lambda out: out * 1.02), total, {"x": x.half()}, axes)


def test_the_mean_is_judged_by_the_rms_of_eagers_errors() -> None:
    def lucky(t: Tensors) -> Tensors:
        """Off by 0.5 % in float32, unless the first of four rows comes last: an rms of 0.43 % on average."""
        off = t["x"].dtype == torch.float32 and t["x"][-1] != 1
        return {"out": t["x"] * (1.005 if off else 1.0)}

    def ours(t: Tensors) -> Tensors:
        return {"out": t["x"] * 1.006}

    axes = {"x": "M", "out": "M"}
    judge(lucky, lucky, lambda _: {"x": torch.arange(1.0, 5.0)}, axes)
    with pytest.raises(AssertionError, match=r"^out: mean ratio 1\.[34]\d*, limit 1\.25"):
        judge(ours, lucky, lambda _: {"x": torch.arange(1.0, 5.0)}, axes)


@pytest.mark.parametrize("name", ["out", "mean", "dx", "dweight", "dgamma"])
def test_two_percent_are_caught(name: str) -> None:
    judge_once(layer, layer, inputs(), AXES)
    with pytest.raises(AssertionError, match=rf"^{name}, the given inputs: error .*, limit .* \(ratio "):
        judge_once(changed(layer, lambda t: t * 1.02, name), layer, inputs(), AXES)


def test_a_mistake_in_one_draw_of_many_is_caught() -> None:
    rare = inputs(seed=5)["x"]

    def ours(t: Tensors) -> Tensors:
        return changed(layer, lambda out: out * (1.0001 if torch.equal(t["x"], rare) else 1.0))(t)

    with pytest.raises(AssertionError, match=r"^out, draw 5: error"):
        judge(ours, layer, draw, AXES, draws=8)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(lambda out: out[:, :-1], r"shape \(48, 15\), eager \(48, 16\)", id="shape"),
        pytest.param(lambda out: out[0], r"shape \(16,\), eager \(48, 16\)", id="broadcastable shape"),
        pytest.param(torch.Tensor.double, "dtype torch.float64, eager torch.float32", id="dtype"),
    ],
)
def test_a_wrong_shape_or_dtype_is_caught(change: Callable[[Tensor], Tensor], complaint: str) -> None:
    with pytest.raises(AssertionError, match=f"^out, the given inputs: {complaint}"):
        judge_once(changed(layer, change), layer, inputs(), AXES)


def test_a_missing_output_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"^outputs"):
        judge_once(only(layer, "out"), layer, inputs(), AXES)


def test_outputs_that_are_not_floating_must_be_equal() -> None:
    def sign(t: Tensors) -> Tensors:
        return {"positive": t["x"] > 0}

    axes = {"x": "MK", "positive": "MK"}
    judge_once(sign, sign, {"x": inputs()["x"]}, axes)
    with pytest.raises(AssertionError, match=r"^positive, .* torch\.bool values differ"):
        judge_once(changed(sign, put(not inputs()["x"][5, 7] > 0), "positive"), sign, {"x": inputs()["x"]}, axes)


def test_a_constant_column_needs_a_floor() -> None:
    t = {"x": torch.full((M, 1), 3.0)}
    axes = {"x": "MN", "out": "MN"}
    eager = two_passes
    off = changed(eager, lambda out: out + 1e-6)  # of norm 1e-6 * sqrt(48) = 6.9e-6
    judge_once(eager, eager, t, axes)
    judge_once(off, eager, t, axes, floor={"out": 7e-6})
    judge(off, eager, lambda _: t, axes, draws=2, floor={"out": 28e-6})
    with pytest.raises(AssertionError, match=r"^out: mean ratio 1\.35, limit 1\.25"):
        judge(off, eager, lambda _: t, axes, draws=2, floor={"out": 20e-6})
    for floor in (None, {"out": 6.5e-6}):
        with pytest.raises(AssertionError, match=r"^out, the given inputs: error 6\.93e-06, limit"):
            judge_once(off, eager, t, axes, floor=floor)


def test_axes_that_do_not_describe_eager_are_caught() -> None:
    # Errors under such permutations are as large as the result: any result would pass.
    t = {name: tensor for name, tensor in inputs().items() if name in LINEAR}
    with pytest.raises(AssertionError, match="wrong axes"):
        judge_once(linear, linear, t, {name: letters for name, letters in LINEAR.items() if name != "weight"})
    with pytest.raises(AssertionError, match="axes name no input or output"):
        judge_once(linear, linear, t, LINEAR | {"wieght": "NK"})
    with pytest.raises(AssertionError, match="floor names no output"):
        judge_once(linear, linear, t, LINEAR, floor={"uot": 1.0})
    with pytest.raises(AssertionError, match=r"^x: 'M', shape"):
        judge_once(linear, linear, t, LINEAR | {"x": "M"})
    with pytest.raises(AssertionError, match=r"^weight: K is 16, or 24$"):
        judge_once(linear, linear, t, LINEAR | {"weight": "KN"})


def test_an_eager_that_leaves_float64_is_caught() -> None:
    def narrow(t: Tensors) -> Tensors:
        return linear({name: tensor.float() for name, tensor in t.items()})

    t = {name: tensor for name, tensor in inputs().items() if name in LINEAR}
    with pytest.raises(AssertionError, match=r"^out, the given inputs: eager makes torch.float32 of float64"):
        judge_once(linear, narrow, t, LINEAR)


def test_inputs_are_left_alone() -> None:
    t, before = inputs(), inputs()
    judge_once(layer, layer, t, AXES)
    assert all(torch.equal(t[name], before[name]) and not t[name].requires_grad for name in before)
