"""The shapes that are measured, from published models, and the lists of parameters that optimizers step."""

from dataclasses import dataclass, replace
from itertools import pairwise

from torch import nn


@dataclass(frozen=True)
class Workload:
    """A stack of Linear + BatchNorm1d + ReLU + Dropout blocks; `head` ends it with a Linear of its own."""

    name: str
    source: str
    batches: tuple[int, ...]  # rows; more than one: measured at each
    widths: tuple[int, ...]  # input features, then each block's output features
    p: float = 0.0
    head: int | None = None
    eps: float = 1e-5
    momentum: float = 0.1
    varying: bool = False  # trained with another number of rows, between the batches, every step

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """(K, N) of each block."""
        return tuple(pairwise(self.widths))

    @property
    def parameters(self) -> int:
        """How many numbers an optimizer steps."""
        blocks = sum(K * N + 2 * N for K, N in self.blocks)
        return blocks if self.head is None else blocks + (self.widths[-1] + 1) * self.head

    def miniature(self) -> "Workload":
        """The same stack at a size that Triton's interpreter finishes at once."""
        small = {width: 6 + 4 * position for position, width in enumerate(sorted(set(self.widths)))}
        batches = tuple(40 + position for position, _ in enumerate(self.batches))
        return replace(self, batches=batches, widths=tuple(small[width] for width in self.widths))

    def layers(self, blocks: int | None = None) -> list[nn.Module]:
        """The layers of the first `blocks` blocks; of the whole stack, head included, if None."""
        found: list[nn.Module] = []
        for K, N in self.blocks[:blocks]:
            norm = nn.BatchNorm1d(N, eps=self.eps, momentum=self.momentum)
            found += [nn.Linear(K, N, bias=False), norm, nn.ReLU(), nn.Dropout(self.p)]
        if blocks is None and self.head is not None:
            found.append(nn.Linear(self.widths[-1], self.head))
        return found


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("notes-mlp", "the MLP of a deep-learning course", (64, 1024), (784, 100, 100), p=0.5, head=10),
        Workload("mag240m", "OGB MAG240M's MLP baseline", (380_000,), (768, 512), p=0.5),
        Workload("pointnet", "PointNet's shared MLP, as rows", (80_000,), (128, 1024)),
        Workload("recsys-wide", "FuxiCTR's MLP block", (10_000,), (500, 500, 500), p=0.2),
        Workload("recsys-fm", "pytorch-fm's MLP", (2048,), (400, 400, 400), p=0.2),
        Workload("tabular-odd", "RTDL's tuned configuration", (1024,), (343, 501), p=0.5),
        Workload("mag-head", "OGB's R-GNN head", (1024,), (1024, 1024), p=0.5),
        Workload("crossq", "CrossQ's critic", (512,), (2048, 2048)),
        Workload("simsiam", "SimSiam's projector", (512,), (2048, 2048, 2048)),
        Workload("moco", "MoCo v3's predictor", (256,), (256, 4096, 256)),
        Workload("barlow", "Barlow Twins' projector", (2048,), (2048, 8192, 8192, 8192)),
        Workload("scvi", "scVI's encoder", (128,), (4000, 128), p=0.1, eps=1e-3, momentum=0.01),
        Workload("gin", "OGB's GIN", (500, 9000), (300, 600, 300), varying=True),
    )
}


Shapes = list[tuple[int, ...]]


def _linears(*widths: int) -> Shapes:
    """Weight and bias of each Linear."""
    return [shape for K, N in pairwise(widths) for shape in ((N, K), (N,))]


def _blocks(*widths: int) -> Shapes:
    """Weight, gamma and beta of each block."""
    return [shape for K, N in pairwise(widths) for shape in ((N, K), (N,), (N,))]


def _transformer(width: int, layers: int) -> Shapes:
    """Attention, feed-forward part and two normalisations a layer: 12 tensors, 12 width² parameters."""
    return layers * [*_linears(width, 3 * width), *_linears(width, width, 4 * width, width), *[(width,)] * 4]


PARAMETERS: dict[str, Shapes] = {
    "notes-mlp": _linears(784, 100, 100, 10),  # 6 tensors
    "mlp-60": _blocks(*[224] * 21),  # 60 tensors, 1.0 M parameters
    "barlow": _blocks(*WORKLOADS["barlow"].widths),  # 9 tensors, 151 M
    "transformer": _transformer(1080, 25),  # 300 tensors, 350 M
}
