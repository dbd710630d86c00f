"""Tables and recommendations: ResNet, DLRM, DeepFM, DCN, TabNet, a course's DNN, BatchNorm after the activation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import (
    LINEAR_ACT,
    LINEAR_NORM,
    LINEAR_NORM_ACT,
    NORM_ACT,
    WHOLE,
    Inputs,
    Published,
    Run,
    indices,
    mlp,
    normal,
    under,
)  # fmt: skip


class ResidualBlock(nn.Module):
    def __init__(self, width: int, hidden: int, hidden_dropout: float, residual_dropout: float) -> None:
        super().__init__()
        self.normalization = nn.BatchNorm1d(width)
        self.linear_first = nn.Linear(width, hidden)
        self.activation = nn.ReLU()
        self.dropout_first = nn.Dropout(hidden_dropout)
        self.linear_second = nn.Linear(hidden, width)
        self.dropout_second = nn.Dropout(residual_dropout)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.normalization(x)
        x = self.linear_first(x)
        x = self.activation(x)
        x = self.dropout_first(x)
        x = self.linear_second(x)
        x = self.dropout_second(x)
        x += residual
        return x


class TabularResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first_layer = nn.Linear(11, 13)
        self.blocks = nn.ModuleList([ResidualBlock(13, 27, 0.25, 0.1) for _ in range(2)])
        self.head = nn.Sequential()
        self.head.add_module("normalization", nn.BatchNorm1d(13))
        self.head.add_module("activation", nn.ReLU())
        self.head.add_module("linear", nn.Linear(13, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_layer(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Dlrm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fields = 3
        for field in range(self.fields):
            setattr(self, f"embedding_{field}", nn.Embedding(17, 6))
        self.bottom = self.tower([7, 15, 6], sigmoid_at=-1)
        self.top = self.tower([6 + 6, 20, 1], sigmoid_at=1)

    def tower(self, widths: list[int], sigmoid_at: int) -> nn.Sequential:
        layers = nn.ModuleList()
        for i in range(len(widths) - 1):
            layers.append(nn.Linear(int(widths[i]), int(widths[i + 1]), bias=True))
            layers.append(nn.Sigmoid() if i == sigmoid_at else nn.ReLU())
        return nn.Sequential(*layers)

    def interact(self, dense: Tensor, sparse: list[Tensor]) -> Tensor:
        rows, width = dense.shape
        stacked = torch.cat([dense, *sparse], dim=1).view((rows, -1, width))
        products = torch.bmm(stacked, torch.transpose(stacked, 1, 2))
        _, number, _ = products.shape
        i = torch.tensor([i for i in range(number) for j in range(i)])
        j = torch.tensor([j for i in range(number) for j in range(i)])
        return torch.cat([dense, products[:, i, j]], dim=1)

    def forward(self, dense: Tensor, fields: Tensor) -> Tensor:
        x = self.bottom(dense)
        sparse = [getattr(self, f"embedding_{field}")(fields[:, field]) for field in range(self.fields)]
        return self.top(self.interact(x, sparse))


class DeepFactorizationMachine(nn.Module):
    def __init__(self, fields: tuple[int, ...] = (5, 9, 4), width: int = 5) -> None:
        super().__init__()
        self.offsets = [0, 5, 14]
        self.width = len(fields) * width
        self.linear = nn.Embedding(sum(fields), 1)
        self.bias = nn.Parameter(torch.zeros((1,)))
        self.embedding = nn.Embedding(sum(fields), width)
        layers: list[nn.Module] = []
        features = self.width
        for hidden in (16, 16):
            layers.append(nn.Linear(features, hidden))
            layers.append(nn.BatchNorm1d(hidden))
            layers.append(nn.ReLU())
            layers.append(nn.Dropout(p=0.2))
            features = hidden
        layers.append(nn.Linear(features, 1))
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = x + x.new_tensor(self.offsets).unsqueeze(0)
        embedded = self.embedding(x)
        square_of_sum = torch.sum(embedded, dim=1) ** 2
        sum_of_square = torch.sum(embedded**2, dim=1)
        interactions = 0.5 * torch.sum(square_of_sum - sum_of_square, dim=1, keepdim=True)
        first_order = torch.sum(self.linear(x), dim=1) + self.bias
        y = first_order + interactions + self.mlp(embedded.view(-1, self.width))
        return torch.sigmoid(y.squeeze(1))


class DeepCross(nn.Module):
    """DCN's cross network beside a deep tower, here with another activation in each layer."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.cross = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.deep = nn.Sequential()
        for i, name in enumerate(("GELU", "LeakyReLU", "SiLU", "ELU", "Tanh", "Softplus")):
            self.deep.add_module(f"fc{i}", nn.Linear(width, width + 1, bias=i % 2 == 0))
            if i % 3 != 2:
                self.deep.add_module(f"bn{i}", nn.BatchNorm1d(width + 1))
            self.deep.add_module(f"act{i}", getattr(nn, name)())
            if i < 2:
                self.deep.add_module(f"drop{i}", nn.Dropout(0.1))
            width += 1
        self.out = nn.Linear(12 + width, 1)

    def forward(self, x: Tensor) -> Tensor:
        crossed = x
        for layer in self.cross:
            crossed = x * layer(crossed) + crossed
        return torch.sigmoid(self.out(torch.cat([crossed, self.deep(x)], dim=-1)))


class GatedBlock(nn.Module):
    def __init__(self, fc: nn.Linear) -> None:
        super().__init__()
        self.fc = fc
        self.width = fc.out_features // 2
        self.bn = nn.BatchNorm1d(fc.out_features, momentum=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.fc(x))
        return torch.mul(x[:, : self.width], torch.sigmoid(x[:, self.width :]))


