"""Memory that nobody has written holds NaN, so that reading it shows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastnn import memory


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its kin give NaN, or -1 of integers."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    allocator = memory.allocator
    monkeypatch.setattr(memory, "allocator", lambda device: _poisoned(allocator(device)))


def _poisoned(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = function(*args, **kwargs)
        if tensor.numel() and tensor.device.type != "meta" and not torch.compiler.is_compiling():
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
        return tensor

    return poisoned
