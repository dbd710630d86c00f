"""What test_distributed.py runs on each of two processes; this module holds no tests.

Every training here is run once with fastnn.optim and once with torch.optim, on the same data: `library` says which.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fastnn.optim

PROCESSES = 2
ROWS = 6  # of a batch, on each process
FEATURES = 67

Tensors = dict[str, Tensor]


# Data and models, the same in every process


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of all processes together."""
    generator = torch.Generator().manual_seed(1000 + step)
    rows = PROCESSES * ROWS
    return torch.randn(rows, FEATURES, generator=generator), torch.randn(rows, 1, generator=generator)


def own_batch(step: int) -> tuple[Tensor, Tensor]:
    x, y = batch(step)
    return x.chunk(PROCESSES)[dist.get_rank()], y.chunk(PROCESSES)[dist.get_rank()]


def mlp() -> nn.Sequential:
    """Sizes of which some are odd, one is 1, and two weights are larger than a block of the kernels (1024)."""
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Linear(FEATURES, 46), nn.Tanh(), nn.Linear(46, 31), nn.Tanh(), nn.Linear(31, 15), nn.Tanh(), nn.Linear(15, 1)
    )


class Branching(nn.Module):
    """Has a branch that a step may go without."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = mlp()
        self.branch = nn.Linear(FEATURES, 1)

    def forward(self, x: Tensor, branches: bool) -> Tensor:
        return self.trunk(x) + self.branch(x) if branches else self.trunk(x)


def groups(model: nn.Module, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Weights, and biases with their own learning rate and weight decay."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if "weight" in name]},
        {"params": [p for name, p in named if "bias" in name], "lr": options["lr"] / 2, "weight_decay": 0.0},
    ]


def make_optimizer(library: str, name: str, model: nn.Module, options: dict[str, Any]) -> torch.optim.Optimizer:
    """`max_grad_norm` among the options is given to fastnn's only: `train` does it for torch's."""
    if library == "torch":
        options = {key: value for key, value in options.items() if key != "max_grad_norm"}
    module = {"torch": torch.optim, "fastnn": fastnn.optim}[library]
    return getattr(module, name)(groups(model, options), **options)


def train(
    library: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    max_grad_norm: float | None,
    *args: Any,
) -> list[float]:
    """The norms of all gradients, where they are clipped."""
    norms = []
    for step in steps:
        x, y = own_batch(step)
        optimizer.zero_grad()
        F.mse_loss(model(x, *args), y).backward()
        if max_grad_norm is not None and library == "torch":
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
        before = [None if p.grad is None else whole(p.grad).clone() for p in model.parameters()]
        optimizer.step()
        for param, grad in zip(model.parameters(), before, strict=True):
            assert (grad is None) == (param.grad is None)
            assert grad is None or torch.equal(whole(param.grad), grad), "the step has changed a gradient"
        if max_grad_norm is not None and library == "fastnn":
            norms.append(optimizer.grad_norm)
    return [float(whole(norm)) for norm in norms]


def whole(tensor: Tensor) -> Tensor:
    """What all processes hold of a DTensor, of others the tensor itself."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def parameters(model: nn.Module) -> Tensors:
    return {name: whole(param).clone() for name, param in model.named_parameters()}


