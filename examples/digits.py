"""Train the MLP of a deep-learning course on scikit-learn's digits, with torch.nn and then with fastnn.

Blocks of Linear(bias=False) -> BatchNorm1d -> ReLU -> Dropout, then an output Linear. Both runs start from the
same weights and see the same batches; only the Sequential differs: nn.Sequential or fastnn.nn.Sequential. The
weights of the epoch with the best validation accuracy are restored before the one look at the test part.

    python examples/digits.py

shows a progress bar, then a table with a row for each (test accuracy and loss, median time of a training step,
kernel launches of one on a GPU), and saves the curves of training loss and validation accuracy as digits.png.
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn.functional import cross_entropy

import fastnn
from fastnn import dispatch

TRAIN, VALIDATION, TEST = 1257, 180, 360  # images: 70, 10 and 20 per cent of 1797
Part = tuple[torch.Tensor, torch.Tensor]


class Run(NamedTuple):
    loss: list[float]  # of training, one value an epoch
    accuracy: list[float]  # of validation, one value an epoch
    best_epoch: int
    row: list[str]  # of the table


def load(seed: int, device: torch.device) -> list[Part]:
    """Stratified training, validation and test parts, standardised by the training part's statistics."""
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x, y, test_size=TEST, stratify=y, random_state=seed)
    x, x_val, y, y_val = train_test_split(x, y, test_size=VALIDATION, stratify=y, random_state=seed)
    scaler = StandardScaler().fit(x)
    images = [torch.tensor(scaler.transform(part)).float().to(device) for part in (x, x_val, x_test)]
    labels = [torch.tensor(part).to(device) for part in (y, y_val, y_test)]
    return list(zip(images, labels, strict=True))


