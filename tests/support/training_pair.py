"""Judges a transformed model beside the plain one: a step in each mode, twenty steps of training, its dropout.

The rule is that of support.numerics. The truth is the plain model in float64; E are the errors of the plain model on
the batch in its order and in random ones. A gradient that is zero but for rounding, as that of a Linear's bias before
BatchNorm, has a truth of nothing and an E of eager's noise: four times that is its bound, and exact zeros are within.
"""

import copy
from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from support.numerics import Tensors, judge_tensor
from support.published_models import Published
from support.published_models.entry import Inputs

PERMUTATIONS = 4
STEPS = 20
LR = 0.05
# Within twenty steps rounding may decide a ReLU's gate in one training and in none of the others. It is one of a few
# hundred elements of one step's gradient: this part of a tensor's way from its start may differ.
GATE = 2.0**-10
DRAWS = 16
SPREAD = 1.6  # ratio of the variances over draws; of eager against itself 0.74 to 1.22
DISTANCE = 4.0  # squared, of the means over draws, in what is expected of two; of eager against itself up to 2.2
DIFFERENCE = 1e-4  # of the parameters, times standard normal directions
SLOPE = 0.1  # part of the gradient's norm by which the slope may differ; gates that flip make it 0.04

Transform = Callable[[nn.Module], Any]


class Pair(NamedTuple):
    """The plain model, and its copy in `model`, which `transformed` calls."""

    plain: nn.Module
    model: nn.Module
    transformed: Any


def make_pair(published: Published, transform: Transform, dropout: bool) -> Pair:
    """Asserts that the transformation keeps values and keys. BatchNorm's parameters and statistics are random."""
    torch.manual_seed(0)
    plain = published.make()
    module: Any
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
        if not dropout and isinstance(module, nn.Dropout):
            module.p = 0.0
        if not dropout and isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    model = copy.deepcopy(plain)
    transformed = transform(model)
    before, after = plain.state_dict(), model.state_dict()
    assert list(before) == list(after), f"keys {list(after)}, were {list(before)}"
    assert all(torch.equal(before[name], after[name]) for name in before)
    return Pair(plain, model, transformed)


def drops(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) or getattr(module, "dropout", 0.0) for module in model.modules())


def judge_step(published: Published, transform: Transform) -> None:
    """Outputs, gradients and buffers of a step in train, then of one in eval, then outputs without gradients."""
    pair = make_pair(published, transform, dropout=False)
    inputs = decided_inputs(published, pair.plain)
    cotangents = like_outputs(pair.plain, inputs)

    def results(model: nn.Module, call: Any, inputs: Inputs, order: Tensor | None = None) -> Tensors:
        return {**train_step(model, call, inputs, order), **eval_step(model, call, inputs, order)}

    def train_step(model: nn.Module, call: Any, inputs: Inputs, order: Tensor | None) -> Tensors:
        return step("train", model, call, inputs, cotangents, order)

    def eval_step(model: nn.Module, call: Any, inputs: Inputs, order: Tensor | None) -> Tensors:
        found = step("eval", model, call, inputs, cotangents, order)
        with torch.no_grad():
            outs = tuple_of(call(*inputs))
        return found | {f"eval without gradients: output {i}": restored(t, order) for i, t in enumerate(outs)}

    judge_results(published, pair, inputs, results)


def judge_training(published: Published, transform: Transform) -> None:
    """The losses of STEPS steps of SGD, and the parameters and buffers after them."""
    pair = make_pair(published, transform, dropout=False)
    inputs = published.inputs(0)
    targets = like_outputs(pair.plain, inputs)
    start = {name: t.clone() for name, t in pair.plain.state_dict().items()}

    def results(model: nn.Module, call: Any, inputs: Inputs, order: Tensor | None = None) -> Tensors:
        call.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
        losses = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            outs = [out for out in tuple_of(call(*inputs)) if out.requires_grad]
            wanted = arranged(targets, outs, order)
            loss: Any = sum((out - t).square().mean() for out, t in zip(outs, wanted, strict=True))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return {"losses": torch.stack(losses), **{name: t.clone() for name, t in model.state_dict().items()}}

    def way(name: str, exact: Tensor) -> float:
        return GATE * float((exact - (exact[0] if name == "losses" else start[name])).norm())

    judge_results(published, pair, inputs, results, way)


def judge_dropout(published: Published, transform: Transform) -> None:
    """Mean and variance of the outputs over draws of the masks, the backward's masks, and none of them in eval."""
    pair = make_pair(published, transform, dropout=True)
    inputs = decided_inputs(published, pair.plain)
    pair.plain.train(), pair.transformed.train()
    with torch.no_grad():
        theirs, ours = (
            torch.stack([torch.cat([out.flatten() for out in tuple_of(call(*inputs))]) for _ in range(DRAWS)]).double()
            for call in (pair.plain, pair.transformed)
        )
    variance = float(theirs.var(0).sum())
    ratio = float(ours.var(0).sum()) / variance
    assert 1 / SPREAD < ratio < SPREAD, f"variance over draws {ratio:.3g} times eager's"
    distance = float((ours.mean(0) - theirs.mean(0)).square().sum()) / (2 * variance / DRAWS)
    assert distance < DISTANCE, f"squared distance of the means {distance:.3g} times that of two of eager's"

    slope, norm, expected = slopes(pair.model, pair.transformed, inputs, like_outputs(pair.plain, inputs))
    assert abs(slope - expected) < SLOPE * norm, f"slope {slope:.4g}, gradient gives {expected:.4g} of norm {norm:.4g}"

    pair.model.load_state_dict(pair.plain.state_dict())
    cotangents = like_outputs(pair.plain, inputs)
    judge_results(
        published, pair, inputs, lambda model, call, *rest: step("eval", model, call, rest[0], cotangents, *rest[1:])
    )


