"""The gate before every row: what is timed gives the right result, or it is not timed.

The truth is torch.nn in float64 on the row's own parameters, input and cotangent; the yardstick is the error of eager
torch in the row's dtype, under permutations (tests/support/numerics.py has the rule). Dropout's mask is read off the
row's output: wherever ReLU lets a value through, a zero was dropped.
"""

import copy
from collections.abc import Callable

import torch
from support.numerics import PERMUTATIONS, judge_tensor
from torch import Tensor, nn

from bench.models import Block, Mlp, Model, Results
from fastnn.kernels.dropout import threshold_and_scale

Step = Callable[[], object]
# Of a product's operands; what rounding may do to a normalised value before ReLU is a few of them.
EPS = {"fp32": 2.0**-23, "tf32": 2.0**-10, "bf16": 2.0**-7}
LARGE = 1 << 22  # numbers of an input beyond which the error of one order is that of another, and memory is dear
FP32_BIAS_CORRECTION = 2.0**-14  # 1 - 0.999 is 5e-5 off in fp32, which torch's compiled and capturable steps take
RATE_SCATTER = 6  # standard deviations of a rate drawn: 1 in 5e8 is beyond by chance


class Multiply(nn.Module):
    """Dropout with a mask given: one rounding, as CUDA's."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.promote_types(x.dtype, torch.float32)) * self.mask).to(x.dtype)


def plain(layers: nn.Sequential, mask: Tensor | None) -> nn.Sequential:
    """The same layers, copied, as torch.nn runs them one by one, with that mask for dropout."""
    dropout: nn.Module = nn.Identity() if mask is None else Multiply(mask)
    return nn.Sequential(*(dropout if isinstance(layer, nn.Dropout) else copy.deepcopy(layer) for layer in layers))


def settle_gates(block: Block) -> None:
    """Zeroes the cotangent where rounding alone decides ReLU's gate: one flip there outweighs all other errors."""
    with torch.no_grad():
        z = block.x.double() @ block.layers[0].weight.double().t()
        norm = block.layers[1]
        scale = norm.weight.double() * (z.var(0, correction=0) + norm.eps).rsqrt()
        y = (z - z.mean(0)) * scale + norm.bias.double()
        noise = 1 + (z.abs() + z.mean(0).abs()) * scale.abs() + norm.bias.double().abs()
        block.g *= y.abs() > 8 * EPS[block.dtype] * noise


def dropout_mask(model: Model, before: nn.Sequential, x: Tensor, out: Tensor) -> Tensor | None:
    """What the row's dropout multiplied with; AssertionError if it drew at another rate, anywhere."""
    if model.p == 0:
        return None
    with torch.no_grad():
        kept_if_on = out != 0
        on = plain(before, None).double()(x.double()) > 8 * EPS[model.dtype]
    dropped = on & ~kept_if_on
    for where, dims in (("", (0, 1)), (" in a row", (1,)), (" in a column", (0,))):
        counts = on.sum(dims).clamp(min=1)
        off = (dropped.sum(dims) / counts - model.p).abs()
        scatter = RATE_SCATTER * (model.p * (1 - model.p) / counts).sqrt() + 2.0**-16
        assert (off <= scatter).all(), f"dropout: the rate{where} is {float(off.max()):.3f} off {model.p}"
    scale = threshold_and_scale(model.p)[1] if model.implementation == "fastnn" else 1 / (1 - model.p)
    return kept_if_on * scale


def run(layers: nn.Sequential, x: Tensor, g: Tensor) -> Results:
    """Output, gradients and buffers of one training step."""
    leaves = {"x": x.detach().clone().requires_grad_(), **dict(layers.named_parameters())}
    out = layers(leaves["x"])
    found = torch.autograd.grad(out, tuple(leaves.values()), g.to(out.dtype))
    gradients = {f"gradient of {name}": gradient for name, gradient in zip(leaves, found, strict=True)}
    return {"out": out.detach(), **gradients, **dict(layers.named_buffers())}


def run_permuted(layers: nn.Sequential, x: Tensor, g: Tensor) -> Results:
    """The same with rows and input features in a random order, which is equally right."""
    rows, features = (torch.randperm(size, device=x.device) for size in x.shape)
    for layer in layers:
        if isinstance(layer, Multiply):
            layer.mask = layer.mask[rows]
    with torch.no_grad():
        layers[0].weight.copy_(layers[0].weight[:, features])
    found = run(layers, x[rows][:, features], g[rows])
    back, features_back = rows.argsort(), features.argsort()
    return found | {
        "out": found["out"][back],
        "gradient of x": found["gradient of x"][back][:, features_back],
        "gradient of 0.weight": found["gradient of 0.weight"][:, features_back],
    }


