"""Projectors and predictors: SimSiam, Barlow Twins, a BYOL/MoCo head."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from .entry import LINEAR_ACT, LINEAR_NORM, LINEAR_NORM_ACT, Published, Run, normal, under


class SimSiam(nn.Module):
    def __init__(self, features: int = 14, width: int = 18, hidden: int = 7) -> None:
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(features, features, bias=False),
            nn.BatchNorm1d(features),
            nn.ReLU(inplace=True),
            nn.Linear(features, features, bias=False),
            nn.BatchNorm1d(features),
            nn.ReLU(inplace=True),
            nn.Linear(features, width),
            nn.BatchNorm1d(width, affine=False),
        )
        self.projector[6].bias.requires_grad = False  # of no effect before BatchNorm
        self.predictor = nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, width),
        )

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z1 = self.projector(x1)
        z2 = self.projector(x2)
        p1 = self.predictor(z1)
        p2 = self.predictor(z2)
        return p1, p2, z1.detach(), z2.detach()


class BarlowTwins(nn.Module):
    def __init__(self, spec: str = "16-24-24") -> None:
        super().__init__()
        sizes = [10, *map(int, spec.split("-"))]
        layers: list[nn.Module] = []
        for i in range(len(sizes) - 2):
            layers.append(nn.Linear(sizes[i], sizes[i + 1], bias=False))
            layers.append(nn.BatchNorm1d(sizes[i + 1]))
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Linear(sizes[-2], sizes[-1], bias=False))
        self.projector = nn.Sequential(*layers)
        self.bn = nn.BatchNorm1d(sizes[-1], affine=False)

    def forward(self, y1: Tensor, y2: Tensor) -> Tensor:
        z1, z2 = self.projector(y1), self.projector(y2)
        c = self.bn(z1).T @ self.bn(z2)
        c.div_(y1.shape[0])
        on_diagonal = torch.diagonal(c).add_(-1).pow_(2).sum()
        n = c.shape[0]
        off_diagonal = c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten().pow_(2).sum()
        return (on_diagonal + 0.0051 * off_diagonal) / n


class Block(nn.Module):
    def __init__(self, K: int, N: int, norm: type[nn.BatchNorm1d] | None, act: type[nn.Module] | None) -> None:
        super().__init__()
        self.linear = nn.Linear(K, N, bias=norm is None)
        self.norm = norm(N) if norm is not None else None
        self.act = act() if act is not None else nn.Identity()
        self.drop = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.norm is not None:
            x = self.norm(x)
        x = self.act(x)
        if self.drop is not None:
            x = self.drop(x)
        return x


class Byol(nn.Module):
    """An online branch with a predictor and a target branch without gradients."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), Block(12, 19, None, nn.ReLU), nn.Identity())
        self.projector = self.head((19, 23, width), last_norm=True)
        self.predictor = self.head((width, 21, width), last_norm=False)
        self.target = nn.Sequential(nn.Flatten(), Block(12, 19, None, nn.ReLU), self.head((19, 23, width), True))
        for parameter in self.target.parameters():
            parameter.requires_grad = False

    def head(self, widths: tuple[int, ...], last_norm: bool) -> nn.Sequential:
        blocks: list[nn.Module] = [
            nn.Sequential(Block(K, N, nn.BatchNorm1d, nn.ReLU)) for K, N in pairwise(widths[:-1])
        ]
        last = Block(widths[-2], widths[-1], nn.BatchNorm1d if last_norm else None, None)
        return nn.Sequential(*blocks, last)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        p = self.predictor(self.projector(self.encoder(x1)))
        with torch.no_grad():
            z = self.target(x2)
        return p, z


MODELS = {
    "SimSiam": Published(
        SimSiam,
        normal((21, 14), (21, 14)),
        2
        * (
            Run(under("projector", 0, 1, 2), LINEAR_NORM_ACT),
            Run(under("projector", 3, 4, 5), LINEAR_NORM_ACT),
            Run(under("projector", 6, 7), LINEAR_NORM),
        )
        + 2 * (Run(under("predictor", 0, 1, 2), LINEAR_NORM_ACT),),
    ),
    "Barlow Twins": Published(
        BarlowTwins,
        normal((25, 10), (25, 10)),
        2 * (Run(under("projector", 0, 1, 2), LINEAR_NORM_ACT), Run(under("projector", 3, 4, 5), LINEAR_NORM_ACT))
        + 2 * (Run(("projector.6", "bn"), LINEAR_NORM),),
    ),
    "BYOL": Published(
        Byol,
        normal((18, 3, 2, 2), (18, 3, 2, 2)),
        (
            Run(under("encoder.1", "linear", "act"), LINEAR_ACT),
            Run(under("projector.0.0", "linear", "norm", "act"), LINEAR_NORM_ACT),
            Run(under("projector.1", "linear", "norm"), LINEAR_NORM),
            Run(under("predictor.0.0", "linear", "norm", "act"), LINEAR_NORM_ACT),
            Run(under("target.1", "linear", "act"), LINEAR_ACT),
            Run(under("target.2.0.0", "linear", "norm", "act"), LINEAR_NORM_ACT),
            Run(under("target.2.1", "linear", "norm"), LINEAR_NORM),
        ),
    ),
}
