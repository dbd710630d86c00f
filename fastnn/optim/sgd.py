"""SGD with momentum, dampening and Nesterov momentum in one launch."""

from typing import Any

import torch
from torch import Tensor

from .engine import MultiTensorOptimizer


class SGD(MultiTensorOptimizer, torch.optim.SGD):
    """:class:`torch.optim.SGD` in one launch per step; its further arguments are :class:`MultiTensorOptimizer`'s.

    12 bytes per fp32 parameter are read and written, 20 with momentum.
    """

    rule = "sgd"
    counters = ()

    def state_names(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("momentum_buffer" if group["momentum"] != 0 else None,)

    def own_hyperparameters(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return group["momentum"], group["dampening"], group["nesterov"]

    def init_state(self, group: dict[str, Any], param: Tensor) -> None:
        """A buffer of zeros where torch takes over the first gradient; by the count the kernel knows the first step."""
        if group["momentum"] != 0 and self.state[param].get("momentum_buffer") is None:
            self.state[param]["momentum_buffer"] = torch.zeros_like(param)
            self._hidden_counts[param] = torch.zeros((), dtype=torch.float32, device=param.device)
        self._widen_state(param)

    def hidden_count(self, group: dict[str, Any], param: Tensor) -> Tensor | None:
        if group["momentum"] == 0 and not self.stochastic_rounding:
            return None
        if param not in self._hidden_counts:  # a buffer that came with a checkpoint: its first step is made
            self._hidden_counts[param] = torch.ones((), dtype=torch.float32, device=param.device)
        return self._hidden_counts[param]

    def torch_group(self, group: dict[str, Any], params: list[Tensor]) -> dict[str, Any]:
        """Not fused where only some have a buffer yet: torch's fused step raises TypeError then."""
        begun = {self.state.get(p, {}).get("momentum_buffer") is not None for p in params if p.grad is not None}
        mixed = group["momentum"] != 0 and len(begun) == 2
        return super().torch_group(group, params) | ({"fused": False} if mixed else {})

    def _forget_unbegun(self) -> None:
        """Takes back the buffers of parameters whose first step an overflow has skipped: None, as torch has it then."""
        if not self._may_have_skipped:
            return
        self._may_have_skipped = False
        known = [(param, count) for param, count in self._hidden_counts.items() if param in self.state]
        for device in {param.device for param, _ in known}:
            here = [(param, count) for param, count in known if param.device == device]
            for (param, _), count in zip(here, torch.stack([count for _, count in here]).tolist(), strict=True):
                if count == 0:
                    self.state[param]["momentum_buffer"], self._plan = None, None

    def state_dict(self) -> dict[str, Any]:
        self._forget_unbegun()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._forget_unbegun()
        return super().__getstate__()
