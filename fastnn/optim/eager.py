"""torch's own step, for parameters that the kernels do not take, with what fastnn adds done in plain torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .algorithm import Algorithm
from .bundle import local
from .checkpoints import NARROW


def undecorated(step: Callable[..., Any]) -> Callable[..., Any]:
    """torch's step without the wrapper that calls hooks: ours has called them."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]


def check(optimizer: Algorithm, eager: list[list[Tensor]]) -> None:
    """Raises what torch's step would raise, but before the first parameter or state has changed."""
    created = []
    try:
        for group, params in zip(optimizer.param_groups, eager, strict=True):
            names = set(filter(None, optimizer.state_names(group))) if optimizer.counters else set()
            for param in params:
                if param.grad is None:
                    continue
                if group.get("capturable") and param.device.type == "cpu":
                    raise AssertionError(
                        f"capturable=True needs parameters on an accelerator, got one on {param.device}"
                    )
                if optimizer.l1 and param.grad.is_sparse:
                    raise RuntimeError("l1 option is not compatible with sparse gradients")
                known = optimizer.state.get(param) or {}
                if param.grad.is_sparse or (names and not known):
                    created += [] if known else [param]
                    optimizer.check_sparse(group, param)
                    optimizer.torch_init_state(group, param)
                elif not known.keys() >= names:
                    raise KeyError(f"the state of a parameter lacks {', '.join(sorted(names - known.keys()))}")
    except BaseException:
        for param in created:
            optimizer.state.pop(param, None)
        raise


def step(optimizer: Algorithm, eager: list[list[Tensor]], clip: Tensor | None) -> None:
    """One step of these parameters, listed by group, with gradients times clip ().

    torch steps stand-ins where something is added to its step: they share the parameter's memory and state, but have
    a gradient of their own; for low-precision options they are fp32 copies, rounded back afterwards.
    """
    groups = optimizer.param_groups
    stand_ins: dict[Tensor, tuple[Tensor, bool]] = {}
    try:
        own = [optimizer.torch_group(group, params) for group, params in zip(groups, eager, strict=True)]
        for group in own:
            for i, param in enumerate(group["params"]):
                wide = param.dtype in NARROW and optimizer.computes_wide(param.dtype)
                if param.grad is not None and (wide or clip is not None or optimizer.l1):
                    if param not in stand_ins:  # one may be listed twice
                        stand_ins[param] = _stand_in(optimizer, group, param, param.grad, clip, wide), wide
                    group["params"][i] = stand_ins[param][0]
        optimizer.param_groups = own
        undecorated(optimizer.torch_step)(optimizer)
    finally:
        optimizer.param_groups = groups
        for param, (stand_in, wide) in stand_ins.items():
            _take_back(optimizer, param, stand_in, wide)


def _stand_in(
    optimizer: Algorithm,
    group: dict[str, Any],
    param: Tensor,
    grad: Tensor,
    clip: Tensor | None,
    wide: bool,
) -> Tensor:
    stand_in = param.detach()
    if wide:
        grad, stand_in = grad.float(), stand_in.float()
    if clip is not None:
        grad = grad * (clip.to(grad.device) if local(grad) is grad else clip.item())
    if optimizer.l1:
        grad = torch.add(grad, stand_in.sign(), alpha=-optimizer.l1 if group["maximize"] else optimizer.l1)
    stand_in.grad = grad
    state = optimizer.state.get(param)
    if state:
        optimizer.state[stand_in] = {k: _widened(v, param) for k, v in state.items()} if wide else state
    return stand_in


def _widened(value: Any, param: Tensor) -> Any:
    return value.float() if isinstance(value, Tensor) and value.shape == param.shape else value


def _take_back(optimizer: Algorithm, param: Tensor, stand_in: Tensor, wide: bool) -> None:
    state = optimizer.state.pop(stand_in, None)
    if not wide:
        if state:
            optimizer.state[param] = state
        return
    local(param).copy_(optimizer.rounded(local(stand_in).detach(), param.dtype))
    dtype = optimizer.state_dtype or param.dtype
    for name, value in (state or {}).items():
        is_state = isinstance(value, Tensor) and value.shape == param.shape and name not in optimizer.counters
        optimizer.state[param][name] = value.to(dtype) if is_state else value
