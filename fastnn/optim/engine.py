"""What every optimizer here is made of: torch.optim's own class, whose step is done by one launch where it can be."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..memory import is_capturing
from . import eager
from .algorithm import Algorithm
from .bundle import is_distributed
from .checkpoints import KeepsCheckpoints, counts_on_device
from .plan import Plan

EXTRAS = ("max_grad_norm", "l1", "state_dtype", "stochastic_rounding")


class MultiTensorOptimizer(Algorithm):
    """Mixed in before a class of torch.optim, takes over its step and nothing else.

    Constructor, defaults, groups, state and checkpoints stay torch's. These keyword-only arguments are added; they are
    attributes of the optimizer, not of its groups, and no part of its ``state_dict``:

    Args:
        max_grad_norm (float, optional): gradients are clipped within the step to this global 2-norm, as
            ``torch.nn.utils.clip_grad_norm_`` does before it; ``.grad`` itself stays as it is. The norm of the last
            step is :attr:`grad_norm`.
        l1 (float): adds ``l1 * sign(param)`` to each gradient, the subgradient of an L1 penalty, where ``weight_decay``
            adds its own. Default: 0.
        state_dtype (torch.dtype, optional): ``torch.float32`` keeps the state of bfloat16 and float16 parameters in
            float32, through ``load_state_dict`` as well. Default: the parameter's dtype, as in torch.
        stochastic_rounding (bool): rounds bfloat16 parameters up or down at random so that the result is right on
            average, instead of to nearest, where small updates vanish. The draws are a function of
            ``torch.manual_seed`` when the optimizer is made. Default: ``False``.

    Raises:
        TypeError: ``max_grad_norm`` or ``l1`` not a number.
        ValueError: ``max_grad_norm`` or ``l1`` negative, ``state_dtype`` another than ``torch.float32``.
        RuntimeError: one of these together with ``differentiable=True``.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(MultiTensorOptimizer)]
        constructor = next((vars(base)["__init__"] for base in before if "__init__" in vars(base)), None)
        if constructor is not None:  # a user's
            signature = inspect.signature(constructor)
            parameters = [*signature.parameters.values()][1:]
        else:
            signature = inspect.signature(cls.__mro__[cls.__mro__.index(KeepsCheckpoints) + 1])  # torch's
            own = inspect.signature(MultiTensorOptimizer.__init__).parameters
            parameters = [*signature.parameters.values(), *(own[name] for name in EXTRAS)]
        cls.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]

    def __init__(
        self,
        *args: Any,
        max_grad_norm: float | None = None,
        l1: float = 0.0,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        **kwargs: Any,
    ) -> None:
        for name, value in (("max_grad_norm", 0.0 if max_grad_norm is None else max_grad_norm), ("l1", l1)):
            if not isinstance(value, (int, float, Tensor)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if state_dtype not in (None, torch.float32):
            raise ValueError(f"state_dtype must be None or torch.float32, got {state_dtype}")
        self.max_grad_norm, self.l1 = None if max_grad_norm is None else float(max_grad_norm), float(l1)
        self.state_dtype, self.stochastic_rounding = state_dtype, stochastic_rounding
        self.seed = int(torch.randint(2**62, (), device="cpu")) if stochastic_rounding else None
        self.grad_norm: Tensor | None = None
        self._forget()
        super().__init__(*args, **kwargs)
        if self.defaults.get("fused"):
            self._step_supports_amp_scaling = True  # also of Adagrad, whose fused step torch 2.11 has for CPUs alone
        if self._adds_to_torch() and any(group["differentiable"] for group in self.param_groups):
            raise RuntimeError(f"{', '.join(EXTRAS)} do not support `differentiable`")

    def _adds_to_torch(self) -> bool:
        return bool(self.max_grad_norm is not None or self.l1 or self.state_dtype or self.stochastic_rounding)

    def _forget(self) -> None:
        """Whatever is known of parameters and state beyond themselves."""
        self._plan: Plan | None = None
        self._captured: list[Plan] = getattr(self, "_captured", [])  # what graphs replay lives as long as we do
        self._hidden_counts: dict[Tensor, Tensor] = {}
        self._may_have_skipped = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs a single optimization step, as torch's does; ``closure`` reevaluates the model and returns the loss.

        Raises:
            RuntimeError: what torch's step raises, sparse gradients and the like; no parameter, no state has changed.
        """
        if type(self).step is MultiTensorOptimizer.step and self._is_observed():
            return self._observed_step() if closure is None else self._observed_step(closure)
        return self._step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # not to be wrapped: torch's wrapper takes 5 µs even when idle

    def _step_in_graph(self, closure: Callable[[], Any] | None) -> Any:
        """Under torch.compile: torch's own step, which Inductor compiles, unless something is added to it."""
        if self._adds_to_torch():
            return torch.compiler.disable(self._step)(closure)
        return eager.undecorated(self.torch_step)(self, closure)

    def _is_observed(self) -> bool:
        return bool(
            torch.compiler.is_compiling()  # where a hook added later must be seen
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()
        )

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        if torch.compiler.is_compiling():
            return self._step_in_graph(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self._plan
        if plan is None or is_capturing() or not (plan.holds(self) and plan.gather()):
            plan = self._new_plan()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self._may_have_skipped = self._may_have_skipped or found_inf is not None
        partials = norm = None
        if plan.needs_torch(self.max_grad_norm, found_inf):
            with torch.no_grad():
                if not self._step_by_torch(plan, grad_scale, found_inf):
                    return loss
            grad_scale = found_inf = None
            if self.max_grad_norm is not None and self.grad_norm is not None:
                partials = self.grad_norm.float().square().reshape(1)
        elif self.max_grad_norm is not None:
            partials = plan.add_up(grad_scale)
            norm = self.grad_norm = torch.empty((), dtype=torch.float32, device=partials.device)
        plan.launch(self.momentum, float(self.max_grad_norm or 0), partials, norm, grad_scale, found_inf)
        return loss

    _observed_step = torch.optim.Optimizer.profile_hook_step(_step)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _new_plan(self) -> Plan:
        if not is_capturing():
            self._plan = plan = Plan(self)
        else:
            if self.counters and not all(map(counts_on_device, self.param_groups)):
                raise RuntimeError(
                    f"Attempting CUDA graph capture of step() for an instance of {type(self).__name__} whose groups "
                    "count their steps on the host: pass capturable=True (Adagrad: fused=True)"
                )
            plan = Plan(self)
            self._captured.append(plan)  # its tables are what the graph will read
            self._plan = None  # the next warm-up sets pinned memory aside anew: this capture has taken what there was
        plan.gather()
        return plan

    def _step_by_torch(self, plan: Plan, grad_scale: Tensor | None, found_inf: Tensor | None) -> bool:
        """What of the step is not the kernels': overflow, unscaling and norm where they cannot, the eager parameters.

        False if an overflow skips the step. torch asserts that it is not asked to unscale, so here that is done first.
        """
        eager.check(self, plan.eager)
        if found_inf is not None and found_inf.item() > 0:
            return False
        grads = [param.grad for param in plan.params if param.grad is not None]
        if grad_scale is not None:
            for grad in grads:
                grad.mul_(grad_scale.double().reciprocal().to(grad.device, torch.float32))
        clip = None
        if self.max_grad_norm is not None:
            norm = torch.nn.utils.get_total_norm(grads)  # 0 of no gradient at all
            self.grad_norm = norm.full_tensor() if is_distributed(norm) else norm  # type: ignore[attr-defined]
            clip = (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        if plan.eager_params:
            scaling: dict[str, Any] = {
                name: vars(self).pop(name) for name in ("grad_scale", "found_inf") if name in vars(self)
            }
            try:
                eager.step(self, plan.eager, clip)
            finally:
                vars(self).update(scaling)
        return True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._plan = None
        super().add_param_group(param_group)
