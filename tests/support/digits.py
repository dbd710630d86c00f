"""scikit-learn's digits, an MLP of torch's parts or with fastnn's in their place, and what a plain loop launches."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastnn
from support.launched import kernels_launched

OURS = ("fastnn", "fuse")  # a Sequential of fastnn's, and torch's in a model after fastnn.fuse; both with fastnn.optim
BATCH = 32


class Setting(NamedTuple):
    """Of a path: rows to train on and to validate, dropout, and how far the results may be from torch's."""

    train: int
    validation: int
    dropout: float
    tolerance: float


# On the eager path the masks are torch's own and every result is equal to the bit. The kernels draw other masks, and
# differ by orders of summation: a few roundings a step, of values around 1.
SETTINGS = {"eager": Setting(256, 128, 0.3, 0.0), "kernels": Setting(128, 32, 0.0, 2e-5)}  # found: 1.6e-6


class Net(nn.Module):
    """parts: "torch", or one of OURS."""

    def __init__(self, parts: str, dropout: float, hidden: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        # No bias before BatchNorm: its gradient is exactly zero here, and in eager rounding that Adam makes steps of.
        block = [nn.Linear(64, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout)]
        sequential = fastnn.nn.Sequential if parts == "fastnn" else nn.Sequential
        self.layers = sequential(*block, nn.Linear(hidden, 10))
        if parts == "fuse":
            fastnn.fuse(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def optimizer_class(parts: str, name: str) -> Any:
    return getattr(torch.optim if parts == "torch" else fastnn.optim, name)


def rows(path: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (M, 64) in [0, 1] and labels (M,), to train on and to validate."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    train, validation = SETTINGS[path].train, SETTINGS[path].train + SETTINGS[path].validation
    return (x[:train], y[:train]), (x[train:validation], y[train:validation])


def assert_same(path: str, found: Any, expected: Any, dtype: torch.dtype | None = None) -> None:
    """Numbers, tensors or collections of them are equal as SETTINGS say; dtype: of autocast.

    The kernels round to it elsewhere than torch's ops do: once it is that much more.
    """
    tolerance = SETTINGS[path].tolerance
    if dtype is not None and path == "kernels":
        tolerance += torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """Kernels launched within, by name; complete at its end."""
    found: Counter[str] = Counter()
    with kernels_launched() as names:
        yield found
    found.update(names)


def of_plain_training(
    parts: str, name: str, batches: int, steps: int, dtype: torch.dtype | None = None
) -> Counter[str]:
    """What a plain loop of PyTorch launches, with one of OURS and that optimizer, under autocast to dtype."""
    (x, y), _ = rows("kernels")
    model = Net(parts, SETTINGS["kernels"].dropout)
    optimizer = optimizer_class(parts, name)(model.parameters(), lr=0.1)
    with launches() as found:
        with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(model(x[:BATCH]), y[:BATCH])
        loss.backward()
        optimizer.step()
    assert found.pop("step_kernel") == 1
    assert found.total() >= 3  # of the forward, and two of the backward
    return Counter({kernel: batches * count for kernel, count in found.items()} | {"step_kernel": steps})


def of_plain_predictions(parts: str, batches: Iterable[Tensor]) -> Counter[str]:
    """What a plain loop launches that predicts these, with one of OURS."""
    model = Net(parts, SETTINGS["kernels"].dropout).eval()
    with torch.no_grad(), launches() as found:
        for x in batches:
            model(x)
    assert found
    return found
