"""Train the MLP of a deep-learning course on scikit-learn's digits, with torch.nn and then with fastnn.

Both runs start from the same weights and see the same batches; only the library that Sequential and optimizer are from
differs. The weights of the epoch with the best validation accuracy are restored before the one look at the test part.
The curves go to digits.png. `--optimizer all` trains with every optimizer in turn: two rows and two panels for each.
`--graph` replays the whole step as one CUDA graph, where layers as small as these wait for the host.

    $ python examples/digits.py
    implementation   test accuracy %   test loss   median step ms   GPU kernels/step
    ────────────────────────────────────────────────────────────────────────────────
    torch.nn                   98.06      0.1323              ...                  -
    fastnn.nn                  98.06      0.1323              ...                  -
    Ran on cpu; fastnn's path there: eager (no kernels for cpu tensors)
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from statistics import mean, median
from types import ModuleType

import matplotlib.pyplot as plt
import torch
from rich import box, print
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.optim import Optimizer

import fastnn
from fastnn import dispatch

TRAIN, VALIDATION, TEST = 1257, 180, 360  # images: 70, 10 and 20 per cent of 1797
LIBRARIES = {"torch.nn": torch, "fastnn.nn": fastnn}
OPTIMIZERS: dict[str, tuple[str, dict]] = {  # the class, of the same name in both, and arguments that suit the digits
    "sgd": ("SGD", {"lr": 0.03, "momentum": 0.9, "nesterov": True}),
    "adam": ("Adam", {"lr": 1e-3}),
    "adamw": ("AdamW", {"lr": 1e-3}),
    "nadam": ("NAdam", {"lr": 1e-3}),
    "rmsprop": ("RMSprop", {"lr": 1e-3}),
    "adagrad": ("Adagrad", {"lr": 0.01}),
    "adadelta": ("Adadelta", {"lr": 1.0}),
}
WARM_UP = 3  # steps before a capture: kernels are loaded in them, and the optimizer's state is made
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


def prepare(library: ModuleType, name: str, args: argparse.Namespace) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(args.seed)  # the initial weights, for every run the same
    model = build(library.nn.Sequential, args.hidden, args.dropout).to(args.device)
    class_name, settings = OPTIMIZERS[name]
    if "lr" in args:
        settings = settings | {"lr": args.lr}
    if args.graph:  # steps counted on the GPU, and a rate that a schedule can still change: a number is part of a graph
        on_gpu = "fused" if class_name in ("SGD", "Adagrad") else "capturable"  # these two have no such flag
        settings = settings | {"lr": torch.tensor(settings["lr"], device=args.device), on_gpu: True}
    return model, getattr(library.optim, class_name)(model.parameters(), **settings)


def graphed(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The step as one CUDA graph, captured at the fourth call; its result is overwritten by the next replay's.

    The calls before are the warm-up that a capture needs, on a side stream. They train as the step alone would, and a
    capture computes nothing, so that nothing has to be put back and every batch counts once.
    """
    warnings.filterwarnings("ignore", ".* running without .* graph capture")  # torch's optimizers, of the warm-up

    def results() -> Iterator[torch.Tensor]:
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        for _ in range(WARM_UP):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                result = step()
            torch.cuda.current_stream().wait_stream(side)
            yield result
        with torch.cuda.graph(graph):
            result = step()
        while True:
            graph.replay()
            yield result

    return results().__next__


def train(model: nn.Module, optimizer: Optimizer, parts: list[Part], args: argparse.Namespace, label: str) -> Run:
    (x, y), validation, test = parts
    torch.manual_seed(args.seed)  # the dropout masks
    shuffle = torch.Generator().manual_seed(args.seed)  # the order of the batches

    rows = torch.zeros(args.batch_size, dtype=torch.int64, device=x.device)  # of the batch, where a graph reads them

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        return loss.detach()

    run = graphed(step) if args.graph else step

    def timed_step(batch: torch.Tensor) -> tuple[float, float]:
        start = time.perf_counter()
        rows.copy_(batch)
        return run().item(), 1000 * (time.perf_counter() - start)  # item() waits for the whole step on a GPU

    losses, accuracies, times, best = [], [], [], (-1.0, 0.0)
    for _ in track(range(args.epochs), label):
        model.train()
        batches = torch.randperm(TRAIN, generator=shuffle).to(x.device).split(args.batch_size)
        steps = [timed_step(batch) for batch in batches if len(batch) == args.batch_size]  # the last may be incomplete
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
            timed_step(batches[0])
        events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = str(sum(not e.is_user_annotation and not e.name.startswith(("Memcpy", "Memset")) for e in events))
    return losses, accuracies, [f"{accuracy:.2f}", f"{loss:.4f}", f"{median(times):.3f}", kernels]