def compare(mine: Results, before: nn.Sequential, mask: Tensor | None, model: Model, x: Tensor) -> None:
    exact = run(plain(before, mask).double(), x.double(), model.g.double())
    with model.precision():
        eager = [run(plain(before, mask), x, model.g)]
        few = 1 if x.numel() > LARGE else PERMUTATIONS
        eager += [run_permuted(plain(before, mask), x, model.g) for _ in range(few)]
    for name, tensor in mine.items():
        if tensor.is_floating_point():
            judge_tensor(name, tensor, exact[name], *(one[name] for one in eager))
        else:
            assert torch.equal(tensor, exact[name]), f"{name}: {tensor.tolist()}, torch has {exact[name].tolist()}"


def check_block(block: Block, step: Step) -> None:
    """AssertionError unless a step (the block's own, or a graph of it) gives torch.nn's output, gradients, buffers."""
    before = copy.deepcopy(nn.Sequential(*block.layers))
    with block.precision():
        step()
    mine = {name: tensor.clone() for name, tensor in block.results().items()}
    compare(mine, before, dropout_mask(block, before, block.x, mine["out"]), block, block.x.detach())


def check_eval(block: Block) -> None:
    """AssertionError unless the block in eval mode gives torch.nn's output."""
    block.layers.eval()
    with block.precision():
        block.evaluate()
    with torch.no_grad():
        exact = plain(block.layers, None).double()(block.x.double())
        with block.precision():
            eager = plain(block.layers, None)(block.x)
    judge_tensor("out in eval mode", block.out, exact, eager)


def check_mlp(mlp: Mlp, step: Step) -> None:
    """AssertionError unless a step without dropout gives torch.nn's results and then AdamW's parameters."""
    before = copy.deepcopy(nn.Sequential(*mlp.layers))
    with mlp.precision():
        check_step(mlp.optimizer, step)
    mine = {name: tensor.clone() for name, tensor in mlp.results().items()}
    compare(mine, before, None, mlp, mlp.x)


def check_step(optimizer: torch.optim.Optimizer, step: Step) -> None:
    """AssertionError unless the step changes parameters and state as torch's for-loop does with the same gradients.

    The change is judged, not the parameter: a step of 1e-3 is below the rounding of much that it is added to.
    """
    state = copy.deepcopy(optimizer.state_dict())
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    step()
    (exact, exact_params), (eager, eager_params) = (
        _torchs_step(optimizer, state, before, params, dtype) for dtype in (torch.float64, params[0].dtype)
    )
    for place, old in enumerate(before):
        found = (params[place], optimizer), (exact_params[place], exact), (eager_params[place], eager)
        changes = [param.detach().double() - old.double() for param, _ in found]
        if type(optimizer).__module__.startswith("torch."):
            changes.append(changes[1] * (1 + FP32_BIAS_CORRECTION))
        judge_tensor(f"change of parameter {place}", *changes)
        mine, *torchs = (stepping.state[param] for param, stepping in found)
        assert all(mine.keys() == of.keys() for of in torchs), f"state of parameter {place}: {sorted(mine)}"
        for name, value in mine.items():
            assert value.isfinite().all(), f"{name} of parameter {place}: not finite"
            theirs = [of[name].to(value.device) for of in torchs]
            judge_tensor(f"{name} of parameter {place}", value, theirs[0].double(), theirs[1])


def check_finite_step(mlp: Mlp, step: Step) -> None:
    """What can be said of a stack with dropout: its optimizer's step is torch's, and its results are numbers."""
    with mlp.precision():
        check_step(mlp.optimizer, step)
    for name, tensor in mlp.results().items():
        assert tensor.isfinite().all(), f"{name}: not finite"


def _torchs_step(
    optimizer: torch.optim.Optimizer, state: dict, before: list[Tensor], after: list[Tensor], dtype: torch.dtype
) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    """`before`, stepped by torch's for-loop in that dtype with the gradients of `after`; and the optimizer."""
    torchs = next(c for c in type(optimizer).__mro__ if c.__module__.startswith("torch.optim."))
    params = [nn.Parameter(p.to(dtype, copy=True)) for p in before]
    reference = torchs(params)
    reference.load_state_dict(copy.deepcopy(state))  # brings the row's hyperparameters along
    for group in reference.param_groups:
        group |= {"foreach": False, "fused": False, "capturable": False}  # capturable's bias correction is in fp32
    for param, stepped in zip(params, after, strict=True):
        assert stepped.grad is not None
        param.grad = stepped.grad.to(dtype)
    reference.step()
    return reference, params


def check_clipping(params: list[nn.Parameter], max_norm: float, clip: Callable[[], Tensor]) -> None:
    """AssertionError unless the norm and every clipped gradient are torch's."""
    before = [p.grad.clone() for p in params if p.grad is not None]
    results = []
    for dtype in (torch.float64, torch.float32):
        copies = [nn.Parameter(torch.empty_like(grad, dtype=dtype)) for grad in before]
        for param, grad in zip(copies, before, strict=True):
            param.grad = grad.to(dtype)
        norm = nn.utils.clip_grad_norm_(copies, max_norm, foreach=False)
        results.append([norm, *(param.grad for param in copies)])
    for place, (mine, exact, eager) in enumerate(zip([clip(), *(p.grad for p in params)], *results, strict=True)):
        judge_tensor(f"gradient {place - 1}" if place else "norm", mine, exact, eager)
