"""Adagrad in one launch."""

from typing import Any

import torch
from torch import Tensor

from .engine import MultiTensorOptimizer


class Adagrad(MultiTensorOptimizer, torch.optim.Adagrad):
    """:class:`torch.optim.Adagrad` in one launch per step; its further arguments are :class:`MultiTensorOptimizer`'s.

    20 bytes per fp32 parameter are read and written.
    """

    rule = "adagrad"

    def state_names(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("sum",)

    def own_hyperparameters(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return group["lr_decay"], group["eps"]

    def check_sparse(self, group: dict[str, Any], param: Tensor) -> None:
        if param.grad is not None and param.grad.is_sparse and group["weight_decay"] != 0:
            raise RuntimeError("weight_decay option is not compatible with sparse gradients")
