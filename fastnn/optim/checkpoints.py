"""Loading, copying and pickling: torch's own, without what it loses on the way."""

from typing import Any, ClassVar

import torch
from torch import Tensor

FLAGS = ("fused", "foreach", "capturable", "differentiable")  # the constructor's, which a checkpoint does not change
NARROW = (torch.bfloat16, torch.float16)  # parameters whose state may be wider
ATTRIBUTES = (
    "max_grad_norm", "l1", "state_dtype", "stochastic_rounding", "seed", "grad_norm", "_step_supports_amp_scaling",
)  # fmt: skip


def counts_on_device(group: dict[str, Any]) -> bool:
    """Whether torch keeps the step counts of a group where its parameters are."""
    return bool(group.get("capturable") or group.get("fused"))


class KeepsCheckpoints(torch.optim.Optimizer):
    counters: ClassVar[tuple[str, ...]] = ("step",)  # names of the 0-d entries of the state that each step moves
    state_dtype: torch.dtype | None

    def _forget(self) -> None:
        """Drops whatever is known of parameters and state beyond themselves."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that ``fused``, ``foreach``, ``capturable`` and ``differentiable`` stay the constructor's,
        counts keep their dtype, and state kept in ``state_dtype`` is not narrowed on the way.
        """
        loaded: dict[str, Any] = {}

        def keep_flags(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            groups = state_dict["param_groups"]
            kept = [{name: group[name] for name in FLAGS if name in group} for group in self.param_groups]
            if len(groups) == len(kept):  # else torch says so
                groups = [{**group, **flags} for group, flags in zip(groups, kept, strict=True)]
            loaded.update(state_dict, param_groups=groups)
            return dict(loaded)

        def keep_dtypes(_: torch.optim.Optimizer) -> None:
            for group, saved in zip(self.param_groups, loaded["param_groups"], strict=True):
                for param, index in zip(group["params"], saved["params"], strict=True):
                    self._restore(group, param, loaded["state"].get(index, {}))

        handles = (
            self.register_load_state_dict_pre_hook(keep_flags),
            self.register_load_state_dict_post_hook(keep_dtypes, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _restore(self, group: dict[str, Any], param: Tensor, saved: dict[str, Any]) -> None:
        """Where torch has cast or shared what a checkpoint holds of a parameter, takes it from there again."""
        state, wide = self.state.get(param, {}), self.state_dtype is not None and param.dtype in NARROW
        on_device = counts_on_device(group)
        for name, value in saved.items():
            if name in self.counters and isinstance(value, Tensor):
                value = value.detach().clone()  # torch's own load shares it with the checkpoint
                state[name] = value.to(param.device, torch.float32) if on_device else value.cpu()
            elif wide and isinstance(value, Tensor):
                state[name] = value.to(param.device, self.state_dtype)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: vars(self)[name] for name in ATTRIBUTES if name in vars(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