def build(sequential: type[nn.Sequential], hidden: list[int], dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in zip([64, *hidden], hidden, strict=False):
        layers += [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.ReLU(), nn.Dropout(dropout)]
    layers.append(nn.Linear(hidden[-1], 10))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return sequential(*layers)


@torch.no_grad()
def evaluate(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    logits = model.eval()(x)
    return (logits.argmax(1) == y).float().mean().item(), cross_entropy(logits, y).item()


def count_launches(step: Callable[[], object]) -> int:
    """Kernels the GPU runs in one step: forward, backward and optimizer, without copies and fills."""
    with torch.profiler.profile() as profile:
        step()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.is_user_annotation and not e.name.startswith(("Memcpy", "Memset")) for e in events)


def train(model: nn.Module, parts: list[Part], args: argparse.Namespace, tick: Callable[[], object]) -> Run:
    (x, y), validation, test = parts
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    on_gpu = x.device.type == "cuda"
    torch.manual_seed(args.seed)  # the dropout masks
    shuffle = torch.Generator().manual_seed(args.seed)  # the order of the batches

    def step(batch: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        return loss.detach()

    def timed(batch: torch.Tensor) -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        loss = step(batch)
        if on_gpu:
            torch.cuda.synchronize(x.device)
        return loss, 1000 * (time.perf_counter() - start)

    losses, accuracies, times, best = [], [], [], (-1.0, 0.0)
    for epoch in range(1, args.epochs + 1):
        model.train()
        batches = torch.randperm(TRAIN, generator=shuffle).to(x.device).split(args.batch_size)
        steps = [timed(batch) for batch in batches if len(batch) == args.batch_size]  # not the incomplete last
        losses.append(torch.stack([loss for loss, _ in steps]).mean().item())
        times += [ms for _, ms in steps]
        accuracy, loss = evaluate(model, *validation)
        accuracies.append(accuracy)
        if (accuracy, -loss) > best:  # of equal accuracies, the lower loss
            best, best_epoch, weights = (accuracy, -loss), epoch, copy.deepcopy(model.state_dict())
        tick()
    model.load_state_dict(weights)
    accuracy, loss = evaluate(model, *test)
    model.train()
    launches = str(count_launches(lambda: step(batches[0]))) if on_gpu else "-"
    row = [f"{100 * accuracy:.2f}", f"{loss:.4f}", f"{statistics.median(times):.3f}", launches]
    return Run(losses, accuracies, best_epoch, row)


def draw(runs: dict[str, Run], device: torch.device, path: Path) -> None:
    plt.switch_backend("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    figure.suptitle(f"MLP on scikit-learn's digits, trained with torch.nn and with fastnn.nn on {device}")
    styles = ({"color": "tab:orange", "lw": 4, "alpha": 0.6}, {"color": "tab:blue", "lw": 1.5, "ls": "--"})
    for (name, run), style in zip(runs.items(), styles, strict=True):  # dashed over plain where they coincide
        epochs, marker = range(1, len(run.loss) + 1), "o" if len(run.loss) == 1 else ""
        left.plot(epochs, run.loss, marker=marker, label=name, **style)
        label = f"{name} (best: epoch {run.best_epoch})"
        right.plot(epochs, [100 * a for a in run.accuracy], marker=marker, label=label, **style)
    left.set(title="Training loss", xlabel="epoch", ylabel="mean cross-entropy (nats)", yscale="log")
    right.set(title="Validation accuracy", xlabel="epoch", ylabel="accuracy (%)")
    for axes in (left, right):
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], formatter_class=style)
    add = parser.add_argument
    add("--epochs", type=int, default=40, help="passes over the training part")
    add("--batch-size", type=int, default=64, help="images per step")
    add("--hidden", type=int, nargs="+", default=[256, 128], metavar="WIDTH", help="widths of the blocks")
    add("--dropout", type=float, default=0.3, help="probability of dropping a value")
    add("--lr", type=float, default=1e-3, help="Adam's learning rate")
    add("--seed", type=int, default=0, help="of the split, the weights, the batches and the dropout")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--figure", type=Path, default=Path("digits.png"), help="where the curves go: .png, .pdf or .svg")
    args = parser.parse_args()
    wrong = {
        "--epochs: must be at least 1": args.epochs < 1,
        f"--batch-size: must be from 2 to {TRAIN}": not 2 <= args.batch_size <= TRAIN,
        "--hidden: widths must be at least 1": min(args.hidden) < 1,
        "--dropout: must be from 0 to 1": not 0 <= args.dropout <= 1,
        "--lr: must be positive and finite": not 0 < args.lr < math.inf,
        "--seed: must be from 0 to 2**32 - 1": not 0 <= args.seed < 2**32,
        "--device: must be cpu, cuda or cuda:N": args.device.split(":")[0] not in ("cpu", "cuda"),
        "--figure: must end in .png, .pdf or .svg": args.figure.suffix not in (".png", ".pdf", ".svg"),
    }
    for message in (message for message, is_wrong in wrong.items() if is_wrong):
        parser.error(f"argument {message}")
    try:
        torch.zeros(1, device=args.device)
        args.device = torch.device(args.device)
    except (RuntimeError, AssertionError):
        parser.error(f"argument --device: {args.device} is not available here")
    try:
        args.figure.open("ab").close()
    except OSError as error:
        parser.error(f"argument --figure: cannot write {args.figure}: {error.strerror}")
    return args


def main() -> None:
    args = parse_arguments()
    parts = load(args.seed, args.device)
    torch.manual_seed(args.seed)  # the initial weights
    models = {
        "torch.nn": build(nn.Sequential, args.hidden, args.dropout).to(args.device),
        "fastnn.nn": build(fastnn.nn.Sequential, args.hidden, args.dropout).to(args.device),
    }
    models["fastnn.nn"].load_state_dict(models["torch.nn"].state_dict())
    console = Console()
    with Progress(console=console) as progress:
        tasks = {name: progress.add_task(name, total=args.epochs) for name in models}
        runs = {name: train(m, parts, args, partial(progress.advance, tasks[name])) for name, m in models.items()}
    table = Table("implementation", caption="tested with the weights of the best validation accuracy")
    for heading in ("test accuracy\n(%)", "test loss\n(nats)", "median step\n(ms)", "kernel launches\nper step"):
        table.add_column(heading, justify="right")
    for name, run in runs.items():
        table.add_row(name, *run.row)
    console.print(table)
    draw(runs, args.device, args.figure)
    if args.device.type == "cpu":
        console.print("Kernel launches are counted on a GPU only.")
    console.print(f"Curves: {args.figure}")
    path = dispatch.device_path(args.device)
    console.print(f"Ran on {args.device}; fastnn's path there: {path.name}" + f" ({path.reason})" * path.eager)


if __name__ == "__main__":
    main()
