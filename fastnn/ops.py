"""The fused block as two registered ops, and the autograd.Function over them.

Registered with Library.define/impl: a call costs 3 µs of host time where torch.library.custom_op costs 9 to 18.
The ops are reached only where dispatch.path found that the kernels serve.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from . import dispatch, plans, reference
from .dispatch import launch, tiles

_library = torch.library.Library("fastnn", "DEF")
_library.define(
    "block_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor? gamma, Tensor? beta, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor? seed, "
    "ScalarType dtype, str norm, float? momentum, float eps, str activation, float a, float b, float p, bool save) "
    "-> (Tensor out, Tensor z, Tensor stats)"
)
_library.define(
    "block_backward(Tensor grad, Tensor input, Tensor? weight, Tensor? bias, Tensor? gamma, Tensor? beta, "
    "Tensor z, Tensor stats, Tensor? seed, str norm, str activation, float a, float b, float p, "
    "bool[3] needs_linear) -> (Tensor dinput, Tensor dweight, Tensor dbias, Tensor dgamma, Tensor dbeta)"
)
_NO_NORM = reference.BatchNorm()


def _device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whatever its arguments'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _are_of(dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.dtype == dtype for tensor in tensors)


def _cast(tensor: Any, dtype: torch.dtype) -> Any:
    return None if tensor is None else tensor.to(dtype)


def _library_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias by the library; into an out= tensor, which autocast leaves alone."""
    z = input.new_empty((input.shape[0], weight.shape[0]))
    if bias is None:
        return torch.mm(input, weight.t(), out=z)
    return torch.addmm(bias, input, weight.t(), out=z)


def _tiles(plan: str, z: Tensor) -> Any:
    rule = tiles.columns_tiles if plan == "columns" else tiles.split_tiles
    return rule(z.shape[0], z.shape[1], z.element_size(), dispatch.machine(z.device).multiprocessors)


