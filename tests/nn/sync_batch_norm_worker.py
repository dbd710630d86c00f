"""One of two processes that train with SyncBatchNorm; prints JSON. Run by test_sync_batch_norm.py.

    python sync_batch_norm_worker.py RANK RENDEZVOUS

torch's SyncBatchNorm runs on GPUs only: here its forward is written out, with the one collective each way that it has.
The processes have batches of different sizes, and process 1 plans that a tuned table turns to the other candidates.
"""

import json
import sys
import warnings
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import fastnn
from fastnn import observation, plans
from fastnn.kernels import launch

ROWS = (12, 20)
WIDTHS = (6, 16, 8)
collectives: list[tuple[int, ...]] = []
kernels: list[str] = []


def all_reduce(tensor: Tensor) -> Tensor:
    collectives.append(tuple(tensor.shape))
    dist.all_reduce(tensor)
    return tensor


class Sums(torch.autograd.Function):
    """Over all processes, of (3, N): the gradient of a sum is the sum of the gradients."""

    @staticmethod
    def forward(ctx, partial: Tensor) -> Tensor:
        return all_reduce(partial.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        return all_reduce(grad.clone())


def sync_forward(self: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    count, total, squares = Sums.apply(torch.stack([torch.ones_like(x[0]) * len(x), x.sum(0), x.square().sum(0)]))
    mean = total / count
    var = squares / count - mean.square()
    return (x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias


def layers(norm: type[nn.Module]) -> list[nn.Module]:
    torch.manual_seed(0)
    found: list[nn.Module] = []
    for K, N in pairwise(WIDTHS):
        found += [nn.Linear(K, N), norm(N), nn.ReLU(), nn.Dropout(0.0)]
    return [*found, nn.Linear(WIDTHS[-1], 3)]


def joined_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = sum(ROWS)
    return torch.randn(rows, WIDTHS[0], generator=generator), torch.randint(3, (rows,), generator=generator)


def turn_plans_around(model: nn.Module, x: Tensor) -> None:
    """As if tune had found every candidate faster that the rule does not take."""
    for call in observation.observe(model, (x,))[0]:
        for choice in call.choices().values():
            others = {name: 1.0 for name in choice.microseconds if name != choice.plan}
            if dist.get_rank() == 1 and others:
                plans.learn(x.device, {choice.problem: others})


def main(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", module="fastnn")
    dist.init_process_group("gloo", init_method=rendezvous, world_size=2, rank=rank)
    nn.SyncBatchNorm.forward = sync_forward  # type: ignore[method-assign]
    by_triton = launch.Launch.by_triton

    def noted(self: launch.Launch, arguments: tuple, keep: bool) -> None:
        kernels.append(self._kernel.fn.__name__)
        by_triton(self, arguments, keep)

    launch.Launch.by_triton = noted  # type: ignore[method-assign]
    model = fastnn.nn.Sequential(*layers(nn.SyncBatchNorm))
    parts = (tensor.split(ROWS)[rank] for tensor in joined_batch())
    x, y = parts
    turn_plans_around(model, x)
    collectives.clear()
    kernels.clear()
    for _ in range(2):
        model.zero_grad()
        F.cross_entropy(model(x), y, reduction="sum").backward()
    dist.barrier()
    gradients = [p.grad.tolist() for p in model.parameters() if p.grad is not None]
    json.dump({"collectives": collectives, "kernels": kernels, "gradients": gradients}, sys.stdout)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
