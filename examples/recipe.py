"""What the examples train, each part by its name: data, model, initialisation, optimizers, learning-rate schedules."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

import fastnn

TRAIN, VALIDATION, TEST = 1257, 180, 360  # images: 70, 10 and 20 per cent of 1797
SIDE, CLASSES = 8, 10  # an image has 8 x 8 pixels
LIBRARIES = {"torch.nn": torch, "fastnn.nn": fastnn}  # nothing else differs between the two
Part = tuple[Tensor, Tensor]  # images (N, 64), float32, and labels (N,), int64


class Data(NamedTuple):
    train: Part
    validation: Part
    test: Part
    centre: Tensor  # (64,): what was subtracted from every image, in its units


ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
INITIALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "he-normal": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
    "he-uniform": lambda weight: nn.init.kaiming_uniform_(weight, nonlinearity="relu"),
    "glorot-normal": nn.init.xavier_normal_,
    "glorot-uniform": nn.init.xavier_uniform_,
}
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {  # the class, of the same name in both, and arguments that suit
    "sgd": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.03, "momentum": 0.9}),
    "nesterov": ("SGD", {"lr": 0.03, "momentum": 0.9, "nesterov": True}),
    "adagrad": ("Adagrad", {"lr": 0.01}),
    "rmsprop": ("RMSprop", {"lr": 1e-3}),
    "adam": ("Adam", {"lr": 1e-3}),
    "nadam": ("NAdam", {"lr": 1e-3}),
    "adamw": ("AdamW", {"lr": 1e-3}),
    "adadelta": ("Adadelta", {"lr": 1.0}),
}
# Of an optimizer, the number of epochs and the steps of one. Each steps after an epoch, OneCycleLR after a batch.
SCHEDULES: dict[str, Callable[[Optimizer, int, int], Any]] = {
    "constant": lambda optimizer, epochs, steps: lr_scheduler.ConstantLR(optimizer, factor=1),
    "exponential": lambda optimizer, epochs, steps: lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / epochs)),
    "multiplicative": lambda optimizer, epochs, steps: lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.95),
    "inverse": lambda optimizer, epochs, steps: lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + 0.1 * epoch)),
    "step": lambda optimizer, epochs, steps: lr_scheduler.StepLR(optimizer, max(1, epochs // 3), gamma=0.3),
    "cosine": lambda optimizer, epochs, steps: lr_scheduler.CosineAnnealingLR(optimizer, epochs),
    "onecycle": lambda optimizer, epochs, steps: lr_scheduler.OneCycleLR(
        optimizer,
        [float(group["lr"]) for group in optimizer.param_groups],
        total_steps=epochs * steps,
        cycle_momentum=False,  # a momentum is a number, and so a part of a CUDA graph
    ),
    "plateau": lambda optimizer, epochs, steps: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=3),
}


def load(seed: int, device: str = "cpu") -> Data:
    """Stratified training, validation and test parts, standardised by the training part's statistics.

    Each pixel has a mean of its own, all have one standard deviation: a pixel that is all but never lit would else be
    scaled up to whatever a shift moves there.
    """
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x, y, test_size=TEST, stratify=y, random_state=seed)
    x, x_val, y, y_val = train_test_split(x, y, test_size=VALIDATION, stratify=y, random_state=seed)
    scaler = StandardScaler(with_std=False).fit(x)
    scale = scaler.transform(x).std()
    parts = (x, y), (x_val, y_val), (x_test, y_test)
    tensors = ((torch.tensor(scaler.transform(a) / scale).float(), torch.tensor(b)) for a, b in parts)
    train, validation, test = ((a.to(device), b.to(device)) for a, b in tensors)
    return Data(train, validation, test, torch.tensor(scaler.mean_ / scale).float().to(device))


def augment(x: Tensor, centre: Tensor, noise: float, shift: int, generator: torch.Generator) -> Tensor:
    """Images (N, 64), each moved by up to `shift` pixels each way, with Gaussian noise of that standard deviation."""
    if shift:
        padded = nn.functional.pad((x + centre).view(-1, SIDE, SIDE), 4 * [shift])  # by 0, the background
        corners = torch.randint(2 * shift + 1, (2, len(x), 1), generator=generator)
        rows, columns = (corners + torch.arange(SIDE)).to(x.device)  # (N, 8) each
        images = torch.arange(len(x), device=x.device)
        x = padded[images[:, None, None], rows[:, :, None], columns[:, None, :]].flatten(1) - centre
    if noise:
        x = x + noise * torch.randn(x.shape, generator=generator).to(x.device)
    return x


def pyramid(width: int, depth: int) -> list[int]:
    """Widths of `depth` layers, each half of the one before: 256 and 3 give 256, 128, 64."""
    return [max(1, width >> i) for i in range(depth)]


def build(
    sequential: type[nn.Sequential],
    hidden: list[int],
    dropout: float,
    activation: str = "relu",
    initialisation: str = "he-normal",
) -> nn.Sequential:
    """Blocks of Linear, BatchNorm, activation and Dropout, and a Linear to the logits of ten classes."""
    layers: list[nn.Module] = []
    for n_in, n_out in zip([SIDE * SIDE, *hidden], hidden, strict=False):
        block = (
            nn.Linear(n_in, n_out, bias=False),
            nn.BatchNorm1d(n_out),
            ACTIVATIONS[activation](),
            nn.Dropout(dropout),
        )
        layers += block
    layers.append(nn.Linear(hidden[-1], CLASSES))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            INITIALISATIONS[initialisation](layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return sequential(*layers)


def make_optimizer(parameters: Iterable[Any], library: str, name: str, **changes: Any) -> Optimizer:
    """The one of that name in OPTIMIZERS from torch or fastnn; `changes` are keywords in place of its own."""
    class_name, settings = OPTIMIZERS[name]
    return getattr(LIBRARIES[library].optim, class_name)(parameters, **settings | changes)