def entries(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, param in model.named_parameters():
        for key, value in optimizer.state.get(param, {}).items():
            if value is not None:
                yield f"{name}.{key}", value


def placement(tensor: Tensor) -> tuple[Any, ...]:
    """What is to be as torch's: class, dtype, shape and, of a DTensor, where its parts are."""
    distributed = isinstance(tensor, DTensor)
    where = (tensor.placements, tensor.device_mesh.mesh.tolist(), tensor.to_local().shape) if distributed else ()
    return type(tensor).__name__, tensor.dtype, tensor.shape, repr(where)


def found(library: str, model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> dict[str, Any]:
    """What a training has led to."""
    state = dict(entries(model, optimizer))
    names = {param: name for name, param in model.named_parameters()}
    result = {
        "parameters": parameters(model),
        "state": {name: whole(value).clone() for name, value in state.items()},
        "placements": {name: placement(value) for name, value in state.items()},
        "empty": {n for n, p in model.named_parameters() if isinstance(p, DTensor) and not p.to_local().numel()},
    }
    if library == "fastnn":
        plan = optimizer._plan
        result["served"] = [names[param] for bundle in plan.bundles for param in bundle.params]
        result["by torch"] = {names[param] for param in plan.eager_params}
    return {**result, **more}


# Trainings


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (PROCESSES,))


def sharded_mlp() -> nn.Sequential:
    """By FSDP2: rows of all but one weight, whose columns. Of odd sizes one process has less, of size 1 none."""
    model = mlp()
    columns = model[2].weight
    for module in (*model[::2], model):
        fully_shard(module, mesh=mesh(), shard_placement_fn=lambda p: Shard(1 if p is columns else 0))
    return model


def fsdp(library: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    model = sharded_mlp()
    initial = parameters(model)
    optimizer = make_optimizer(library, name, model, options)
    norms = train(library, model, optimizer, range(5), options.get("max_grad_norm"))
    return found(library, model, optimizer, initial=initial, norms=norms)


def fsdp_checkpoints(legs: list[tuple[str, int]], name: str, options: dict[str, Any], folder: str) -> dict[str, Any]:
    """So many steps with each of these libraries' optimizers, which take over from each other by checkpoints."""
    model, previous, first = sharded_mlp(), None, 0
    for leg, (library, steps) in enumerate(legs):
        optimizer = make_optimizer(library, name, model, options)
        if previous is not None:
            model.zero_grad()  # else get_optimizer_state_dict does not create the state that dcp.load reads into
            if leg % 2:
                saved = {"optimizer": get_optimizer_state_dict(model, previous)}
                dcp.save(saved, checkpoint_id=f"{folder}/{leg}")
                loaded = {"optimizer": get_optimizer_state_dict(model, optimizer)}
                dcp.load(loaded, checkpoint_id=f"{folder}/{leg}")
                set_optimizer_state_dict(model, optimizer, loaded["optimizer"])
            else:
                full = StateDictOptions(full_state_dict=True)
                saved = get_optimizer_state_dict(model, previous, options=full)
                set_optimizer_state_dict(model, optimizer, saved, options=full)
        train(library, model, optimizer, range(first, first + steps), options.get("max_grad_norm"))
        previous, first = optimizer, first + steps
    return found(library, model, optimizer)


def dtensors(library: str, name: str, options: dict[str, Any], other_placement: bool) -> dict[str, Any]:
    """Parameters distributed without FSDP, with random gradients, of which one may be a sum still to be made."""
    torch.manual_seed(11)
    places = {"rows": Shard(0), "columns": Shard(1), "copies": Replicate(), "vector": Shard(0)}
    shapes = {"rows": (41, 29), "columns": (13, 45), "copies": (9, 7), "vector": (3,)}
    model = nn.Module()
    for key, shape in shapes.items():
        model.register_parameter(key, nn.Parameter(distribute_tensor(torch.randn(shape), mesh(), [places[key]])))
    optimizer = getattr({"torch": torch.optim, "fastnn": fastnn.optim}[library], name)(model.parameters(), **options)
    for _ in range(4):
        for key, param in model.named_parameters():
            param.grad = distribute_tensor(torch.randn(shapes[key]), mesh(), [places[key]])
        if other_placement:
            torch.manual_seed(int(torch.randint(2**31, ())))
            summand = torch.randn(PROCESSES, *shapes["copies"])[dist.get_rank()]
            model.copies.grad = DTensor.from_local(summand, mesh(), [Partial()])
        optimizer.step()
    return found(library, model, optimizer)


def zero(library: str, options: dict[str, Any], bucket_view: bool, folder: str) -> dict[str, Any]:
    """ZeroRedundancyOptimizer around AdamW, in DDP, by a schedule for six steps; its state is gathered into a file.

    Then trained on for two steps, and these two again from the checkpoint.
    """
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch.jit on import, an error in pytest

    model = DistributedDataParallel(mlp())
    optimizer = ZeroRedundancyOptimizer(
        groups(model.module, options),
        optimizer_class={"torch": torch.optim, "fastnn": fastnn.optim}[library].AdamW,
        parameters_as_bucket_view=bucket_view,
        **options,
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for step in range(6):
        train(library, model, optimizer, range(step, step + 1), None)
        schedule.step()
    result: dict[str, Any] = {"parameters": parameters(model.module)}
    if library == "fastnn":
        plan = optimizer.optim._plan
        result["served"], result["by torch"] = sum(len(b.params) for b in plan.bundles), len(plan.eager_params)
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        torch.save(optimizer.state_dict(), f"{folder}/zero.pt")
    dist.barrier()
    train(library, model, optimizer, range(6, 8), None)
    result["trained on"] = parameters(model.module)
    with torch.no_grad():
        for name, param in model.module.named_parameters():
            param.copy_(result["parameters"][name])
    optimizer.load_state_dict(torch.load(f"{folder}/zero.pt"))
    train(library, model, optimizer, range(6, 8), None)
    return {**result, "from the checkpoint": parameters(model.module)}


def ddp(library: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Gradients that are views of DDP's buckets. A branch is used by both processes, none, one, or both again."""
    torch.manual_seed(7)
    model = DistributedDataParallel(Branching(), gradient_as_bucket_view=True, find_unused_parameters=True)
    initial = parameters(model.module)
    optimizer = make_optimizer(library, name, model.module, options)
    norms = []
    rank, max_grad_norm = dist.get_rank(), options.get("max_grad_norm")
    for step, branches in enumerate((True, False, rank == 0, False, True)):
        norms += train(library, model, optimizer, range(step, step + 1), max_grad_norm, branches)
    grads = [param.grad for param in model.parameters()]
    storages = [grad.untyped_storage().data_ptr() for grad in grads]
    shared = [a for a, b in itertools.pairwise(sorted(storages)) if a == b]
    unaligned = sum(grad.data_ptr() % 16 != 0 for grad in grads)
    return found(
        library, model.module, optimizer, initial=initial, norms=norms, shared=len(shared), unaligned=unaligned
    )
