"""A call of a run of layers in a model: where it is, its sizes and path, and the plans that are chosen for it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import dispatch, functional, plans
from .functional import BatchNorm
from .plans import Choice

JOINED = "the one between whose launches processes meet"
_EAGER, _CPU = dispatch.Path("eager"), torch.device("cpu")


@dataclass(frozen=True)
class Call:
    """A run of layers on what arrived at it: M rows, K to N features; K is 0 where there is no Linear.

    reason: why it is not fused whatever the plans are, else empty.
    """

    modules: str  # names in the model: "encoder.0-3"
    layers: tuple[str, ...]  # types
    reason: str = ""
    path: dispatch.Path = _EAGER
    M: int = 0
    N: int = 0
    K: int = 0
    dtype: torch.dtype = torch.float32  # of the computation
    device: torch.device = _CPU
    norm: str = "none"  # as in launch.Settings
    joined: bool = False  # whether it is over the batches of several processes
    save: bool = False  # whether a backward follows
    linear_alone: bool = False
    casts: bool = False  # whether operands are of another dtype than the computation
    casts_weight: bool = False  # whether the weight is
    input_gradient: bool = False
    weight_gradient: bool = False
    bias_gradient: bool = False  # where it is a launch of its own: of a Linear alone, or before joined statistics

    def unfused(self) -> str:
        """Why it is not fused now; a Linear alone is where functional says that it gains."""
        if self.reason or len(self.layers) > 1:
            return self.reason
        several = self.weight_gradient and (self.input_gradient or self.bias_gradient)
        if not (several or self.casts_weight):
            return "alone, and at most one gradient"
        gains = functional.gains_alone(self.M, self.N, self.K, self.dtype, self.device, True)
        return "" if gains else "alone, and the library's gradients are the plan"

    def _rounds(self) -> bool:
        """Whether our kernels read operands of another dtype as they are, and none is cast (ops.settle)."""
        if not self.casts or (self.save and not self.weight_gradient):
            return False
        norm = "none" if self.joined else self.norm  # the Linear is a call of its own
        return plans.rounds_operands(self.M, self.N, self.K, self.dtype, self.device, norm, self.save)

    def choices(self) -> dict[str, Choice]:
        """The plans that the rules choose among for it now: "forward", "sums" and "gradients" of a Linear."""
        if self.reason:
            return {}
        M, N, K, dtype, device = self.M, self.N, self.K, self.dtype, self.device
        found: dict[str, Choice] = {}
        walk = plans.statistics_choice(M, N, dtype.itemsize, device)
        if self.joined:
            found["forward"] = walk = walk._replace(plan="split", by=JOINED)
        elif K and not self.linear_alone:
            found["forward"] = plans.forward_choice(M, N, K, dtype, device, self.norm, self.save)
        elif K and self._rounds():
            found["forward"] = plans.forward_choice(M, N, K, dtype, device, "none", False)
        elif self.norm == "batch":
            found["forward"] = walk
        if self.save and not self.linear_alone:
            found["sums"] = walk
        if self.weight_gradient and (self.input_gradient or self.bias_gradient or self._rounds()):
            found["gradients"] = plans.linear_backward_choice(M, N, K, dtype, device)
        return found


def call_of(
    modules: str,
    layers: tuple[str, ...],
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: BatchNorm | None,
    activation: str,
    p: float,
) -> Call:
    """What fastnn.functional would do with these; input: (*, K), strided and of two dimensions or more."""
    dtype = functional._computation_dtype(input, weight)
    path = dispatch.path(input, dtype, *functional._features_and_tensors(input, weight, bias, norm))
    if functional._autocast_is_on(input) and activation == "softplus":
        path = path if path.eager else dispatch.Path("eager", "autocast runs Softplus in fp32")
    mode = "none" if norm is None else "batch" if norm.training else "running"
    joined = mode == "batch" and norm is not None and norm.process_group is not None
    alone = weight is not None and mode == "none" and activation == "identity" and p == 0
    linear_tensors = [] if weight is None else [t for t in (input, weight, bias) if t is not None]
    return Call(
        modules,
        layers,
        path.reason,
        path,
        M=input.numel() // max(input.shape[-1], 1),
        N=input.shape[-1] if weight is None else weight.shape[0],
        K=0 if weight is None else weight.shape[1],
        dtype=dtype,
        device=input.device,
        norm=mode,
        joined=joined,
        save=_wanted(input, weight, bias, *((norm.weight, norm.bias) if norm is not None else ())),
        linear_alone=alone,
        casts=any(tensor.dtype != dtype for tensor in linear_tensors),
        casts_weight=weight is not None and weight.dtype != dtype,
        input_gradient=_wanted(input),
        weight_gradient=_wanted(weight),
        bias_gradient=(alone or joined) and _wanted(bias),
    )


def _wanted(*tensors: Tensor | None) -> bool:
    """Whether a gradient by one of them will be."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
