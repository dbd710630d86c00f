"""The fused block as a function, with the argument names and errors of torch.nn.functional."""

import torch
from torch import Tensor

from . import dispatch, ops, plans, reference, seeds
from .activations import ACTIVATIONS
from .reference import BatchNorm

__all__ = ["BatchNorm", "linear_batch_norm_act_dropout"]


def linear_batch_norm_act_dropout(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    batch_norm: BatchNorm | None = None,
    activation: str = "identity",
    activation_args: tuple[float, float] = (0.0, 0.0),
    p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Dropout(activation(BatchNorm(input Wᵀ + bias))), each part optional, as one fused op where kernels serve.

    Equal to ``torch.nn.functional``'s linear, batch_norm, the activation and dropout one after another,
    in value, gradients and buffers (BatchNorm: Ioffe & Szegedy 2015; dropout: Srivastava et al. 2014, inverted).

    Args:
        input: (*, K), or (M, K) before BatchNorm; fp32, fp16 or bf16 run fused, other dtypes in plain torch ops.
        weight: (N, K), the input's dtype (any under autocast); None leaves Linear out, and then N = K.
        bias: (N,) or None.
        batch_norm: arguments of ``torch.nn.functional.batch_norm`` over the N features, or None.
        activation: a key of ``fastnn.activations.ACTIVATIONS``: "relu", "gelu", "silu", "identity", ...
        activation_args: its parameters (a, b): leaky_relu (slope, 0), elu (alpha, 0), softplus (beta, threshold).
        p: probability of dropping an element, in [0, 1]. Fused dropout draws in 16 bits: the rate is p rounded
            to a multiple of 2^-16, and kept elements are scaled by exactly that rate.
        training: whether dropout drops; BatchNorm has its own ``batch_norm.training``.

    Returns:
        (*, N), in the dtype torch's own ops would give.

    Raises:
        RuntimeError: shapes or dtypes that do not fit.
        ValueError: p outside [0, 1]; one row where batch statistics are taken; more than 2-D before
            BatchNorm; an unknown activation.
    """
    _check(input, weight, bias, batch_norm, activation, p)
    p = float(p) if training else 0.0
    dtype = _computation_dtype(input, weight)
    path = dispatch.path(input, dtype, *_features_and_tensors(input, weight, bias, batch_norm))
    if path.eager or (activation == "softplus" and _autocast_is_on(input)):  # autocast runs it in fp32 on CUDA
        return reference.block(input, weight, bias, batch_norm, activation, *activation_args, p)
    rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    seed = seeds.dropout_seed(input.device) if p > 0 else None
    out = ops.block(rows, weight, bias, batch_norm, seed, activation, *activation_args, p, dtype)
    return out if input.dim() == 2 else out.reshape(*input.shape[:-1], out.shape[-1])


def is_linear_served(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a small Linear alone takes fewer launches here: for its gradients together, or for autocast's casts."""
    if torch.compiler.is_compiling() or weight.shape[1] != input.shape[-1]:
        return False
    M, (N, K), dtype = input.numel() // max(input.shape[-1], 1), weight.shape, _computation_dtype(input, weight)
    others = input.requires_grad or (bias is not None and bias.requires_grad)
    several = torch.is_grad_enabled() and weight.requires_grad and others
    if not (several or weight.dtype != dtype) or plans.linear_backward_plan(M, N, K, dtype, input.device) != "grouped":
        return False
    return not dispatch.path(input, dtype, *_features_and_tensors(input, weight, bias, None)).eager


def _computation_dtype(input: Tensor, weight: Tensor | None) -> torch.dtype:
    """The input's dtype, or autocast's where there is a Linear for autocast to cast."""
    if weight is None or not _autocast_is_on(input):
        return input.dtype
    if input.dtype == torch.float64 or weight.dtype == torch.float64:
        return torch.float64  # autocast leaves it alone, and no kernel serves it
    return torch.get_autocast_dtype(input.device.type)


def _autocast_is_on(input: Tensor) -> bool:
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(input.device.type)


def _features_and_tensors(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, norm: BatchNorm | None
) -> tuple[int, tuple[Tensor | None, ...]]:
    features = input.shape[-1] if weight is None else max(weight.shape) * (0 not in weight.shape)
    if norm is None:
        return features, (weight, bias)
    return features, (weight, bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)


def _check(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, norm: BatchNorm | None, activation: str, p: float
) -> None:
    """Raises torch's exception types before anything is computed or changed."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability p must be between 0 and 1, got {p}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    computes = weight is not None or norm is not None
    if computes and not (input.is_floating_point() or input.is_complex()):
        raise RuntimeError(f"input must have a floating-point dtype, got {input.dtype}")
    if input.dim() == 0:
        raise RuntimeError("input must have at least one dimension, got a scalar")
    features = input.shape[-1]
    if weight is not None:
        features = _check_linear(input, weight, bias)
    if norm is not None:
        _check_batch_norm(input, _computation_dtype(input, weight), features, norm)


def _check_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """The number of output features."""
    if weight.dim() != 2:
        raise RuntimeError(f"weight must be 2-D (N, K), got {tuple(weight.shape)}")
    N, K = weight.shape
    if input.shape[-1] != K:
        raise RuntimeError(f"input must be (*, K) = (*, {K}), got {tuple(input.shape)}")
    if bias is not None and bias.shape != (N,):
        raise RuntimeError(f"bias must be (N,) = ({N},), got {tuple(bias.shape)}")
    if not _autocast_is_on(input):
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype != input.dtype:
                raise RuntimeError(f"{name} must have the input's dtype {input.dtype}, got {tensor.dtype}")
    return N


def _check_batch_norm(input: Tensor, dtype: torch.dtype, features: int, norm: BatchNorm) -> None:
    if input.dim() != 2:
        raise ValueError(f"input must be 2-D (M, K) before BatchNorm, got {input.dim()}-D {tuple(input.shape)}")
    if norm.training and input.shape[0] == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size (1, {features}): "
            "batch statistics need two rows or more; call eval() for a single one"
        )
    if not norm.training and (norm.running_mean is None or norm.running_var is None):
        raise RuntimeError("running_mean and running_var must be given where training is False, got None")
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError("running_mean and running_var must be given both or neither, got one")
    if norm.training and norm.eps <= 0:
        raise ValueError(f"batch_norm.eps must be positive when training, got {norm.eps}")
    names = ("running_mean", "running_var", "weight", "bias")
    for name in names:
        tensor = getattr(norm, name)
        if tensor is not None and tensor.shape != (features,):
            raise RuntimeError(f"batch_norm.{name} must be (N,) = ({features},), got {tuple(tensor.shape)}")
    if any(t is not None and t.requires_grad for t in (norm.running_mean, norm.running_var)):
        raise RuntimeError("batch_norm.running_mean and running_var must not require a gradient, got one that does")
    dtypes = {getattr(norm, name).dtype for name in names if getattr(norm, name) is not None}
    if len(dtypes) > 1 or not dtypes <= {dtype, torch.float32}:
        raise RuntimeError(f"batch_norm's tensors must all be of dtype {dtype} or all torch.float32, got {dtypes}")
