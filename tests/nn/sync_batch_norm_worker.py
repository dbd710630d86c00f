"""What test_sync_batch_norm.py runs on each of two processes; this module holds no tests."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.interpreter import count_accesses
from torch import Tensor, nn

import fastnn

PROCESSES, K, N = 2, 5, 7
ROWS = (12, 20)


@dataclass(frozen=True)
class Case:
    """A run of layers, and the number of rows that each process has of a batch."""

    rows: tuple[int, int] = ROWS
    norm: dict[str, Any] = field(default_factory=dict)
    linear: bool = True
    activation: Callable[[], nn.Module] = nn.GELU
    p: float = 0.0
    mean: float = 0.0
    dtype: torch.dtype = torch.float32

    def layers(self, norm: type[nn.Module]) -> list[nn.Module]:
        torch.manual_seed(0)
        layers = [nn.Linear(K, N), norm(N, **self.norm), self.activation(), nn.Dropout(self.p)]
        if self.norm.get("affine", True):
            nn.init.normal_(layers[1].weight)  # type: ignore[arg-type]
            nn.init.normal_(layers[1].bias)  # type: ignore[arg-type]
        return layers if self.linear else layers[1:]

    def batch(self) -> tuple[Tensor, Tensor]:
        """The joint input, and the gradient of the joint output."""
        generator = torch.Generator().manual_seed(1)
        rows = sum(self.rows)
        x = torch.randn(rows, K if self.linear else N, generator=generator) + self.mean
        return x, torch.randn(rows, N, generator=generator)


CASES = {
    "batches of different sizes": Case(),
    "one row on one process": Case((1, 6)),
    "no row on one process": Case((0, 6)),
    "many chunks of rows": Case((700, 1300), linear=False),
    "without a Linear": Case(linear=False),
    "a large mean": Case((40, 24), {"momentum": 1.0}, linear=False, activation=nn.Identity, mean=1e4),
    "cumulative average": Case(norm={"momentum": None}),
    "without affine": Case(norm={"affine": False}),
    "without running statistics": Case(norm={"track_running_stats": False}),
    "dropout": Case(p=0.5),
    "bf16": Case(linear=False, dtype=torch.bfloat16),
}


@contextmanager
def collectives() -> Any:
    """The names and sizes of those that are called within."""
    found: list[tuple[str, int]] = []

    def noting(name: str, at: int) -> Any:
        real = getattr(dist, name)

        def noted(*tensors: Tensor, **group: Any) -> Any:
            found.append((name, tensors[at].numel()))
            return real(*tensors, **group)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        patch.setattr(dist, gather, noting(gather, 1))
        patch.setattr(dist, "all_reduce", noting("all_reduce", 0))
        yield found


def model_of(case: Case) -> tuple[nn.Module, nn.Module]:
    """The model, and its BatchNorm."""
    model = fastnn.nn.Sequential(*case.layers(nn.SyncBatchNorm)).to(case.dtype)
    return model, model[int(case.linear)]


def one_step(name: str) -> dict[str, Any]:
    case, rank = CASES[name], dist.get_rank()
    model, norm = model_of(case)
    x, grad = (tensor.split(case.rows)[rank].to(case.dtype) for tensor in case.batch())
    x.requires_grad_()
    torch.manual_seed(rank)
    with collectives() as called, count_accesses() as accesses:
        out = model(x)
        out.backward(grad)
    eval_out = model.eval()(x)
    return {
        "out": out.detach(), "x": x.grad, "eval": eval_out.detach(), "collectives": called,
        "kernels": [launch.kernel for launch in accesses.launches], **dict(norm.named_buffers()),
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
    }  # fmt: skip


def steps_together() -> list[Tensor]:
    """Parameters and buffers after three steps of two blocks, with gradients added up over the processes."""
    model = fastnn.nn.Sequential(*Case().layers(nn.SyncBatchNorm), nn.Linear(N, N), nn.SyncBatchNorm(N), nn.ReLU())
    optimizer = fastnn.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = (tensor.split(ROWS)[dist.get_rank()] for tensor in Case().batch())
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - y).square().sum().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
    return [tensor.detach() for tensor in model.state_dict().values()]


def raised() -> dict[str, str]:
    """What is torch's to refuse, the same on both processes, and what has no second derivative."""
    found = {}
    x = torch.randn(4, K, requires_grad=True)

    def attempt(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
            found[name] = "nothing"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    model, norm = model_of(Case())
    attempt("float64", lambda: model.double()(x.double()))
    model, norm = model_of(Case())
    norm.register_forward_hook(lambda *_: None)
    attempt("hook", lambda: model(x))
    model, norm = model_of(Case())
    attempt("features", lambda: model(torch.randn(4, K + 1)))

    def twice() -> None:
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        grad.sum().backward()

    attempt("second derivative", twice)
    (row,) = fastnn.explain(model, x).rows
    found["explained"] = f"{row.fused} {row.forward} {row.backward} {row.accesses}"
    with collectives() as called:
        model.eval()(x)
        alone = [dist.new_group([number]) for number in range(PROCESSES)][dist.get_rank()]
        norm.process_group = alone
        model.train()(x).sum().backward()
    return found | {"collectives": str(called)}