class TabNet(nn.Module):
    """Two steps of attention over features; their transformers share one Linear and have a BatchNorm each."""

    def __init__(self, features: int = 9, width: int = 7) -> None:
        super().__init__()
        self.initial_bn = nn.BatchNorm1d(features, momentum=0.01)
        shared = nn.Linear(features, 4 * width, bias=False)
        self.steps = nn.ModuleList([GatedBlock(shared) for _ in range(2)])
        self.attention = nn.Linear(width, features, bias=False)
        self.attention_bn = nn.BatchNorm1d(features)
        self.width = width
        self.final_mapping = nn.Linear(width, 2, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.initial_bn(x)
        prior = torch.ones_like(x)
        attended, total, entropy = x, torch.zeros_like(x[:, : self.width]), x.new_zeros(())
        for step in self.steps:
            decided, attention = step(attended).split(self.width, dim=1)
            total = total + F.relu(decided)
            mask = torch.softmax(self.attention_bn(self.attention(attention)) * prior, dim=-1)
            entropy = entropy + torch.mean(torch.sum(torch.mul(mask, torch.log(mask + 1e-5)), dim=1))
            prior = torch.mul(1.3 - mask, prior)
            attended = torch.mul(mask, x)
        return self.final_mapping(total), entropy


class CourseNet(nn.Module):
    """One Dropout for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(25, 17)
        self.bn1 = nn.BatchNorm1d(17)
        self.fc2 = nn.Linear(17, 15)
        self.bn2 = nn.BatchNorm1d(15)
        self.fc3 = nn.Linear(15, 10)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.size(0), -1)
        x = self.drop(F.relu(self.bn1(self.fc1(x))))
        x = self.drop(F.relu(self.bn2(self.fc2(x))))
        return F.log_softmax(self.fc3(x), dim=1)


def activation_first() -> nn.Module:
    layers: list[nn.Module] = []
    for K, N in ((9, 21), (21, 18)):
        layers += [nn.Linear(K, N), nn.ReLU(inplace=True), nn.BatchNorm1d(N), nn.Dropout(0.4)]
    return nn.Sequential(*layers, nn.Linear(18, 2))


def dlrm_inputs(seed: int) -> Inputs:
    return (*normal((32, 7))(seed), indices(seed, 17, 32, 3))


def deepfm_inputs(seed: int) -> Inputs:
    return (indices(seed, 4, 37, 3),)


MODELS = {
    "tabular ResNet": Published(
        TabularResNet,
        normal((33, 11)),
        (
            *(
                run
                for block in ("blocks.0", "blocks.1")
                for run in (
                    Run(under(block, "linear_first", "activation", "dropout_first"), ("Linear", "relu", "dropout")),
                    Run(under(block, "linear_second", "dropout_second"), ("Linear", "dropout")),
                )
            ),
            Run(under("head", "normalization", "activation"), NORM_ACT),
        ),
    ),
    "DLRM": Published(
        Dlrm,
        dlrm_inputs,
        (
            Run(under("bottom", 0, 1), LINEAR_ACT),
            Run(under("bottom", 2, 3), LINEAR_ACT),
            Run(under("top", 0, 1), LINEAR_ACT),
            Run(under("top", 2, 3), ("Linear", "sigmoid")),
        ),
    ),
    "DeepFM": Published(
        DeepFactorizationMachine,
        deepfm_inputs,
        (Run(under("mlp", 0, 1, 2, 3), WHOLE), Run(under("mlp", 4, 5, 6, 7), WHOLE)),
    ),
    "DCN": Published(
        DeepCross,
        normal((24, 12)),
        (
            Run(under("deep", "fc0", "bn0", "act0", "drop0"), ("Linear", "BatchNorm1d", "gelu", "dropout")),
            Run(under("deep", "fc1", "bn1", "act1", "drop1"), ("Linear", "BatchNorm1d", "leaky_relu", "dropout")),
            Run(under("deep", "fc2", "act2"), ("Linear", "silu")),
            Run(under("deep", "fc3", "bn3", "act3"), ("Linear", "BatchNorm1d", "elu")),
            Run(under("deep", "fc4", "bn4", "act4"), ("Linear", "BatchNorm1d", "tanh")),
            Run(under("deep", "fc5", "act5"), ("Linear", "softplus")),
            Run(("out",), ("Linear", "sigmoid")),
        ),
    ),
    "TabNet": Published(
        TabNet,
        normal((31, 9)),
        (
            Run(under("steps.0", "fc", "bn"), LINEAR_NORM),
            Run(("attention", "attention_bn"), LINEAR_NORM),
            Run(under("steps.1", "fc", "bn"), LINEAR_NORM),
            Run(("attention", "attention_bn"), LINEAR_NORM),
        ),
    ),
    "course DNN": Published(
        CourseNet, normal((20, 1, 5, 5)), (Run(("fc1", "bn1", "drop"), WHOLE), Run(("fc2", "bn2", "drop"), WHOLE))
    ),
    "BatchNorm after the activation": Published(
        activation_first,
        normal((29, 9)),
        (
            Run(("0", "1"), LINEAR_ACT),
            Run(("2", "3"), ("BatchNorm1d", "dropout")),
            Run(("4", "5"), LINEAR_ACT),
            Run(("6", "7"), ("BatchNorm1d", "dropout")),
        ),
    ),
    "plain MLP": Published(
        lambda: nn.Sequential(*mlp((13, 24, 17), bias=False), nn.Linear(17, 1)),
        normal((12, 13)),
        (Run(("0", "1", "2"), LINEAR_NORM_ACT), Run(("3", "4", "5"), LINEAR_NORM_ACT)),
    ),
}
