"""The fused block as a function, with the argument names and errors of torch.nn.functional."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch, ops, plans, reference, seeds, synchronised
from .activations import ACTIVATIONS
from .memory import TensorGuards
from .reference import BatchNorm

_NO_NORM = BatchNorm(training=False)
KEPT, FORMS = 4096, 8  # calls that are kept settled, and forms of tensors for each
_settled: dict[tuple, list[tuple[Any, ops.Call | None]]] = {}
_UNSETTLED: Any = object()

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
        batch_norm: arguments of ``torch.nn.functional.batch_norm`` over the N features, or None. With a process_group,
            every process of it makes the same call, with any number of rows.
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
    p, (a, b) = float(p) if training else 0.0, map(float, activation_args)  # settled as numbers: tensors may change
    norm = _NO_NORM if batch_norm is None else batch_norm
    if type(norm.eps) is not float or not (norm.momentum is None or type(norm.momentum) is float):
        momentum = None if norm.momentum is None else float(norm.momentum)
        norm = batch_norm = norm._replace(momentum=momentum, eps=float(norm.eps))
    if norm.training and norm.process_group is not None:
        return _run_joined(input, weight, bias, norm, activation, a, b, p)
    tensors = ops.tensors_of(input, weight, bias, norm)
    if torch.compiler.is_compiling():
        norm_training = None if batch_norm is None else norm.training
        return block(*tensors, norm_training, norm.momentum, norm.eps, activation, a, b, p)
    return _run(tensors, batch_norm, norm, activation, a, b, p)


def _run_joined(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, norm: BatchNorm, activation: str, a: float, b: float,
    p: float,
) -> Tensor:  # fmt: skip
    """The Linear by itself, as its bias has a gradient on each process, then the rest over all processes' rows."""
    if not torch.compiler.is_compiling():
        _check(input, weight, bias, norm, activation, p)
    z = input if weight is None else linear_batch_norm_act_dropout(input, weight, bias)
    if synchronised.serves(z, norm) and not (activation == "softplus" and _autocast_is_on(z)):
        return synchronised.block(z, norm, activation, a, b, p)
    return reference.block(z, None, None, norm, activation, a, b, p)


@torch.compiler.allow_in_graph
def block(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    norm_training: bool | None,
    momentum: float | None,
    eps: float,
    activation: str,
    a: float,
    b: float,
    p: float,
) -> Tensor:
    """``linear_batch_norm_act_dropout`` as one node of the graph that Dynamo makes; AOTAutograd traces into it.

    norm_training: BatchNorm's ``training``, None where there is no BatchNorm.
    """
    norm, batch_norm = _NO_NORM, None
    if norm_training is not None:
        buffers = running_mean, running_var, gamma, beta, num_batches_tracked
        norm = batch_norm = BatchNorm(*buffers, norm_training, momentum, eps)
    return _run(ops.tensors_of(input, weight, bias, norm), batch_norm, norm, activation, a, b, p)


def _run(
    tensors: Any, given: BatchNorm | None, norm: BatchNorm, activation: str, a: float, b: float, p: float
) -> Tensor:
    input, weight, bias = tensors[:3]
    call = _call_of(tensors, given, norm, activation, a, b, p)
    if call is None:
        return reference.block(input, weight, bias, given, activation, a, b, p)
    seed = seeds.dropout_seed(input.device) if p > 0 else None
    if input.dim() == 2:
        return ops.run(call, tensors, seed)
    out = ops.run(call, (input.reshape(-1, input.shape[-1]), *tensors[1:]), seed)
    return out.reshape(*input.shape[:-1], out.shape[-1])


