"""What the plan and torch's own step ask of an optimizer: its states, hyperparameters and options."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .checkpoints import NARROW, KeepsCheckpoints, counts_on_device

COLUMNS, OWN = 9, 5  # of a row of hyperparameters, as in kernels.update_rules, which is not there without Triton


def is_addressable(value: Any, device: torch.device) -> bool:
    """Whether a hyperparameter is a tensor that the kernel reads itself."""
    return isinstance(value, Tensor) and value.device == device and value.dtype == torch.float32


class Algorithm(KeepsCheckpoints):
    """One of torch's algorithms, as the kernels know it; subclasses name their rule, states and hyperparameters."""

    rule: ClassVar[str]  # the name in kernels.update_rules
    l1: float
    stochastic_rounding: bool
    seed: int | None  # of stochastic rounding
    _hidden_counts: dict[Tensor, Tensor]

    @property
    def torch_step(self) -> Callable[..., Any]:
        return super().step.__func__  # type: ignore[attr-defined]

    def state_names(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        """Names in ``state`` in the order of the rule's states, None for one that this group does without."""
        raise NotImplementedError

    def own_hyperparameters(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """The rule's own, in the order of its row."""
        raise NotImplementedError

    def hidden_count(self, group: dict[str, Any], param: Tensor) -> Tensor | None:
        """A count () on the device for a rule that needs one which torch's state does not have."""
        return None

    def forget_others(self, params: list[Tensor]) -> None:
        """Drops what is kept of parameters that are no longer there."""
        self._hidden_counts = {param: self._hidden_counts[param] for param in params if param in self._hidden_counts}

    def check_sparse(self, group: dict[str, Any], param: Tensor) -> None:
        """Raises what torch raises only in the midst of a step, for a gradient that may be sparse."""

    def torch_group(self, group: dict[str, Any], params: list[Tensor]) -> dict[str, Any]:
        """The group as torch's own step is given it, for these of its parameters."""
        return {**group, "params": list(params)}

    @staticmethod
    def momentum(rows: Tensor, steps: Tensor) -> Tensor:
        """What a step multiplies a second counter by; rows (COLUMNS, tensors), steps (tensors,)."""
        raise NotImplementedError

    def hyperparameters(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return group["lr"], group["weight_decay"], *self.own_hyperparameters(group)

    def structure(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What of a group decides the plan, beside its parameters."""
        tensors = [(v.device, v.dtype) if isinstance(v, Tensor) else None for v in self.hyperparameters(group)]
        return self.state_names(group), group["differentiable"], counts_on_device(group), tensors

    def row(self, group: dict[str, Any], device: torch.device | None) -> tuple[list[float], list[int]]:
        """(numbers, addresses) of a group for kernels/update_rules.py; a tensor on the device goes by its address.

        Without a device no tensor is read, and only numbers are checked. Raises TypeError for what is none.
        """
        lr, weight_decay, *own = self.hyperparameters(group)
        values = [lr, weight_decay, self.l1, -1.0 if group["maximize"] else 1.0]
        values += [group.get("decoupled_weight_decay", False), *own]
        values += [0.0] * (COLUMNS - len(values))
        numbers, addresses = [], []
        for value in values:
            if isinstance(value, str):  # of which float() would read a number
                raise TypeError(f"hyperparameters must be numbers, got {value!r}")
            by_address = device is not None and is_addressable(value, device)
            unread = by_address or (device is None and isinstance(value, Tensor))
            numbers.append(0.0 if unread else float(value))
            addresses.append(value.data_ptr() if by_address else 0)
        return numbers, addresses

    def torch_init_state(self, group: dict[str, Any], param: Tensor) -> None:
        """torch's own creation of a parameter's state, if it has none."""
        lists: list[list] = [[] for _ in range(len(inspect.signature(self._init_group).parameters) - 1)]  # type: ignore[attr-defined]
        self._init_group({**group, "params": [param]}, *lists)  # type: ignore[attr-defined]

    def init_state(self, group: dict[str, Any], param: Tensor) -> None:
        """The state of a parameter that the kernels step; not called before its first gradient."""
        if not self.state.get(param):
            self.torch_init_state(group, param)
        self._widen_state(param)

    def next_seed(self) -> int | None:
        """A seed for the next bundle, whose counts may start anew; None without stochastic rounding."""
        if self.seed is not None:
            self.seed += 1
        return self.seed

    def computes_wide(self, dtype: torch.dtype) -> bool:
        """Whether these options have torch's own step compute in fp32 for narrower parameters."""
        return self.state_dtype is not None or (self.stochastic_rounding and dtype == torch.bfloat16)

    def _widen_state(self, param: Tensor) -> None:
        if self.state_dtype is not None and param.dtype in NARROW:
            state = self.state.get(param, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and name not in self.counters:
                    state[name] = value.to(self.state_dtype)

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x (fp32) as the parameter's dtype."""
        if not self.stochastic_rounding or dtype != torch.bfloat16:
            return x.to(dtype)
        bits = x.view(torch.int32)
        raised = torch.where(x.isfinite(), bits + torch.randint_like(bits, 1 << 16), bits)
        return (raised & ~0xFFFF).view(torch.float32).to(dtype)
