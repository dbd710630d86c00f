"""Adadelta in one launch."""

from typing import Any

import torch

from .engine import MultiTensorOptimizer


class Adadelta(MultiTensorOptimizer, torch.optim.Adadelta):
    """:class:`torch.optim.Adadelta` in one launch per step; its further arguments are :class:`MultiTensorOptimizer`'s.

    28 bytes per fp32 parameter are read and written.
    """

    rule = "adadelta"

    def state_names(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return "square_avg", "acc_delta"

    def own_hyperparameters(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return group["rho"], group["eps"]
