"""What test_distributed_training.py runs on each of two processes, and beside them on one; this module holds no tests.

Modules and optimizer are both fastnn's or both torch's: `library` says which.
"""

from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.interpreter import Accesses, count_accesses
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastnn

PROCESSES, ROWS, STEPS = 2, 12, 4
LIBRARIES: dict[str, ModuleType] = {"fastnn": fastnn, "torch": torch}
Batch = tuple[Tensor, Tensor]
Results = dict[str, Any]


def joined_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    rows = PROCESSES * ROWS
    return torch.randn(rows, 5, generator=generator), torch.randn(rows, 3, generator=generator)


def own_batch(step: int) -> Batch:
    x, y = joined_batch(step)
    return x.chunk(PROCESSES)[dist.get_rank()], y.chunk(PROCESSES)[dist.get_rank()]


class Recomputed(nn.Module):
    """Keeps nothing for its backward but its input."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=False)


def make(library: str, of_batch: bool, seed: int = 3, recomputed: bool = False) -> nn.Sequential:
    """Blocks; of_batch: BatchNorm takes the statistics of each process's batch, else those it has, which are frozen."""
    torch.manual_seed(seed)
    norm, container = nn.BatchNorm1d(7), LIBRARIES[library].nn.Sequential
    parts = [
        container(nn.Linear(5, 8), nn.GELU(), nn.Dropout(0.0)),
        container(nn.Linear(8, 7, bias=False), norm.train(of_batch), nn.SiLU(), nn.Dropout(0.0)),
        container(nn.Linear(7, 3), nn.Tanh()),
    ]
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return nn.Sequential(*map(Recomputed, parts)) if recomputed else nn.Sequential(*parts)


def sharded(model: nn.Sequential) -> nn.Sequential:
    """By FSDP2, block by block."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
    return model


# Steps of SGD show a gradient's scale, those of AdamW the state that a checkpoint must hold.
OPTIMIZERS = {"SGD": {"lr": 0.2, "momentum": 0.9}, "AdamW": {"lr": 0.02, "weight_decay": 0.1, "amsgrad": True}}


def make_optimizer(library: str, name: str, model: nn.Module) -> torch.optim.Optimizer:
    return getattr(LIBRARIES[library].optim, name)(model.parameters(), **OPTIMIZERS[name])


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    batch_of: Callable[[int], Batch] = own_batch,
    micro_batches: int = 1,
) -> list[str]:
    """By a rate that decays with each step; the kernels of the last. Of micro-batches only the last is synchronised."""
    accesses = Accesses()
    for step in steps:
        optimizer.zero_grad()
        parts = zip(*(tensor.chunk(micro_batches) for tensor in batch_of(step)), strict=True)
        with count_accesses() if step == steps[-1] else nullcontext(accesses) as accesses:
            for i, (x, y) in enumerate(parts, 1):
                with nullcontext() if i == micro_batches else model.no_sync():  # type: ignore[operator]
                    (F.mse_loss(model(x), y) / micro_batches).backward()
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
    return [launch.kernel for launch in accesses.launches]


def found(model: nn.Module, launches: list[str]) -> Results:
    """Parameters and buffers, whole."""
    tensors = {name.replace("part.", ""): tensor.detach() for name, tensor in model.state_dict().items()}
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in tensors.items()}
    return {"state": whole, "launches": launches}


def on_one_process(name: str, steps: int, of_batch: bool = False) -> Results:
    """torch.nn and torch.optim on the joined batches, in the process that calls it."""
    model = make("torch", of_batch)
    return found(model, train(model, make_optimizer("torch", name, model), range(steps), joined_batch))


def ddp(library: str, of_batch: bool, micro_batches: int = 1) -> Results:
    model = DistributedDataParallel(make(library, of_batch))
    optimizer = make_optimizer(library, "SGD", model)
    launches = train(model, optimizer, range(STEPS), micro_batches=micro_batches)
    return found(model.module, launches)


def ddp_in_fp16(library: str) -> Results:
    """Gradients are exchanged in fp16: the bf16 that is as usual needs a GPU."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    model = DistributedDataParallel(make(library, of_batch=False))
    model.register_comm_hook(None, fp16_compress_hook)
    optimizer = make_optimizer(library, "SGD", model)
    launches = train(model, optimizer, range(STEPS))
    assert all(torch.equal(p.grad, p.grad.half().float()) for p in model.parameters() if p.grad is not None)
    return found(model.module, launches)


def zero(library: str) -> Results:
    """ZeroRedundancyOptimizer: each process steps its part of the parameters."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch.jit on import, an error in pytest

    model = DistributedDataParallel(make(library, of_batch=False))
    kind = LIBRARIES[library].optim.SGD
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=kind, **OPTIMIZERS["SGD"])
    return found(model.module, train(model, optimizer, range(STEPS)))


def fsdp2(library: str, of_batch: bool, recomputed: bool) -> Results:
    model = sharded(make(library, of_batch, recomputed=recomputed))
    return found(model, train(model, make_optimizer(library, "SGD", model), range(STEPS)))


def leg(library: str, of_batch: bool, steps: range, load: str | None, save: str | None) -> Results:
    """Some steps of AdamW, from a checkpoint of torch.distributed.checkpoint if one is given, to another.

    On two processes FSDP2 shards the model, on one process nothing does.
    """
    alone = not dist.is_initialized()
    model = make(library, of_batch, seed=3 if load is None else 4)
    optimizer = make_optimizer(library, "AdamW", model if alone else sharded(model))
    if load is not None:
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=load, no_dist=alone)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    launches = train(model, optimizer, steps, joined_batch if alone else own_batch)
    if save is not None:
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=save, no_dist=alone)
    return found(model, launches)
