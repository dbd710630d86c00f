"""Capturing steps of a small training, in CUDA graphs or in recorded ones, whichever torch.cuda's names stand for."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.optimizers import DEVICE, state_tensors

WARM_UP, BATCH = 3, 12
Batch = tuple[Tensor, Tensor]


def capture(step: Callable[[], Any], warm_up: Callable[[], Any] | None = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph of a step and what the step returned, after a warm-up: WARM_UP steps, or what is given."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(1 if warm_up else WARM_UP):
            (warm_up or step)()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    draws = [torch.randn(BATCH, 6, generator=generator).to(DEVICE) for _ in range(count)]
    return [(x, torch.randint(3, (BATCH,), generator=generator).to(DEVICE)) for x in draws]


def all_differ(masks: list[Tensor]) -> bool:
    return not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


class Training:
    """An MLP of `library`, its optimizer and a schedule; a step works on the batch in `x` and `y`."""

    def __init__(
        self,
        library: ModuleType,
        name: str,
        dtype: torch.dtype = torch.float32,
        autocast: bool = False,
        activation: type[nn.Module] = nn.ReLU,
        **settings: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.model = library.nn.Sequential(
            nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), activation(), nn.Dropout(0.0),
            nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8), activation(), nn.Dropout(0.0),
            nn.Linear(8, 3),
        )  # fmt: skip
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, 0.5, 0.5, generator=generator)
        self.model.to(DEVICE, dtype)
        self.autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=autocast, cache_enabled=False)
        self.optimizer = getattr(library.optim, name)(self.model.parameters(), **settings)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.7)
        self.x = torch.randn(BATCH, 6, generator=generator).to(DEVICE, dtype)
        self.y = torch.zeros(BATCH, device=DEVICE, dtype=torch.int64)
        self.losses: list[Tensor] = []

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        with self.autocast:
            loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def train(self, step: Callable[[], Tensor], of: list[Batch], order: Tensor | None = None) -> None:
        """A step with each batch, its rows in this order; the rate decays after each."""
        for x, y in of:
            self.x.copy_(x if order is None else x[order])
            self.y.copy_(y if order is None else y[order])
            self.losses.append(step().clone())
            self.schedule.step()

    def results(self) -> dict[str, Tensor]:
        state = state_tensors(self.optimizer, list(self.model.parameters()))
        return {"losses": torch.stack(self.losses), **state, **dict(self.model.named_buffers())}
