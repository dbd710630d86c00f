"""The suite on a GPU: tensors lie there where a test does not say otherwise, with the numbers of a run without one."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

DRAWS, LIKE, IN_PLACE = ("rand", "randn", "randint", "randperm"), ("rand_like", "randn_like"), ("normal_", "uniform_")


def take_by_default(device: str) -> None:
    """Puts all tensors there, modules' too. What is drawn is drawn on the CPU and moved, dropout's masks apart."""
    torch.set_default_device(device)
    torch.backends.cudnn.allow_tf32 = False  # as for products, and on a CPU
    torch.empty(0)  # torch now lists the functions that this concerns, before tests put others in their place
    for names, wrap, owner in ((DRAWS, _drawn, torch), (LIKE, _drawn_like, torch), (IN_PLACE, _filled, Tensor)):
        for name in names:
            setattr(owner, name, wrap(getattr(owner, name)))


def _is_drawn_where_asked(settings: dict[str, Any]) -> bool:
    generator = settings.get("generator")
    elsewhere = generator is not None and generator.device.type != "cpu"
    return elsewhere or settings.get("device") is not None or torch.compiler.is_compiling()


def _drawn(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(draw)
    def drawn(*args: Any, **settings: Any) -> Tensor:
        if _is_drawn_where_asked(settings):
            return draw(*args, **settings)
        leaf = settings.pop("requires_grad", False)
        moved = draw(*args, **settings | {"device": "cpu"}).to(torch.get_default_device())
        return moved.requires_grad_() if leaf else moved  # functorch lets none of its tensors be asked, even for False

    return drawn


def _drawn_like(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(draw)
    def drawn(like: Tensor, **settings: Any) -> Tensor:
        if _is_drawn_where_asked(settings) or type(like) not in (Tensor, torch.nn.Parameter) or not like.is_cuda:
            return draw(like, **settings)
        return draw(like, **settings, device="cpu").to(like.device)

    return drawn


def _filled(fill: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(fill)
    def filled(tensor: Tensor, *args: Any, **settings: Any) -> Tensor:
        if _is_drawn_where_asked(settings) or not tensor.is_cuda:
            return fill(tensor, *args, **settings)
        return tensor.copy_(fill(torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"), *args, **settings))

    return filled
