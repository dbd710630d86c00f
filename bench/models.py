"""What the model rows time: a block or a whole stack by one implementation, as torch runs it or as one CUDA graph."""

import contextlib
from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor, nn

import fastnn
from bench import gpu
from bench.workloads import Workload

Results = dict[str, Tensor]
# torch.compile's arguments by implementation; "max-autotune" makes CUDA graphs itself.
COMPILE: dict[str, dict] = {
    "compile": {},
    "max-autotune-no-cudagraphs": {"mode": "max-autotune-no-cudagraphs"},
    "max-autotune": {"mode": "max-autotune"},
}
UNGRAPHED = ("eager", "compile", "max-autotune-no-cudagraphs", "fastnn")
GRAPHED = ("eager", "max-autotune", "fastnn")
LR = 1e-3
VARYING_BATCHES = 16


def compiled(call: Callable, implementation: str) -> Callable:
    """The call by that implementation. A rehearsal stops before code generation, which no CPU needs to show."""
    if implementation not in COMPILE:
        return call
    torch.compiler.reset()  # else the ninth model of one class runs uncompiled, and says so in a log only
    if gpu.REHEARSAL:
        return torch.compile(call, backend="aot_eager")
    return torch.compile(call, **COMPILE[implementation])


class Model:
    """One implementation of the first `blocks` blocks of a workload, in training, with its input and cotangent.

    The torch modules among the implementations are the same, with the same parameters. `g` is random; gamma and beta
    too, or a gradient by them would be checked at ones and zeros only.
    """

    def __init__(
        self, workload: Workload, batch: int, dtype: str, implementation: str, blocks: int | None, p: float
    ) -> None:
        torch.manual_seed(0)
        self.dtype, self.implementation, self.p = dtype, implementation, p
        sequential = fastnn.nn.Sequential if implementation == "fastnn" else nn.Sequential
        self.layers = sequential(*workload.layers(blocks)).to(gpu.DEVICE)
        for layer in self.layers:
            if isinstance(layer, nn.BatchNorm1d):
                nn.init.normal_(layer.weight, 1.0, 0.1)
                nn.init.normal_(layer.bias, 0.0, 0.1)
            elif isinstance(layer, nn.Dropout):
                layer.p = p
        self.forward_of = compiled(self.layers, implementation)
        features = [layer.out_features for layer in self.layers if isinstance(layer, nn.Linear)]
        self.x = torch.randn(batch, workload.widths[0], device=gpu.DEVICE)
        self.g = torch.randn(batch, features[-1], device=gpu.DEVICE)
        self.out = self.x  # of the last forward

    def precision(self) -> contextlib.AbstractContextManager:
        return gpu.precision(self.dtype)

    def forward(self) -> Tensor:
        if self.implementation == "max-autotune":
            torch.compiler.cudagraph_mark_step_begin()
        self.out = self.forward_of(self.x)
        return self.out


class Block(Model):
    """The first block, in the middle of a network: its input needs a gradient too."""

    def __init__(self, workload: Workload, batch: int, dtype: str, implementation: str) -> None:
        super().__init__(workload, batch, dtype, implementation, 1, workload.p)
        self.leaves = {"x": self.x.requires_grad_(), **dict(self.layers.named_parameters())}
        self.gradients: tuple[Tensor, ...] = ()

    def backward(self, out: Tensor) -> None:
        # A graph's own gradients, so that no kernel adds them to .grad.
        self.gradients = torch.autograd.grad(out, tuple(self.leaves.values()), self.g.to(out.dtype))

    def step(self) -> None:
        out = self.forward()
        self.backward(out)
        self.out = out.detach()  # a graph kept would hold on to the stream it was made on

    def evaluate(self) -> None:
        with torch.no_grad():
            self.forward()

    def results(self) -> Results:
        """Of the last step."""
        gradients = {f"gradient of {name}": grad for name, grad in zip(self.leaves, self.gradients, strict=True)}
        return {"out": self.out.detach(), **gradients, **dict(self.layers.named_buffers())}


class Mlp(Model):
    """A whole stack and its optimizer. A step has no loss, whose cost is the same for all: its gradient is `g`.

    torch's optimizer is its fused one, the fastest it has without a compiler. Two batches are a range: each step then
    has another number of rows from it.
    """

    def __init__(
        self, workload: Workload, batches: tuple[int, ...], dtype: str, implementation: str, graphed: bool, p: float
    ) -> None:
        super().__init__(workload, max(batches), dtype, implementation, None, p)
        for layer in self.layers:  # far from zero, where no rounding decides a gate that later layers depend on
            if isinstance(layer, nn.BatchNorm1d):
                nn.init.uniform_(layer.bias, 4.0, 4.5)
                with torch.no_grad():
                    layer.bias[::2] *= -1
        self.optimizer = make_optimizer("AdamW", list(self.layers.parameters()), implementation, graphed)
        self.batches = batches
        self.inputs = cycle([self.x] if graphed else gpu.rotated(lambda: torch.randn_like(self.x)))
        if len(batches) > 1:
            self.batches = torch.randint(min(batches), max(batches) + 1, (VARYING_BATCHES,)).tolist()
            self.inputs = cycle([torch.randn(M, workload.widths[0], device=gpu.DEVICE) for M in self.batches])
        if implementation == "max-autotune":
            torch._dynamo.mark_static_address(self.x)  # as our graphs read their input: in place
        self.all_g = self.g

    def steps(self) -> None:
        """One with each batch."""
        for _ in self.batches:
            self.step()

    def step(self) -> None:
        self.x = next(self.inputs)
        self.g = self.all_g[: len(self.x)]
        self.optimizer.zero_grad()
        out = self.forward()
        out.backward(self.g.to(out.dtype))
        self.optimizer.step()
        self.out = out.detach()

    def results(self) -> Results:
        """Of the last step."""
        gradients = {f"gradient of {name}": p.grad for name, p in self.layers.named_parameters() if p.grad is not None}
        return {"out": self.out.detach(), **gradients, **dict(self.layers.named_buffers())}


def make_optimizer(
    name: str, params: list[nn.Parameter], implementation: str, graphed: bool, **settings: object
) -> torch.optim.Optimizer:
    """By implementation: "fastnn", torch's "foreach", or its "fused" step, which all others of torch's take."""
    capturable = graphed and gpu.AVAILABLE and name not in ("SGD", "Adagrad")  # these two have no such flag
    flags = {"capturable": True} if capturable else {}
    if implementation == "fastnn":
        return getattr(fastnn.optim, name)(params, lr=LR, **flags, **settings)
    flags["foreach" if implementation in ("foreach", "compiled step") else "fused"] = True
    return getattr(torch.optim, name)(params, lr=LR, **flags, **settings)