def _forward_by_plan(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype, norm: Any, epilogue: Any, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, z where it is not the input, stats where there are)."""
    if weight is not None:
        alone = _is_linear_alone(norm.mode, epilogue.activation, epilogue.p)
        if alone and _are_of(dtype, input, weight, bias):
            return _library_linear(input, weight, bias), None, None
        found = _our_product(input, weight, bias, dtype, norm, epilogue, save and not alone)
        if found is not None:
            return found
    z = input.contiguous() if weight is None else _library_linear(input, weight, bias)
    plan = "apply"
    if norm.mode == "batch":
        plan = plans.statistics_plan(z.shape[0], z.shape[1], z.element_size(), z.device)
    out, stats = getattr(launch, "forward_" + plan)(z, norm, epilogue, _tiles(plan, z))
    return out, None if weight is None else z, stats


def _is_linear_alone(norm: str, activation: str, p: float) -> bool:
    """Whether nothing follows the Linear: its output is the block's, and its gradient the block's."""
    return norm == "none" and activation == "identity" and p == 0


def _our_product(
    input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, norm: Any, epilogue: Any, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """The same with the Linear's product in our kernel; None where the library's, then a pass over z, is the plan."""
    (M, K), N = input.shape, weight.shape[0]
    plan = plans.forward_plan(M, N, K, dtype, input.device, norm.mode, save)
    if plan not in ("whole_batch", "epilogue"):
        return None
    x, weight = input.contiguous(), weight.contiguous()
    precision, split = plans.product_precision(dtype), plans.splits(dtype)
    if plan == "whole_batch":
        shape = tiles.whole_batch_tiles(M, K, max(x.element_size(), dtype.itemsize), split)
        return launch.forward_whole_batch(x, weight, bias, norm, epilogue, shape, precision, save, dtype)
    itemsize, multiprocessors = max(_widest(x, weight), dtype.itemsize), dispatch.machine(x.device).multiprocessors
    descriptors = _are_of(dtype, x, weight) and dispatch.copies_tiles(x, weight)
    if norm.mode == "batch":
        strips = tiles.linear_statistics_tiles(M, N, itemsize, split, descriptors, multiprocessors)
        return launch.forward_linear_statistics(x, weight, bias, norm, epilogue, strips, precision)
    shape = tiles.linear_tiles(M, N, K, itemsize, norm.mode == "running", descriptors, multiprocessors)
    out, z = launch.forward_linear(x, weight, bias, norm, epilogue, shape, precision, save, dtype)
    return out, z, None


def _widest(*operands: Tensor) -> int:
    """Bytes of an element: tiles are sized by what shared memory holds, operands as they are stored."""
    return max(operand.element_size() for operand in operands)


def _block_forward(
    input, weight, bias, gamma, beta, running_mean, running_var, num_batches_tracked, seed,
    dtype, norm, momentum, eps, activation, a, b, p, save,
):  # fmt: skip
    batch_norm = launch.Norm(norm, gamma, beta, running_mean, running_var, num_batches_tracked, momentum, eps)
    with _device_guard(input):
        out, z, stats = _forward_by_plan(
            input, weight, bias, dtype, batch_norm, launch.Epilogue(activation, a, b, p, seed), save
        )
    if norm == "batch":
        buffers = (running_mean, running_var, num_batches_tracked)
        torch.autograd.graph.increment_version([t for t in buffers if t is not None])
    keep_z, keep_stats = save and z is not None, save and norm != "none"
    return out, z if keep_z else out.new_empty(0), stats if keep_stats else out.new_empty(0, dtype=torch.float32)


def _block_forward_fake(
    input, weight, bias, gamma, beta, running_mean, running_var, num_batches_tracked, seed,
    dtype, norm, momentum, eps, activation, a, b, p, save,
):  # fmt: skip
    M, N = input.shape[0], input.shape[1] if weight is None else weight.shape[0]
    z_shape = (M, N) if save and weight is not None and not _is_linear_alone(norm, activation, p) else (0,)
    stats_shape = (2, N) if save and norm != "none" else (0,)
    return (
        input.new_empty((M, N), dtype=dtype),
        input.new_empty(z_shape, dtype=dtype),
        input.new_empty(stats_shape, dtype=torch.float32),
    )


def _block_backward(grad, input, weight, bias, gamma, beta, z, stats, seed, norm, activation, a, b, p, needs_linear):
    """Gradients by input, weight, bias, gamma and beta; an empty tensor where there is or needs to be none."""
    needs_input, needs_weight, needs_bias = needs_linear
    bias = bias if needs_bias else None
    with _device_guard(input):
        if weight is not None and _is_linear_alone(norm, activation, p):
            found = (*_linear_backward(grad.contiguous(), input, weight, bias, needs_input, needs_weight), None, None)
        else:
            z = input.contiguous() if weight is None else z
            plan = plans.statistics_plan(z.shape[0], z.shape[1], z.element_size(), z.device)
            dz, dgamma, dbeta, dbias = getattr(launch, "backward_" + plan)(
                grad.contiguous(), z, None if norm == "none" else stats, launch.Norm(norm, gamma, beta),
                launch.Epilogue(activation, a, b, p, seed), bias, _tiles(plan, z),
            )  # fmt: skip
            found = (dz, None, dbias, dgamma, dbeta)
            if weight is not None:
                dinput, dweight, _ = _linear_backward(dz, input, weight, None, needs_input, needs_weight)
                found = (dinput, dweight, dbias, dgamma, dbeta)
    return tuple(input.new_empty(0) if d is None else d for d in found)  # outputs of an op may not share memory


def _linear_backward(
    dz: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, needs_input: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by input, weight and, where it is given, bias."""
    (M, N), K = dz.shape, input.shape[1]
    saves = needs_input or bias is not None or not _are_of(dz.dtype, input, weight)
    if needs_weight and saves and plans.linear_backward_plan(M, N, K, dz.dtype, dz.device) == "grouped":
        shape, precision = tiles.linear_backward_tiles(_widest(input, weight)), plans.product_precision(dz.dtype)
        return launch.backward_linear(dz, input.contiguous(), weight.contiguous(), bias, needs_input, shape, precision)
    return (
        torch.mm(dz, weight, out=input.new_empty(input.shape)) if needs_input else None,
        torch.mm(dz.t(), input, out=weight.new_empty(weight.shape)) if needs_weight else None,
        None if bias is None else dz.sum(0),
    )


