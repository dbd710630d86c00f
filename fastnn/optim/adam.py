"""Adam and AdamW in one launch."""

from typing import Any

import torch

from .engine import MultiTensorOptimizer


class Adam(MultiTensorOptimizer, torch.optim.Adam):
    """:class:`torch.optim.Adam` in one launch per step; its further arguments are :class:`MultiTensorOptimizer`'s.

    28 bytes per fp32 parameter are read and written, 36 with ``amsgrad``.
    """

    rule = "adam"

    def state_names(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return "exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else None

    def own_hyperparameters(self, group: dict[str, Any]) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        return beta1, beta2, group["eps"]


class AdamW(Adam, torch.optim.AdamW):
    """:class:`torch.optim.AdamW`, in the same launch as :class:`Adam`."""
