"""An encoder and decoder of scVI's kind, CrossQ's critics, an autoencoder with a skip, a forward that branches."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import LINEAR_NORM_ACT, NORM_ACT, WHOLE, Inputs, Published, Run, indices, normal, under


class FullyConnected(nn.Module):
    """Covariates join each layer's input; a layer that is not asked for is None."""

    def __init__(self, K: int, N: int, covariates: int, layers: int, p: float, use_activation: bool = True) -> None:
        super().__init__()
        self.covariates = covariates
        widths = [K, *layers * [N]]
        self.fc_layers = nn.Sequential()
        for i in range(layers):
            entries: Any = (
                nn.Linear(widths[i] + covariates, widths[i + 1]),
                nn.BatchNorm1d(widths[i + 1], momentum=0.01, eps=0.001),
                None,
                nn.ReLU() if use_activation else None,
                nn.Dropout(p=p) if p > 0 else None,
            )
            self.fc_layers.add_module(f"Layer {i}", nn.Sequential(*entries))

    def forward(self, x: Tensor, category: Tensor) -> Tensor:
        one_hot = F.one_hot(category.squeeze(-1), self.covariates).to(x.dtype)
        layers: Any
        for layers in self.fc_layers:
            for layer in layers:
                if layer is None:
                    continue
                if isinstance(layer, nn.BatchNorm1d):
                    if x.dim() == 3:
                        x = torch.cat([layer(slice_x).unsqueeze(0) for slice_x in x], dim=0)
                    else:
                        x = layer(x)
                else:
                    if isinstance(layer, nn.Linear):
                        if x.dim() == 3:
                            covariates = one_hot.unsqueeze(0).expand((x.size(0), one_hot.size(0), one_hot.size(1)))
                        else:
                            covariates = one_hot
                        x = torch.cat((x, covariates), dim=-1)
                    x = layer(x)
        return x


class SingleCellVae(nn.Module):
    """The noise of the samples is an input, (batch, samples, latent)."""

    def __init__(self, genes: int = 23, hidden: int = 16, latent: int = 5, batches: int = 3) -> None:
        super().__init__()
        self.encoder = FullyConnected(genes, hidden, batches, layers=2, p=0.1)
        self.mean_encoder = nn.Linear(hidden, latent)
        self.var_encoder = nn.Linear(hidden, latent)
        self.decoder = FullyConnected(latent, hidden, batches, layers=1, p=0)
        self.scale_decoder = nn.Sequential(nn.Linear(hidden, genes), nn.Softmax(dim=-1))

    def forward(self, x: Tensor, category: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.encoder(torch.log1p(x.abs()), category)
        mean, variance = self.mean_encoder(q), torch.exp(self.var_encoder(q)) + 1e-4
        z = mean + variance.sqrt() * noise.transpose(0, 1)
        return mean, variance, self.scale_decoder(self.decoder(z, category)).transpose(0, 1)


class Critic(nn.Module):
    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.BatchNorm1d(features, momentum=0.01),
            nn.Linear(features, hidden, bias=False),
            nn.BatchNorm1d(hidden, momentum=0.01),
            nn.ReLU(),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden, momentum=0.01),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossQ(nn.Module):
    """Both batches pass the twin critics at once, so that their statistics are of both."""

    def __init__(self, observation: int = 8, action: int = 3, hidden: int = 15) -> None:
        super().__init__()
        self.critics = nn.ModuleList([Critic(observation + action, hidden) for _ in range(2)])

    def forward(self, obs: Tensor, action: Tensor, next_obs: Tensor, next_action: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([torch.cat([obs, next_obs], dim=0), torch.cat([action, next_action], dim=0)], dim=1)
        q = torch.cat([critic(joined) for critic in self.critics], dim=1)
        q, next_q = torch.chunk(q, 2, dim=0)
        return q, next_q.min(dim=1, keepdim=True)[0].detach()


class SkipAutoencoder(nn.Module):
    """The decoder adds what the encoder had before its BatchNorm."""

    def __init__(self, features: int = 12, hidden: int = 14, code: int = 5) -> None:
        super().__init__()
        self.enc1 = nn.Linear(features, hidden)
        self.enc_bn1 = nn.BatchNorm1d(hidden)
        self.enc2 = nn.Linear(hidden, code)
        self.dec1 = nn.Linear(code, hidden)
        self.dec_bn1 = nn.BatchNorm1d(hidden)
        self.dec2 = nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        before = self.enc1(x)
        code = torch.tanh(self.enc2(F.relu(self.enc_bn1(before))))
        x = self.dec_bn1(self.dec1(code)).relu()
        return self.dec2(x + before)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 22)
        self.bn1 = nn.BatchNorm1d(22)
        self.fc2 = nn.Linear(22, 9)
        self.fc3 = nn.Linear(22, 9)
        self.bn2 = nn.BatchNorm1d(9)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.fc1(x)))
        if x.mean() > 0:
            x = F.leaky_relu(self.fc2(x), 0.2)
        else:
            x = F.gelu(self.fc3(x))
        return self.bn2(x)


def cells(seed: int) -> Inputs:
    x, noise = normal((28, 23), (28, 2, 5))(seed)
    return x, indices(seed, 3, 28, 1), noise


MODELS = {
    "scVI": Published(
        SingleCellVae,
        cells,
        (
            Run(under("encoder.fc_layers.Layer 0", 0, 1, 3, 4), WHOLE),
            Run(under("encoder.fc_layers.Layer 1", 0, 1, 3, 4), WHOLE),
        ),
    ),
    "CrossQ": Published(
        CrossQ,
        normal((12, 8), (12, 3), (12, 8), (12, 3)),
        tuple(
            run
            for critic in ("critics.0.net", "critics.1.net")
            for run in (Run(under(critic, 1, 2, 3), LINEAR_NORM_ACT), Run(under(critic, 4, 5, 6), LINEAR_NORM_ACT))
        ),
    ),
    "autoencoder with a skip": Published(
        SkipAutoencoder,
        normal((27, 12)),
        (Run(("enc_bn1",), NORM_ACT), Run(("enc2",), ("Linear", "tanh")), Run(("dec1", "dec_bn1"), LINEAR_NORM_ACT)),
    ),
    "branching forward": Published(
        Branching,
        normal((19, 10)),
        (Run(("fc1", "bn1"), LINEAR_NORM_ACT), Run(("fc2",), ("Linear", "leaky_relu"))),
    ),
}