def _block_backward_fake(
    grad, input, weight, bias, gamma, beta, z, stats, seed, norm, activation, a, b, p, needs_linear
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


class Block(torch.autograd.Function):
    """block_forward with its gradient; saves the input, the weight, z, (2, N) statistics and the seed."""

    @staticmethod
    def forward(ctx, input, weight, bias, gamma, beta, running_mean, running_var, num_batches_tracked, seed, *settings):
        dtype, norm, _, eps, *epilogue = settings
        out, z, stats = torch.ops.fastnn.block_forward(
            input, weight, bias, gamma, beta, running_mean, running_var, num_batches_tracked, seed, *settings, True
        )
        ctx.save_for_backward(input, weight, bias, gamma, beta, z, stats, seed)
        ctx.dtype, ctx.norm, ctx.eps, ctx.epilogue = dtype, norm, eps, epilogue
        return out

    @staticmethod
    def backward(ctx, grad):
        input, weight, bias, gamma, beta, z, stats, seed = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _differentiable_backward(ctx, grad)
        else:
            grads = torch.ops.fastnn.block_backward(
                grad, input, weight, bias, gamma, beta, z, stats, seed, ctx.norm, *ctx.epilogue,
                ctx.needs_input_grad[:3],
            )  # fmt: skip
        needed = (d if needs else None for d, needs in zip(grads, ctx.needs_input_grad[:5], strict=True))
        return *needed, *(None,) * (len(ctx.needs_input_grad) - 5)


def _differentiable_backward(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """The same gradients as a differentiable graph (create_graph=True), through the plain torch ops."""
    *originals, _, stats, seed = ctx.saved_tensors
    # Aliases: differentiating by the tensors themselves would walk through one's history into another (a layer used
    # twice), and fire their hooks.
    parameters: list[Any] = [None if t is None else t.view_as(t) for t in originals]
    input, weight, bias, gamma, beta = parameters
    batch_norm = None
    if ctx.norm == "batch":
        batch_norm = reference.BatchNorm(weight=gamma, bias=beta, eps=ctx.eps)
    elif ctx.norm == "running":
        running_var = stats[1].reciprocal().square() - ctx.eps
        stored = next((t.dtype for t in (gamma, beta) if t is not None), torch.float32)  # torch's wants them alike
        batch_norm = reference.BatchNorm(
            stats[0].to(stored), running_var.to(stored), gamma, beta, None, False, 0, ctx.eps
        )
    activation, a, b, p = ctx.epilogue
    input, weight, bias = (_cast(t, ctx.dtype) for t in (input, weight, bias))
    out = reference.block(input, weight, bias, batch_norm, activation, a, b, p, seed)
    wanted = [i for i in range(5) if ctx.needs_input_grad[i]]
    found = torch.autograd.grad(out, [parameters[i] for i in wanted], grad, create_graph=True)
    grads: list[Tensor | None] = [None] * 5
    for i, gradient in zip(wanted, found, strict=True):
        grads[i] = torch.zeros_like(gradient) if i == 2 and ctx.norm == "batch" else gradient
    return grads


def _operands(
    input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, norm: str, save: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the op takes of a Linear: cast to dtype, or as it is where kernels round it.

    The launch of all gradients makes the weight's: without it, the library's product is the better one.
    """
    N, K = weight.shape
    if weight.requires_grad or not save:
        if plans.rounds_operands(input.shape[0], N, K, dtype, input.device, norm, save):
            return input, weight, bias
    return input.to(dtype), weight.to(dtype), _cast(bias, dtype)


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
    """The fused block on a 2-D input, through autograd only where a gradient may be asked for.

    dtype: of the computation and the output; None is the input's.
    """
    dtype = dtype or input.dtype
    if norm is None:
        norm = _NO_NORM
        mode = "none"
    else:
        mode = "batch" if norm.training else "running"
    save = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (input, weight, bias, norm.weight, norm.bias)
    )
    if weight is not None and not _are_of(dtype, input, weight, bias):
        input, weight, bias = _operands(input, weight, bias, dtype, mode, save)
    arguments = (
        input, weight, bias, norm.weight, norm.bias, norm.running_mean, norm.running_var,
        norm.num_batches_tracked if norm.training else None, seed, dtype, mode, norm.momentum, norm.eps,
        activation, a, b, p,
    )  # fmt: skip
    if save:
        return Block.apply(*arguments)
    return torch.ops.fastnn.block_forward(*arguments, False)[0]
