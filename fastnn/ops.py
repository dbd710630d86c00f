"""The fused block as two registered ops, and the autograd.Function over them.

The ops are what tracers, modes and torch.compile see; plain eager calls run the same recipe without the 3 µs and more
that the dispatcher takes for each. Registered with Library.define/impl, where torch.library.custom_op takes 9 to 18.
All are reached only where dispatch.path found that the kernels serve.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import plans, recipes, reference
from .dispatch import is_traced, launch
from .memory import is_plain
from .specs import BlockSpec, saved_elements, stats_of

_library = torch.library.Library("fastnn", "DEF")
_library.define(
    "block_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor? gamma, Tensor? beta, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor? seed, "
    "ScalarType dtype, str norm, float? momentum, float eps, str activation, float a, float b, float p, bool save) "
    "-> (Tensor out, Tensor saved)"
)
_library.define(
    "block_backward(Tensor grad, Tensor input, Tensor? weight, Tensor? bias, Tensor? gamma, Tensor? beta, "
    "Tensor saved, Tensor? seed, ScalarType dtype, str norm, str activation, float a, float b, float p, "
    "bool[3] needs_linear) -> (Tensor dinput, Tensor dweight, Tensor dbias, Tensor dgamma, Tensor dbeta)"
)
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # whose tracers are no dispatch modes
Tensors = tuple[Tensor | None, ...]  # input, weight, bias, gamma, beta, running_mean, running_var, num_batches_tracked


def is_observed() -> bool:
    """Whether someone follows the ops: a tracer, torch.compile or a dispatch mode."""
    if is_traced():
        return True
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None:
        return True
    return torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)


def _block_forward(*arguments):
    *tensors, seed, dtype = arguments[:10]
    *settings, save = arguments[10:]
    spec = BlockSpec.of(tensors, dtype, launch.Settings(*settings), seed)
    out, saved = recipes.forward(spec, save)(*tensors, seed)
    if spec.settings.norm == "batch":
        count_changes(tensors)
    return out, saved if save else out.new_empty(0)


def count_changes(tensors) -> None:
    """Tells autograd of the buffers that kernels have written."""
    torch.autograd.graph.increment_version([t for t in tensors[5:8] if t is not None])


def _block_forward_fake(
    input, weight, bias, gamma, beta, running_mean, running_var, num_batches_tracked, seed,
    dtype, norm, momentum, eps, activation, a, b, p, save,
):  # fmt: skip
    M, N = input.shape[0], input.shape[1] if weight is None else weight.shape[0]
    settings = launch.Settings(norm, momentum, eps, activation, a, b, p)
    keeps_z = weight is not None and not settings.is_linear_alone
    elements = saved_elements(M, N, dtype, settings, keeps_z)[1] if save else 0
    return input.new_empty((M, N), dtype=dtype), input.new_empty(elements, dtype=dtype)


def _block_backward(
    grad, input, weight, bias, gamma, beta, saved, seed, dtype, norm, activation, a, b, p, needs_linear
):
    """Gradients by input, weight, bias, gamma and beta; an empty tensor where there is or needs to be none."""
    settings = launch.Settings(norm, activation=activation, a=a, b=b, p=p)
    spec = BlockSpec.of((input, weight, bias, gamma, beta, None, None, None), dtype, settings, seed)
    found = recipes.backward(spec, tuple(needs_linear))(grad, input, weight, bias, gamma, beta, saved, seed)
    return tuple(input.new_empty(0) if d is None else d for d in found)  # outputs of an op may not share memory


def _block_backward_fake(
    grad, input, weight, bias, gamma, beta, saved, seed, dtype, norm, activation, a, b, p, needs_linear
):
    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        return input.new_empty(0) if tensor is None or not needed else tensor.new_empty(tensor.shape)

    needs_input, needs_weight, needs_bias = needs_linear
    dinput = input.new_empty(input.shape) if weight is None else like(input, needs_input)
    return dinput, like(weight, needs_weight), like(bias, needs_bias), like(gamma, True), like(beta, True)


for _name, _implementation, _fake in (
    ("block_forward", _block_forward, _block_forward_fake),
    ("block_backward", _block_backward, _block_backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastnn::{_name}", _fake, lib=_library)


@register_flop_formula(torch.ops.fastnn.block_forward)
def _forward_flop(input_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    """Of the product alone, as torch counts its own layers."""
    return 0 if weight_shape is None else 2 * math.prod(input_shape) * weight_shape[0]


@register_flop_formula(torch.ops.fastnn.block_backward)
def _backward_flop(grad_shape: Any, input_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    needs_input, needs_weight, _ = args[-1]
    return _forward_flop(input_shape, weight_shape) * (needs_input + needs_weight)


class Block(torch.autograd.Function):
    """block_forward with its gradient; saves the input, the parameters, z with (2, N) statistics, and the seed.

    others: what has no gradient: running_mean, running_var, num_batches_tracked, seed.
    """

    @staticmethod
    def forward(ctx, input, weight, bias, gamma, beta, others, call):
        if call.recipe is None:
            tensors = input, weight, bias, gamma, beta, *others
            out, saved = torch.ops.fastnn.block_forward(*tensors, call.dtype, *call.settings, True)
        else:
            out, saved = call.recipe(input, weight, bias, gamma, beta, *others)
        ctx.save_for_backward(input, weight, bias, gamma, beta, saved, others[3])
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx, grad):
        call, needs, tensors = ctx.call, ctx.needs_input_grad, ctx.saved_tensors
        if torch.is_grad_enabled() and not is_traced():
            grads = _differentiable_backward(call, needs, tensors, grad)
        elif call.recipe is None or is_observed() or not is_plain(grad):
            norm, _, _, *epilogue = call.settings
            grads = torch.ops.fastnn.block_backward(grad, *tensors, call.dtype, norm, *epilogue, needs[:3])
            grads = [d if needed else None for d, needed in zip(grads, needs[:5], strict=True)]
        else:
            grads = call.recipe.backward(needs[:3])(grad, *tensors)
        return *grads, None, None


def _differentiable_backward(call: "Call", needs: Any, tensors: Any, grad: Tensor) -> list[Tensor | None]:
    """The same gradients as a differentiable graph (create_graph=True), through the plain torch ops."""
    *originals, saved, seed = tensors
    norm, _, eps, activation, a, b, p = call.settings
    # Aliases: differentiating by the tensors themselves would walk through one's history into another (a layer used
    # twice), and fire their hooks.
    parameters: list[Any] = [None if t is None else t.view_as(t) for t in originals]
    gamma, beta = parameters[3:]
    batch_norm = None
    if norm == "batch":
        batch_norm = reference.BatchNorm(weight=gamma, bias=beta, eps=eps)
    elif norm == "running":
        stats = stats_of(saved, grad.shape[1])
        running_var = stats[1].reciprocal().square() - eps
        stored = next((t.dtype for t in (gamma, beta) if t is not None), torch.float32)  # torch's wants them alike
        batch_norm = reference.BatchNorm(stats[0].to(stored), running_var.to(stored), gamma, beta, None, False, 0, eps)
    input, weight, bias = (None if t is None else t.to(call.dtype) for t in parameters[:3])
    assert input is not None
    out = reference.block(input, weight, bias, batch_norm, activation, a, b, p, seed)
    wanted = [i for i in range(5) if needs[i]]
    found = torch.autograd.grad(out, [parameters[i] for i in wanted], grad, create_graph=True)
    grads: list[Tensor | None] = [None] * 5
    for i, gradient in zip(wanted, found, strict=True):
        grads[i] = torch.zeros_like(gradient) if i == 2 and norm == "batch" else gradient
    return grads


def tensors_of(input: Tensor, weight: Tensor | None, bias: Tensor | None, norm: reference.BatchNorm) -> Tensors:
    """As `settle` takes them."""
    batches = norm.num_batches_tracked if norm.training else None
    return input, weight, bias, norm.weight, norm.bias, norm.running_mean, norm.running_var, batches


def settings_of(norm: reference.BatchNorm | None, activation: str, a: float, b: float, p: float) -> Any:
    if norm is None:
        return launch.Settings("none", 0.1, 1e-5, activation, a, b, p)
    return launch.Settings("batch" if norm.training else "running", norm.momentum, norm.eps, activation, a, b, p)


class Call(NamedTuple):
    """What is settled of a call before its tensors are looked at: they may be others of the same form."""

    dtype: torch.dtype  # of the computation and the output
    settings: Any  # launch.Settings
    casts: bool  # the Linear's operands to dtype, before anything else
    save: bool  # for a backward
    recipe: recipes.Forward | None  # None where the op is to be seen, or stood for by its fake


def settle(tensors: Tensors, dtype: torch.dtype, settings: Any) -> Call:
    """tensors: input (M, K), weight, bias, gamma, beta, running_mean, running_var and num_batches_tracked."""
    input, weight = tensors[:2]
    assert input is not None
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:5])
    casts = False
    if weight is not None and any(t is not None and t.dtype != dtype for t in tensors[:3]):
        # The launch of all gradients makes the weight's: without it, the library's product is the better one.
        rounds = weight.requires_grad or not save
        M, (N, K), norm = input.shape[0], weight.shape, settings.norm
        casts = not (rounds and plans.rounds_operands(M, N, K, dtype, input.device, norm, save))
    if is_observed() or input.is_meta or not all(t is None or is_plain(t) for t in tensors):
        return Call(dtype, settings, casts, save, None)
    spec = BlockSpec.of(tensors, dtype, settings, None)
    if casts:
        spec = spec._replace(dtypes=(dtype, dtype, None if tensors[2] is None else dtype, *spec.dtypes[3:]))
    return Call(dtype, settings, casts, save, recipes.forward(spec, save))


def run(call: Call, tensors: tuple[Any, ...], seed: Tensor | None) -> Tensor:
    """The block on tensors as those it was settled for, through autograd only where a gradient may be asked for."""
    if call.casts:
        tensors = (*(None if t is None else t.to(call.dtype) for t in tensors[:3]), *tensors[3:])
    input, weight, bias, gamma, beta, *buffers = tensors
    recipe = call.recipe
    if recipe is None:
        if call.save:
            return Block.apply(input, weight, bias, gamma, beta, (*buffers, seed), call)
        return torch.ops.fastnn.block_forward(*tensors, seed, call.dtype, *call.settings, False)[0]
    if seed is not None and seed.is_cpu == recipe.spec.seed_on_device:
        recipe = recipes.forward(recipe.spec._replace(seed_on_device=not seed.is_cpu), call.save)
        call = call._replace(recipe=recipe)
    if call.save:
        out = _apply(input, weight, bias, gamma, beta, (*buffers, seed), call)
    else:
        mean, var, batches = buffers
        out = recipe(input, weight, bias, gamma, beta, mean, var, batches, seed)[0]
    if call.settings.norm == "batch":
        count_changes(tensors)
    return out


# Without what Function.apply looks for first: a functorch transform, which never comes here.
_apply = super(torch.autograd.Function, Block).apply


def block(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: reference.BatchNorm | None,
    seed: Tensor | None,
    activation: str,
    a: float,
    b: float,
    p: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The fused block on a 2-D input. dtype: of the computation and the output; None is the input's."""
    tensors = tensors_of(input, weight, bias, norm or reference.BatchNorm(training=False))
    settings = settings_of(norm, activation, a, b, p)
    return run(settle(tensors, dtype or input.dtype, settings), tensors, seed)
