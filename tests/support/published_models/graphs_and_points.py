"""Graphs and point clouds: PointNet, GIN, DiffPool, MAG240M's MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import (
    CONV_NORM_ACT,
    LINEAR_ACT,
    LINEAR_NORM_ACT,
    NORM_ACT,
    WHOLE,
    Inputs,
    Published,
    Run,
    indices,
    normal,
    under,
)


class TNet(nn.Module):
    def __init__(self, k: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(k, 8, 1)
        self.conv2 = nn.Conv1d(8, 16, 1)
        self.fc1 = nn.Linear(16, 12)
        self.fc2 = nn.Linear(12, k * k)
        self.bn1 = nn.BatchNorm1d(8)
        self.bn2 = nn.BatchNorm1d(16)
        self.bn3 = nn.BatchNorm1d(12)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        batch = x.size()[0]
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = torch.max(x, 2, keepdim=True)[0]
        x = x.view(-1, 16)
        x = F.relu(self.bn3(self.fc1(x)))
        x = self.fc2(x)
        identity = torch.eye(self.k, dtype=x.dtype, device=x.device).flatten().view(1, -1).repeat(batch, 1)
        return (x + identity).view(-1, self.k, self.k)


class PointNet(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stn = TNet()
        self.conv1 = nn.Conv1d(3, 8, 1)
        self.conv2 = nn.Conv1d(8, 20, 1)
        self.bn1 = nn.BatchNorm1d(8)
        self.bn2 = nn.BatchNorm1d(20)
        self.fc1 = nn.Linear(20, 16)
        self.fc2 = nn.Linear(16, 11)
        self.fc3 = nn.Linear(11, classes)
        self.bn3 = nn.BatchNorm1d(16)
        self.bn4 = nn.BatchNorm1d(11)
        self.dropout = nn.Dropout(p=0.3)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        transform = self.stn(x)
        x = torch.bmm(x.transpose(2, 1), transform).transpose(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x = torch.max(x, 2, keepdim=True)[0]
        x = x.view(-1, 20)
        x = self.relu(self.bn3(self.fc1(x)))
        x = F.relu(self.bn4(self.dropout(self.fc2(x))))
        return F.log_softmax(self.fc3(x), dim=1), transform


class GinConv(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.BatchNorm1d(2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )
        self.eps = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        messages = F.relu(x[edge_index[:, 0]])
        aggregated = torch.zeros_like(x).index_add(0, edge_index[:, 1], messages)
        return self.mlp((1 + self.eps) * x + aggregated)


class Gin(nn.Module):
    def __init__(self, layers: int = 2, width: int = 11) -> None:
        super().__init__()
        self.layers = layers
        self.dropout = 0.5
        self.encoder = nn.Linear(6, width)
        self.convs = nn.ModuleList()
        self.batch_norms = nn.ModuleList()
        for _ in range(layers):
            self.convs.append(GinConv(width))
            self.batch_norms.append(nn.BatchNorm1d(width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        nodes = [self.encoder(x)]
        for layer in range(self.layers):
            h = self.convs[layer](nodes[layer], edge_index)
            h = self.batch_norms[layer](h)
            if layer == self.layers - 1:
                h = F.dropout(h, self.dropout, training=self.training)
            else:
                h = F.dropout(F.relu(h), self.dropout, training=self.training)
            nodes.append(h + nodes[layer])
        return self.head(nodes[-1])


class DenseConv(nn.Module):
    def __init__(self, K: int, N: int) -> None:
        super().__init__()
        self.lin_rel = nn.Linear(K, N, bias=False)
        self.lin_root = nn.Linear(K, N)

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        out = torch.matmul(adj, x) / adj.sum(dim=-1, keepdim=True).clamp(min=1)
        return self.lin_rel(out) + self.lin_root(x)


class DenseGnn(nn.Module):
    def __init__(self, K: int, hidden: int, N: int) -> None:
        super().__init__()
        self.conv1 = DenseConv(K, hidden)
        self.bn1 = nn.BatchNorm1d(hidden)
        self.conv2 = DenseConv(hidden, hidden)
        self.bn2 = nn.BatchNorm1d(hidden)
        self.lin = nn.Linear(2 * hidden, N)

    def bn(self, i: int, x: Tensor) -> Tensor:
        return getattr(self, f"bn{i}")(x.transpose(1, 2)).transpose(1, 2)

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        x1 = self.bn(1, self.conv1(x, adj).relu())
        x2 = self.bn(2, self.conv2(x1, adj)).relu()
        return self.lin(torch.cat([x1, x2], dim=-1)).relu()


class DiffPool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = DenseGnn(4, 7, 3)
        self.embed = DenseGnn(4, 7, 9)
        self.lin1 = nn.Linear(9, 13)
        self.lin2 = nn.Linear(13, 2)

    def forward(self, x: Tensor, adj: Tensor) -> tuple[Tensor, Tensor]:
        adj = (adj + adj.transpose(1, 2)).sigmoid()
        s = torch.softmax(self.pool(x, adj), dim=-1)
        x = torch.matmul(s.transpose(1, 2), self.embed(x, adj))
        x = self.lin1(x.mean(dim=1)).relu()
        return F.log_softmax(self.lin2(x), dim=-1), (-s * torch.log(s + 1e-15)).sum(dim=-1).mean()


class MagMlp(nn.Module):
    def __init__(self, features: int = 15, hidden: int = 16, classes: int = 6, layers: int = 3) -> None:
        super().__init__()
        self.lins = nn.ModuleList([nn.Linear(features, hidden)])
        self.bns = nn.ModuleList([nn.BatchNorm1d(hidden)])
        for _ in range(layers - 2):
            self.lins.append(nn.Linear(hidden, hidden))
            self.bns.append(nn.BatchNorm1d(hidden))
        self.lins.append(nn.Linear(hidden, classes))
        self.dropout = 0.5
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for lin in self.lins:
            lin.reset_parameters()  # type: ignore[operator]
        for bn in self.bns:
            bn.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        for lin, bn in zip(self.lins[:-1], self.bns):  # noqa: B905
            x = lin(x)
            x = bn(x)
            x = F.relu(x)
            x = F.dropout(x, p=self.dropout, training=self.training)
        return torch.log_softmax(self.lins[-1](x), dim=-1)


def graph(seed: int) -> Inputs:
    """Features of 30 nodes, and 30 edges of them."""
    return (*normal((30, 6))(seed), indices(seed, 30, 30, 2))


def renumbered(inputs: Inputs, order: Tensor) -> Inputs:
    x, edge_index = inputs
    return x[order], order.argsort()[edge_index][order]


MODELS = {
    "PointNet": Published(
        PointNet,
        normal((14, 3, 10)),
        (
            Run(("stn.conv1", "stn.bn1"), CONV_NORM_ACT),
            Run(("stn.conv2", "stn.bn2"), CONV_NORM_ACT),
            Run(("stn.fc1", "stn.bn3"), LINEAR_NORM_ACT),
            Run(("conv1", "bn1"), CONV_NORM_ACT),
            Run(("conv2", "bn2"), ("Conv1d", "BatchNorm1d")),
            Run(("fc1", "bn3", "relu"), LINEAR_NORM_ACT),
            Run(("fc2", "dropout"), ("Linear", "dropout")),
            Run(("bn4",), NORM_ACT),
        ),
    ),
    "GIN": Published(
        Gin,
        graph,
        (
            Run(under("convs.0.mlp", 0, 1, 2), LINEAR_NORM_ACT),
            Run(("convs.0.mlp.3", "batch_norms.0"), WHOLE),
            Run(under("convs.1.mlp", 0, 1, 2), LINEAR_NORM_ACT),
            Run(("convs.1.mlp.3", "batch_norms.1"), ("Linear", "BatchNorm1d", "dropout")),
        ),
        renumbered,
    ),
    "DiffPool": Published(
        DiffPool,
        normal((12, 6, 4), (12, 6, 6)),
        (
            Run(("pool.bn2",), NORM_ACT),
            Run(("pool.lin",), LINEAR_ACT),
            Run(("embed.bn2",), NORM_ACT),
            Run(("embed.lin",), LINEAR_ACT),
            Run(("lin1",), LINEAR_ACT),
        ),
    ),
    "MAG240M's MLP": Published(
        MagMlp, normal((48, 15)), (Run(("lins.0", "bns.0"), WHOLE), Run(("lins.1", "bns.1"), WHOLE))
    ),
}