def slopes(model: nn.Module, call: Any, inputs: Inputs, cotangents: list[Tensor]) -> tuple[float, float, float]:
    """In a random direction, under one seed: the difference quotient, the gradient's norm, and what it predicts."""
    params = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=generator) for p in params]

    def value() -> Any:
        torch.manual_seed(4)
        outs = [out for out in tuple_of(call(*inputs)) if out.requires_grad]
        return sum((out.double() * g).sum() for out, g in zip(outs, cotangents, strict=True))

    def moved(by: float) -> float:
        with torch.no_grad():
            for p, direction in zip(params, directions, strict=True):
                p.add_(direction, alpha=by)
        return float(value().detach())

    gradients = torch.autograd.grad(value(), params, allow_unused=True)
    pairs = [(g.double(), d) for g, d in zip(gradients, directions, strict=True) if g is not None]
    expected = float(sum((g * d).sum() for g, d in pairs))
    norm = sum(float(g.square().sum()) for g, _ in pairs) ** 0.5
    above = moved(DIFFERENCE)
    return (above - moved(-2 * DIFFERENCE)) / (2 * DIFFERENCE), norm, expected


def judge_results(
    published: Published,
    pair: Pair,
    inputs: Inputs,
    results: Callable[..., Tensors],
    floor: Callable[[str, Tensor], float] = lambda name, exact: 0.0,
) -> None:
    """results(model, call, inputs, order) of the transformed model against those of copies of the plain one."""
    generator = torch.Generator().manual_seed(1)
    orders = [torch.randperm(len(inputs[0]), generator=generator) for _ in range(PERMUTATIONS)]
    wide, *eager = (copy.deepcopy(pair.plain) for _ in range(2 + PERMUTATIONS))
    wide.double()
    exact = results(wide, wide, tuple(t.double() if t.is_floating_point() else t for t in inputs), None)
    plain = results(eager[0], eager[0], inputs, None)
    others = [
        results(model, model, published.permuted(inputs, order), order)
        for model, order in zip(eager[1:], orders, strict=True)
    ]
    mine = results(pair.model, pair.transformed, inputs, None)
    assert mine.keys() == plain.keys(), f"{sorted(mine)}, eager has {sorted(plain)}"
    for name, their in plain.items():
        our = mine[name]
        assert (our.shape, our.dtype) == (their.shape, their.dtype), f"{name}: {our.shape}, {our.dtype}"
        if their.is_floating_point():
            judge_tensor(name, our, exact[name], their, *(o[name] for o in others), floor=floor(name, exact[name]))
        else:
            assert torch.equal(our, their), f"{name}: {our}, eager {their}"


def step(
    mode: str, model: nn.Module, call: Any, inputs: Inputs, cotangents: list[Tensor], order: Tensor | None = None
) -> Tensors:
    """Outputs, gradients of inputs and parameters, and buffers after it."""
    call.train(mode == "train")
    model.zero_grad()
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    outs = tuple_of(call(*leaves))
    differentiable = [out for out in outs if out.requires_grad]
    torch.autograd.backward(differentiable, arranged(cotangents, differentiable, order))
    found = {f"output {i}": restored(out, order) for i, out in enumerate(outs)}
    found |= {f"gradient of input {i}": restored(t.grad, order) for i, t in enumerate(leaves) if t.grad is not None}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {f"{mode}: {name}": t.detach().clone() for name, t in found.items()}


def decided_inputs(published: Published, plain: nn.Module) -> Inputs:
    """The first inputs for which no gate of a ReLU is rounding noise: a flip outweighs all other errors."""
    for seed in count():
        inputs = published.inputs(seed)
        wide = copy.deepcopy(plain).double()
        with torch.no_grad(), _Gates() as gates:
            for mode in (True, False):
                wide.train(mode)(*(t.double() if t.is_floating_point() else t for t in inputs))
        if gates.decided:
            return inputs
    raise AssertionError


class _Gates(TorchFunctionMode):
    decided = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("relu", "relu_", "leaky_relu", "leaky_relu_"):
            y = args[0].abs()
            noise = 8 * torch.finfo(torch.float32).eps * float(y.max())
            self.decided &= not bool(((y > 0) & (y < noise)).any())
        return func(*args, **(kwargs or {}))


def like_outputs(plain: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Standard normal tensors of the shapes of those outputs that have a gradient."""
    generator = torch.Generator().manual_seed(2)
    outs = tuple_of(copy.deepcopy(plain)(*inputs))
    return [torch.randn(out.shape, generator=generator) for out in outs if out.requires_grad]


def arranged(tensors: list[Tensor], outs: list[Tensor], order: Tensor | None) -> list[Tensor]:
    """In the order and dtype of the outputs."""
    ordered = [t if order is None or t.dim() == 0 else t[order] for t in tensors]
    return [t.to(out.dtype) for t, out in zip(ordered, outs, strict=True)]


def restored(t: Tensor, order: Tensor | None) -> Tensor:
    return t if order is None or t.dim() == 0 else t[order.argsort()]


def tuple_of(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)
