"""A block whose BatchNorm takes the statistics of several processes' batches together: torch.nn.SyncBatchNorm fused.

One all-gather in the forward, of (4, N) fp32 a process, and one all-reduce of (2, N) in the backward, whatever the
batch of a process: it may be empty, or take other tiles than the others'.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import dispatch, memory, ops, recipes, reference, seeds
from .dispatch import tiles
from .specs import BlockSpec

if dispatch.HAS_KERNELS:
    from .kernels import synchronised as kernels


class _Call(NamedTuple):
    spec: BlockSpec
    group: Any


@functools.lru_cache(4096)
def _launches(spec: BlockSpec, processes: int) -> Any:
    """With the number of chunks of rows; always by the split plan, between whose launches is room for a collective."""
    shape = tiles.split_tiles(max(spec.M, 1), spec.N, spec.dtype.itemsize, spec.multiprocessors)
    return kernels.launches(spec.values, shape, processes), shape.chunks


def serves(z: Tensor, norm: reference.BatchNorm) -> bool:
    """Whether the kernels run; the same on every process, so nothing that the number of rows decides."""
    others = norm.weight, norm.bias, norm.running_mean, norm.running_var
    counter = norm.num_batches_tracked
    if dispatch.is_traced() or (counter is not None and counter.device != z.device):
        return False
    if not all(tensor is None or memory.is_plain(tensor) for tensor in others):
        return False
    return not dispatch.path_of_any_batch(z, z.dtype, z.shape[1], others).eager


def block(z: Tensor, norm: reference.BatchNorm, activation: str, a: float, b: float, p: float) -> Tensor:
    """Dropout(activation(BatchNorm(z))) over the rows of all processes of norm.process_group, where kernels serve.

    z: (M, N), M of this process, 0 or more. Gradients by gamma and beta are of its own rows, as torch's are.
    """
    batches = norm.num_batches_tracked
    tensors = z, None, None, norm.weight, norm.bias, norm.running_mean, norm.running_var, batches
    seed = seeds.dropout_seed(z.device) if p > 0 and len(z) else None
    settings = ops.settings_of(norm, activation, a, b, p)
    call = _Call(BlockSpec.of(tensors, z.dtype, settings, seed), norm.process_group)
    out = _SynchronisedBlock.apply(z, norm.weight, norm.bias, tensors[5:], seed, call)
    ops.count_changes(tensors)
    return out


class _SynchronisedBlock(torch.autograd.Function):
    """Saves z, gamma, beta, the seed, and of its columns (5, N) fp32: mean, variance and rows of all; mean, rstd."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gamma: Any, beta: Any, buffers: Any, seed: Any, call: _Call) -> Tensor:  # type: ignore[override]
        M, N = z.shape
        mean, var, batches = buffers
        spec, group = call
        processes = dist.get_world_size(group)
        on_device, value = recipes.seed_arguments(seed)
        with memory.on(z.device):
            steps, chunks = _launches(spec, processes)
            z = _dense(z)
            out, saved = torch.empty_like(z), z.new_empty((5, N), dtype=torch.float32)
            rows = z.new_empty((processes * 4, N), dtype=torch.float32)
            row = z.new_zeros((4, N), dtype=torch.float32)
            if M:
                partials = z.new_empty((chunks, 3, N), dtype=torch.float32)
                steps.statistics.run(partials=partials, z=z)
                steps.pack.run(partials=partials, row=row)
            _all_gather(rows, row, group)
            for step in steps.join:
                step.run(rows=rows, joined=saved[:3], running_mean=mean, running_var=var, batches=batches)
            if M:
                joint = {"running_mean": saved[0], "running_var": saved[1], "stats": saved[3:]}
                steps.apply.run(value, z=z, out=out, gamma=gamma, beta=beta, seed_ptr=on_device, **joint)
        ctx.save_for_backward(z, gamma, beta, saved, seed)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        with torch.no_grad():
            found = _SynchronisedBlock._gradients(ctx, grad)
        return *(_differentiable_once(found) if torch.is_grad_enabled() else found), None, None, None

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, gamma, beta, saved, seed = ctx.saved_tensors
        spec, group = ctx.call
        M, N = z.shape
        on_device, value = recipes.seed_arguments(seed)
        empty = torch.empty_like if M else torch.zeros_like
        dgamma, dbeta = (None if t is None else empty(t) for t in (gamma, beta))
        with memory.on(z.device):
            steps, chunks = _launches(spec, dist.get_world_size(group))
            grad, z, saved = _dense(grad), _dense(z), _dense(saved)
            sums, dz = saved.new_zeros((2, N)), None
            read = {"g": grad, "z": z, "gamma": gamma, "beta": beta, "seed_ptr": on_device, "stats": saved[3:]}
            if M:
                partials = saved.new_empty((chunks, 2, N))
                steps.sums.run(value, partials=partials, **read)
                steps.add_up.run(partials=partials, sums=sums, dgamma=dgamma, dbeta=dbeta)
            if ctx.needs_input_grad[0]:
                dist.all_reduce(sums, group=group)
                dz = torch.empty_like(z)
                if M:
                    steps.dz.run(value, partials=sums, total=saved[2], dz=dz, **read)
        return dz, dgamma, dbeta


def _differentiable_once(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """What raises when it is differentiated again. torch's once_differentiable lets a constant gradient pass, though
    what is computed from it depends on z."""
    raising = torch._C._functions.DelayedError(b"SyncBatchNorm has no second derivative", len(gradients))
    wanted: Any = [None if tensor is None else tensor.requires_grad_() for tensor in gradients]
    return raising(*wanted)


def _dense(tensor: Tensor) -> Tensor:
    """What kernels read: contiguous, and no negative or zero tensor."""
    return tensor.contiguous() if memory.is_plain(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def _all_gather(rows: Tensor, row: Tensor, group: Any) -> None:
    """torch 2.13 deprecates the name that older releases have."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(rows, row, group=group)
