"""The suite on a GPU: tensors lie there where a test does not say otherwise, with the numbers of a run without one."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def take_by_default(device: str) -> None:
    """Puts all tensors there, modules' too. What a generator of the CPU draws is drawn on it and moved."""
    torch.set_default_device(device)
    torch.backends.cudnn.allow_tf32 = False  # as for products, and on a CPU
    torch.empty(0)  # torch now lists the functions that this concerns, before tests put others in their place
    for name in ("rand", "randn", "randint", "randperm"):
        setattr(torch, name, _drawn_where_generator_is(getattr(torch, name)))


def _drawn_where_generator_is(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> torch.Tensor:
        generator = kwargs.get("generator")
        if generator is None or "device" in kwargs or generator.device.type != "cpu":
            return draw(*args, **kwargs)
        leaf = kwargs.pop("requires_grad", False)
        moved = draw(*args, **kwargs, device="cpu").to(torch.get_default_device())
        return moved.requires_grad_() if leaf else moved  # functorch lets none of its tensors be asked, even for False

    return drawn