def draw(runs: dict[tuple[str, str], Run], args: argparse.Namespace) -> None:
    plt.switch_backend("Agg")
    figure = plt.figure(figsize=(11, 2.2 + 2.2 * len(args.optimizer)), layout="constrained")
    rows = figure.subplots(len(args.optimizer), 2, sharex=True, sharey="col", squeeze=False)
    figure.suptitle(f"MLP on scikit-learn's digits, trained with torch.nn and with fastnn.nn on {args.device}")
    epochs = range(1, args.epochs + 1)
    for name, axes in zip(args.optimizer, rows, strict=True):
        axes[0].set(title=f"Training loss, {name}", ylabel="mean cross-entropy (nats)", yscale="log")
        axes[1].set(title=f"Validation accuracy, {name}", ylabel="accuracy (%)")
        plain, fused = (runs[name, implementation] for implementation in LIBRARIES)
        for i, ax in enumerate(axes):
            ax.plot(epochs, plain[i], "o-", color="tab:orange", lw=4, alpha=0.5, label="torch.nn")
            ax.plot(epochs, fused[i], ".--", color="tab:blue", label="fastnn.nn")  # on a CPU over the other
            ax.set(xticks=range(0, args.epochs + 1, max(1, args.epochs // 8)))
            ax.grid(alpha=0.3)
            ax.legend(loc=("upper right", "lower right")[i])
    for ax in rows[-1]:
        ax.set(xlabel="epoch")
    figure.savefig(args.figure, dpi=150)


def parse_arguments() -> argparse.Namespace:
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    devices = ["cuda", *gpus, "cpu"] if gpus else ["cpu"]
    style, usage = argparse.ArgumentDefaultsHelpFormatter, argparse.SUPPRESS  # without a usage an error is one line
    parser = argparse.ArgumentParser(usage=usage, description=(__doc__ or "").split("\n")[0], formatter_class=style)
    add = parser.add_argument
    names = [*OPTIMIZERS, "all"]
    add("--optimizer", nargs="+", choices=names, default=["adam"], metavar="NAME", help=", ".join(names))
    add("--epochs", type=int, default=40, help="passes over the training part")
    add("--batch-size", type=int, default=64, help="images per step")
    add("--hidden", type=int, nargs="+", default=[256, 128], metavar="WIDTH", help="widths of the blocks")
    add("--dropout", type=float, default=0.3, help="probability of dropping a value")
    add("--lr", type=float, default=argparse.SUPPRESS, help="learning rate (default: the optimizer's own)")
    add("--seed", type=int, default=0, help="of the split, the weights, the batches and the dropout")
    add("--device", choices=devices, default=devices[0], help="where both train")
    add("--graph", action="store_true", help="replay each step as one CUDA graph")
    add("--figure", default="digits.png", metavar="PATH", help="where the curves go: .png, .pdf or .svg")
    args = parser.parse_args()
    for argument, right, meaning in (
        ("--epochs", args.epochs >= 1, "at least 1"),
        ("--batch-size", 2 <= args.batch_size <= TRAIN, f"from 2 to {TRAIN}"),
        ("--hidden", min(args.hidden) >= 1, "at least 1"),
        ("--dropout", 0 <= args.dropout <= 1, "from 0 to 1"),
        ("--lr", 0 < getattr(args, "lr", 1) < float("inf"), "positive and finite"),
        ("--seed", 0 <= args.seed < 2**32, "from 0 to 2**32 - 1"),
        ("--figure", args.figure.endswith((".png", ".pdf", ".svg")), "a .png, .pdf or .svg"),
    ):
        if not right:
            parser.error(f"argument {argument}: must be {meaning}")
    if args.graph and args.device == "cpu":
        parser.error("argument --graph: needs a CUDA GPU")
    try:
        open(args.figure, "ab").close()
    except OSError as error:
        parser.error(f"argument --figure: cannot write {args.figure}: {error.strerror}")
    args.optimizer = list(OPTIMIZERS if "all" in args.optimizer else dict.fromkeys(args.optimizer))
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)  # layers this small gain nothing from more, and on a busy CPU lose by it
    parts = load(args.seed, args.device)
    if args.graph:
        torch.cuda.set_device(parts[0][0].device)  # where streams and graphs are made
    runs = {}
    for name in args.optimizer:
        for implementation, library in LIBRARIES.items():
            model, optimizer = prepare(library, name, args)
            runs[name, implementation] = train(model, optimizer, parts, args, f"{name:8} {implementation:9}")
    several = len(args.optimizer) > 1
    table = Table(*["optimizer"] * several, box=box.SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("implementation", no_wrap=True)
    for heading in ("test accuracy %", "test loss", "median step ms", "GPU kernels/step"):
        table.add_column(heading, justify="right")
    for (name, implementation), (_, _, row) in runs.items():
        table.add_row(*[name] * several, implementation, *row)
    print(table)
    draw(runs, args)
    path = dispatch.device_path(torch.device(args.device))
    steps = ", each step one CUDA graph" * args.graph
    print(f"Ran on {args.device}{steps}; fastnn's path there: {path.name}" + f" ({path.reason})" * path.eager)


if __name__ == "__main__":
    main()
