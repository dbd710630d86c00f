"""NAdam in one launch."""

from typing import Any

import torch
from torch import Tensor

from .algorithm import OWN
from .engine import MultiTensorOptimizer


class NAdam(MultiTensorOptimizer, torch.optim.NAdam):
    """:class:`torch.optim.NAdam` in one launch per step; its further arguments are :class:`MultiTensorOptimizer`'s.

    28 bytes per fp32 parameter are read and written.
    """

    rule = "nadam"
    counters = ("step", "mu_product")

    def state_names(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return "exp_avg", "exp_avg_sq"

    def own_hyperparameters(self, group: dict[str, Any]) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        return beta1, beta2, group["eps"], group["momentum_decay"]

    @staticmethod
    def momentum(rows: Tensor, steps: Tensor) -> Tensor:
        beta1, momentum_decay = rows[OWN], rows[OWN + 3]
        return beta1 * (1 - 0.5 * 0.96 ** (steps * momentum_decay))
