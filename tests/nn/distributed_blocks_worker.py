"""What test_distributed_blocks.py runs on each of two processes; this module holds no tests."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from support.interpreter import count_accesses
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fastnn
from fastnn.nn import Sequential

PROCESSES, ROWS, STEPS = 2, 12, 2
KINDS: dict[str, Callable[..., nn.Module]] = {
    "torch": nn.Sequential,
    "fastnn": Sequential,
    "fuse": nn.Sequential,  # and then fastnn.fuse, of what is wrapped
}


class Net(nn.Module):
    """Two blocks, a head, and one that a forward may leave out."""

    def __init__(self, make: Callable[..., nn.Module], uses_all: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            make(nn.Linear(K, 8, bias=K > 6), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.0)) for K in (6, 8)
        )
        self.head, self.other = make(nn.Linear(8, 4), nn.Tanh()), make(nn.Linear(8, 4), nn.Tanh())
        self.uses_all = uses_all

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x) + self.other(x) if self.uses_all else self.head(x)


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for part in (*model.blocks, model.head, model.other):  # type: ignore[union-attr, misc]
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS: dict[str, tuple[bool, Callable[[nn.Module], nn.Module]]] = {
    "DDP": (True, DistributedDataParallel),
    "DDP static_graph": (True, lambda model: DistributedDataParallel(model, static_graph=True)),
    "DDP find_unused_parameters": (False, lambda model: DistributedDataParallel(model, find_unused_parameters=True)),
    "FSDP2": (True, sharded),
}


def own_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(PROCESSES, ROWS, 6, generator=generator), torch.randn(PROCESSES, ROWS, 4, generator=generator)
    return x[dist.get_rank()], y[dist.get_rank()]


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def trained(wrapper: str, kind: str) -> dict[str, Any]:
    """Parameters and buffers after STEPS steps of SGD, and how many kernels a forward and backward launch."""
    uses_all, wrap = WRAPPERS[wrapper]
    model = Net(KINDS[kind], uses_all)
    wrapped = wrap(fastnn.fuse(model) if kind == "fuse" else model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5)
    x, y = own_batch()
    for _ in range(STEPS):
        optimizer.zero_grad()
        with count_accesses() as accesses:
            F.mse_loss(wrapped(x), y).backward()
        optimizer.step()
    return {"launches": len(accesses.launches), **{name: whole(t) for name, t in model.state_dict().items()}}
