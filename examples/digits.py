"""Train the MLP of a deep-learning course on scikit-learn's digits, with torch.nn and then with fastnn.

Both runs start from the same weights and see the same batches; only the Sequential differs. The weights of the epoch
with the best validation accuracy are restored before the one look at the test part. The curves go to digits.png.

    $ python examples/digits.py
    implementation   test accuracy %   test loss   median step ms   GPU kernels/step
    ────────────────────────────────────────────────────────────────────────────────
    torch.nn                   98.06      0.1323              ...                  -
    fastnn.nn                  98.06      0.1323              ...                  -
    Ran on cpu; fastnn's path there: eager (no kernels for cpu tensors)
"""

import argparse
import time
from statistics import mean, median

import matplotlib.pyplot as plt
import torch
from rich import box, print
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn

import fastnn
from fastnn import dispatch

TRAIN, VALIDATION, TEST = 1257, 180, 360  # images: 70, 10 and 20 per cent of 1797
Part = tuple[torch.Tensor, torch.Tensor]
Run = tuple[list[float], list[float], list[str]]  # every epoch's training loss and validation accuracy; the table's row


def load(seed: int, device: str) -> list[Part]:
    """Stratified training, validation and test parts, standardised by the training part's statistics."""
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x, y, test_size=TEST, stratify=y, random_state=seed)
    x, x_val, y, y_val = train_test_split(x, y, test_size=VALIDATION, stratify=y, random_state=seed)
    scale = StandardScaler().fit(x).transform
    parts = (scale(x), y), (scale(x_val), y_val), (scale(x_test), y_test)
    return [(torch.tensor(a).float().to(device), torch.tensor(b).to(device)) for a, b in parts]


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
    return 100 * (logits.argmax(1) == y).float().mean().item(), nn.functional.cross_entropy(logits, y).item()


def train(model: nn.Module, parts: list[Part], args: argparse.Namespace, name: str) -> Run:
    (x, y), validation, test = parts
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    torch.manual_seed(args.seed)  # the dropout masks
    shuffle = torch.Generator().manual_seed(args.seed)  # the order of the batches

    def step(batch: torch.Tensor) -> tuple[float, float]:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        return loss.item(), 1000 * (time.perf_counter() - start)  # item() waits for the whole step on a GPU

    losses, accuracies, times, best = [], [], [], (-1.0, 0.0)
    for _ in track(range(args.epochs), f"{name:9}"):
        model.train()
        batches = torch.randperm(TRAIN, generator=shuffle).to(x.device).split(args.batch_size)
        steps = [step(batch) for batch in batches if len(batch) == args.batch_size]  # the last may be incomplete
        losses.append(mean(loss for loss, _ in steps))
        times += [milliseconds for _, milliseconds in steps]
        accuracy, loss = evaluate(model, *validation)
        accuracies.append(accuracy)
        if (accuracy, -loss) > best:  # of equal accuracies, the lower loss
            best, weights = (accuracy, -loss), {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(weights)
    accuracy, loss = evaluate(model, *test)
    model.train()
    kernels = "-"
    if x.is_cuda:  # what the GPU runs in a forward, backward and update, without copies and fills
        with torch.profiler.profile() as profile:
            step(batches[0])
        events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = str(sum(not e.is_user_annotation and not e.name.startswith(("Memcpy", "Memset")) for e in events))
    return losses, accuracies, [f"{accuracy:.2f}", f"{loss:.4f}", f"{median(times):.3f}", kernels]


def draw(runs: dict[str, Run], args: argparse.Namespace) -> None:
    plt.switch_backend("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    figure.suptitle(f"MLP on scikit-learn's digits, trained with torch.nn and with fastnn.nn on {args.device}")
    axes[0].set(title="Training loss", ylabel="mean cross-entropy (nats)", yscale="log")
    axes[1].set(title="Validation accuracy", ylabel="accuracy (%)")
    epochs = range(1, args.epochs + 1)
    for i, ax in enumerate(axes):
        ax.plot(epochs, runs["torch.nn"][i], "o-", color="tab:orange", lw=4, alpha=0.5, label="torch.nn")
        ax.plot(epochs, runs["fastnn.nn"][i], ".--", color="tab:blue", label="fastnn.nn")  # on a CPU over the other
        ax.set(xlabel="epoch", xticks=range(0, args.epochs + 1, max(1, args.epochs // 8)))
        ax.grid(alpha=0.3)
        ax.legend(loc=("upper right", "lower right")[i])
    figure.savefig(args.figure, dpi=150)


def parse_arguments() -> argparse.Namespace:
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    devices = ["cuda", *gpus, "cpu"] if gpus else ["cpu"]
    style, usage = argparse.ArgumentDefaultsHelpFormatter, argparse.SUPPRESS  # without a usage an error is one line
    parser = argparse.ArgumentParser(usage=usage, description=(__doc__ or "").split("\n")[0], formatter_class=style)
    add = parser.add_argument
    add("--epochs", type=int, default=40, help="passes over the training part")
    add("--batch-size", type=int, default=64, help="images per step")
    add("--hidden", type=int, nargs="+", default=[256, 128], metavar="WIDTH", help="widths of the blocks")
    add("--dropout", type=float, default=0.3, help="probability of dropping a value")
    add("--lr", type=float, default=1e-3, help="Adam's learning rate")
    add("--seed", type=int, default=0, help="of the split, the weights, the batches and the dropout")
    add("--device", choices=devices, default=devices[0], help="where both train")
    add("--figure", default="digits.png", metavar="PATH", help="where the curves go: .png, .pdf or .svg")
    args = parser.parse_args()
    for argument, right, meaning in (
        ("--epochs", args.epochs >= 1, "at least 1"),
        ("--batch-size", 2 <= args.batch_size <= TRAIN, f"from 2 to {TRAIN}"),
        ("--hidden", min(args.hidden) >= 1, "at least 1"),
        ("--dropout", 0 <= args.dropout <= 1, "from 0 to 1"),
        ("--lr", 0 < args.lr < float("inf"), "positive and finite"),
        ("--seed", 0 <= args.seed < 2**32, "from 0 to 2**32 - 1"),
        ("--figure", args.figure.endswith((".png", ".pdf", ".svg")), "a .png, .pdf or .svg"),
    ):
        if not right:
            parser.error(f"argument {argument}: must be {meaning}")
    try:
        open(args.figure, "ab").close()
    except OSError as error:
        parser.error(f"argument --figure: cannot write {args.figure}: {error.strerror}")
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)  # layers this small gain nothing from more, and on a busy CPU lose by it
    parts = load(args.seed, args.device)
    torch.manual_seed(args.seed)  # the initial weights
    plain = build(nn.Sequential, args.hidden, args.dropout).to(args.device)
    fused = build(fastnn.nn.Sequential, args.hidden, args.dropout).to(args.device)
    fused.load_state_dict(plain.state_dict())
    runs = {name: train(model, parts, args, name) for name, model in (("torch.nn", plain), ("fastnn.nn", fused))}
    table = Table("implementation", box=box.SIMPLE, show_edge=False, pad_edge=False)
    for heading in ("test accuracy %", "test loss", "median step ms", "GPU kernels/step"):
        table.add_column(heading, justify="right")
    for name, (_, _, row) in runs.items():
        table.add_row(name, *row)
    print(table)
    draw(runs, args)
    path = dispatch.device_path(torch.device(args.device))
    print(f"Ran on {args.device}; fastnn's path there: {path.name}" + f" ({path.reason})" * path.eager)


if __name__ == "__main__":
    main()