def _call_of(
    tensors: Any, given: BatchNorm | None, norm: BatchNorm, activation: str, a: float, b: float, p: float
) -> ops.Call | None:
    """What is settled of the call, now or for tensors of that form before; None is torch's own ops."""
    input, weight, bias = tensors[:3]
    there = [tensor for tensor in tensors if tensor is not None]
    key = None
    if type(input) is Tensor and not ops.is_observed():
        # What decides beside the form of the tensors, to which modes and transforms around the call belong.
        key = (
            len(there), input.shape, None if weight is None else weight.shape, bias is None, norm.weight is None,
            norm.bias is None, norm.running_mean is None, norm.num_batches_tracked is None, given is None,
            norm.training, norm.momentum, norm.eps, activation, a, b, p, plans.state(input.device),
            torch.is_grad_enabled(), forward_ad._current_level,
        )  # fmt: skip
    call = _find(key, there)
    if call is _UNSETTLED:
        _check(input, weight, bias, given, activation, p)
        call = _settle(tensors, given, activation, (a, b), p)
        _keep(key, there, call)
    return call


def _settle(
    tensors: ops.Tensors, norm: BatchNorm | None, activation: str, arguments: tuple[float, float], p: float
) -> ops.Call | None:
    """What a call of these takes; None is torch's own ops."""
    input, weight, bias = tensors[:3]
    assert input is not None
    dtype = _computation_dtype(input, weight)
    if dispatch.path(input, dtype, *_features_and_tensors(input, weight, bias, norm)).eager:
        return None
    if activation == "softplus" and _autocast_is_on(input):
        return None  # autocast runs it in fp32 on CUDA
    if _is_refused(tensors):
        return None
    counter = tensors[7]
    if counter is not None and counter.device != input.device:
        return None  # as a checkpoint without it leaves it, loaded into a model on "meta"
    settings = ops.settings_of(norm, activation, *arguments, p)
    if settings.is_linear_alone and not _linear_gains(input, weight, bias, dtype):
        return None
    rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    return ops.settle((rows, *tensors[1:]), dtype, settings)


def _is_refused(tensors: ops.Tensors) -> bool:
    """Whether autograd may refuse a tensor made in inference mode: torch's own ops ask before anything is written."""
    if torch.is_inference_mode_enabled():
        return False
    kept = tensors if torch.is_grad_enabled() else tensors[5:]
    return any(tensor is not None and tensor.is_inference() for tensor in kept)


def _linear_gains(input: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether a Linear alone, or what is no Linear, is ours."""
    if weight is None or dispatch.is_traced():
        return weight is None
    others = input.requires_grad or (bias is not None and bias.requires_grad)
    several = torch.is_grad_enabled() and weight.requires_grad and others
    M, (N, K) = input.numel() // input.shape[-1], weight.shape
    return gains_alone(M, N, K, dtype, input.device, several or weight.dtype != dtype)


def gains_alone(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, takes_several: bool) -> bool:
    """Whether a small Linear alone takes fewer launches here: for its gradients together, or for autocast's casts."""
    return takes_several and plans.linear_backward_plan(M, N, K, dtype, device) == "grouped"


def _find(key: tuple | None, there: list[Tensor]) -> Any:
    if key is None:
        return _UNSETTLED
    for guards, call in _settled.get(key, ()):
        if guards.check(*there):
            return call
    return _UNSETTLED


def _keep(key: tuple | None, there: list[Tensor], call: ops.Call | None) -> None:
    """For the next call of tensors of that form."""
    if key is None or TensorGuards is None or torch._C._functorch.peek_interpreter_stack() is not None:
        return
    if any(tensor.layout is not torch.strided for tensor in there):
        return  # the guards end the process at a compressed sparse tensor
    if len(_settled) >= KEPT:
        _settled.clear()
    found = _settled.setdefault(key, [])
    if len(found) >= FORMS:
        found.clear()
    found.append((TensorGuards(*there, dynamic_dims_sizes=None, dynamic_dims_strides=None), call))


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
    if norm.training and input.shape[0] == 1 and norm.process_group is None:
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
    trained = any(t is not None and t.requires_grad for t in (norm.running_mean, norm.running_var))
    if trained and torch.is_grad_enabled():
        raise RuntimeError("batch_norm.running_mean and running_var must not require a gradient, got one that does")
    dtypes = {getattr(norm, name).dtype for name in names if getattr(norm, name) is not None}
    if len(dtypes) > 1 or not dtypes <= {dtype, torch.float32}:
        raise RuntimeError(f"batch_norm's tensors must all be of dtype {dtype} or all torch.float32, got {dtypes}")
