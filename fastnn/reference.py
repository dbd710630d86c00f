"""Every fused op in plain torch ops: the path of tensors Triton does not serve, and the double backward's."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm

from .activations import ACTIVATIONS

_PHILOX_ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


class BatchNorm(NamedTuple):
    """BatchNorm's arguments, named as torch.nn.functional.batch_norm names them; all tensors (N,) but the counter.

    With `training`, statistics are the batch's, `running_mean` and `running_var` (both or neither) move by
    `momentum`, or by 1/num_batches_tracked where momentum is None, and `num_batches_tracked` (() int64)
    counts the batch. Without, they are the running statistics, which must be there. With `training` and a
    `process_group` (torch.distributed), the batch is that of all its processes together, as of torch.nn.SyncBatchNorm.
    """

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    training: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    process_group: Any = None


def batch_norm(y: Tensor, norm: BatchNorm) -> Tensor:
    """What torch.nn.BatchNorm1d.forward computes, or that of torch.nn.SyncBatchNorm.

    It counts the batch first, as torch does: a checkpoint's recomputation stops at the last tensor that it needs.
    """
    counter = norm.num_batches_tracked if norm.training else None
    momentum = norm.momentum
    if counter is not None:
        counter.add_(1)
    if momentum is None:
        momentum = 0.0 if counter is None else 1.0 / float(counter)
    if norm.training and norm.process_group is not None:
        if y.device.type == "cpu":  # torch's module asks, its function does not
            raise ValueError("SyncBatchNorm expected input tensor to be on a GPU, got one on the CPU")
        processes = dist.get_world_size(norm.process_group)
        buffers = norm.running_mean, norm.running_var
        return SyncBatchNorm.apply(
            y, norm.weight, norm.bias, *buffers, norm.eps, momentum, norm.process_group, processes
        )
    return F.batch_norm(
        y, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, momentum, norm.eps
    )


def _philox_words(key: Tensor, rows: Tensor, calls: Tensor) -> list[Tensor]:
    """Four (M, calls) words of Philox4x32-7 at counters (call, row, 0, 0); int64 arithmetic on 32-bit words."""
    keys = [key & _WORD, (key >> 32) & _WORD]
    shape = (rows.numel(), calls.numel())
    zero = torch.zeros(shape, dtype=torch.int64, device=key.device)
    c0, c1, c2, c3 = calls[None, :].expand(shape), rows[:, None].expand(shape), zero, zero
    for _ in range(_PHILOX_ROUNDS):
        low0, high0 = _multiply(c0, _MULTIPLIERS[0])
        low1, high1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ keys[0], low1, high0 ^ c3 ^ keys[1], low0
        keys = [(k + step) & _WORD for k, step in zip(keys, _KEY_STEPS, strict=True)]
    return [c0, c1, c2, c3]


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of a product, in 16-bit halves of the word so that nothing passes 2^63."""
    low, high = (word & 0xFFFF) * factor, (word >> 16) * factor
    carry = (low >> 16) + high
    return ((carry & 0xFFFF) << 16) | (low & 0xFFFF), carry >> 16


def dropout_multiplier(key: Tensor, M: int, N: int, p: float) -> Tensor:
    """The (M, N) fp32 multiplier that kernels/dropout.py draws for this key: 0 where dropped, else the scale."""
    device = key.device
    calls = torch.arange((N + 7) // 8, device=device)
    w = _philox_words(key, torch.arange(M, device=device), calls)
    halves = [half for i in (0, 1) for k in (0, 1) for half in (w[2 * k + i] & 0xFFFF, w[2 * k + i] >> 16)]
    draws = torch.stack(halves, -1).reshape(M, -1)[:, :N]
    threshold = (1 << 16) if p == 1 else min(round(p * (1 << 16)), (1 << 16) - 1)
    scale = 0.0 if p == 1 else (1 << 16) / ((1 << 16) - threshold)
    return torch.where(draws < threshold, 0.0, scale)


def block(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: BatchNorm | None,
    activation: str,
    a: float,
    b: float,
    p: float,
    seed: Tensor | None = None,
) -> Tensor:
    """Linear, BatchNorm, activation and dropout, each where given; torch's own dropout unless a seed is."""
    y = input if weight is None else F.linear(input, weight, bias)
    if norm is not None:
        y = batch_norm(y, norm)
    y = ACTIVATIONS[activation].function(y, a, b)
    if p == 0:
        return y
    if seed is None:
        return F.dropout(y, p, True)
    return y * dropout_multiplier(seed, y.shape[0], y.shape[1], p).to(device=y.device, dtype=y.dtype)
