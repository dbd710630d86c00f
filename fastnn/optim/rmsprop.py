"""RMSprop in one launch."""

from typing import Any

import torch

from .engine import MultiTensorOptimizer


class RMSprop(MultiTensorOptimizer, torch.optim.RMSprop):
    """:class:`torch.optim.RMSprop` in one launch per step; its further arguments are :class:`MultiTensorOptimizer`'s.

    20 bytes per fp32 parameter are read and written, 8 more with momentum and 8 more where centered.
    """

    rule = "rmsprop"

    def state_names(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        mean = "grad_avg" if group["centered"] else None
        return "square_avg", mean, "momentum_buffer" if group["momentum"] > 0 else None

    def own_hyperparameters(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return group["alpha"], group["eps"], group["momentum"]
