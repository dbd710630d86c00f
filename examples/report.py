"""What the examples show: progress, TensorBoard's files, a table of the runs, their curves and confusion matrices."""

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import rich.progress
from matplotlib.figure import Figure
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.metrics import ConfusionMatrixDisplay

STYLE: Any = {  # SVG with text as text, the same bytes from the same numbers
    "svg.fonttype": "none", "svg.hashsalt": "fastnn", "font.size": 9, "axes.titlesize": 9,
    "axes.axisbelow": True, "savefig.facecolor": "white",
}  # fmt: skip
LOOKS: dict[str, dict[str, Any]] = {  # on a CPU the second lies over the first
    "torch.nn": {"marker": "o", "ls": "-", "color": "tab:orange", "lw": 4, "alpha": 0.5},
    "fastnn.nn": {"marker": ".", "ls": "--", "color": "tab:blue"},
}
# Of the table: F1 is the classes' mean, ms the median of the steps', kernels what a GPU runs in a step.
HEADINGS = ("test accuracy %", "test loss", "F1 %", "epochs", "step ms", "kernels")


class Progress:
    """A bar of the epochs with the last one's figures; used in `with`."""

    def __init__(self, run: Any, name: str) -> None:
        columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "{task.fields[seen]}"
        self.run, self.bar = run, rich.progress.Progress(*columns)
        self.task = self.bar.add_task(f"{name:18}", total=run.args.epochs, completed=run.epochs, seen="")

    def show(self) -> None:
        loss, accuracy, lr = (self.run.history[key][-1] for key in ("loss", "accuracy", "lr"))
        seen = f"loss {loss:.4f}, validation {accuracy:.2f} %, lr {lr:.1e}"
        self.bar.update(self.task, completed=self.run.epochs, seen=seen)

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


class Monitor:
    """TensorBoard's files in a folder for each run, or nothing without `--log`; used in `with`."""

    def __init__(self, run: Any, name: str) -> None:
        self.run, self.writer = run, None
        if run.args.log:
            from torch.utils.tensorboard import SummaryWriter  # not needed without --log

            self.writer = SummaryWriter(run.args.log / name.replace(" ", "-"), purge_step=run.epochs + 1)

    def write(self) -> None:
        if self.writer:
            for key in ("loss", "accuracy", "validation loss", "lr"):
                self.writer.add_scalar(key.replace(" ", "/"), self.run.history[key][-1], self.run.epochs)
            for name, parameter in self.run.model.named_parameters():
                self.writer.add_histogram(f"{name}/value", parameter, self.run.epochs)
                self.writer.add_histogram(f"{name}/gradient", parameter.grad, self.run.epochs)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer:
            self.writer.close()


def new_figure(title: str, width: float, height: float) -> Figure:
    plt.switch_backend("Agg")
    plt.rcParams.update(STYLE)
    figure = plt.figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def save(figure: Figure, path: Path) -> None:
    undated = {".svg": "Date", ".pdf": "CreationDate"}.get(path.suffix)
    figure.savefig(path, dpi=150, metadata={undated: None} if undated else None)
    plt.close(figure)


def make_table(rows: dict[tuple[str, str], list[str]], several: bool) -> Table:
    """Of {(optimizer, implementation): cells}; `several` optimizers have a column."""
    table = Table(*["optimizer"] * several, box=box.SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("implementation", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for (name, implementation), cells in rows.items():
        table.add_row(*[name] * several, implementation, *cells)
    return table


def draw(runs: dict[tuple[str, str], Any], args: argparse.Namespace) -> None:
    """A row for each optimizer: training loss, validation accuracy, and the last library's confusion on the test part.

    Each run has a `history` of {"loss": [...], "accuracy": [...]} by epoch, and `answers`: labels and predictions.
    """
    title = f"MLP on scikit-learn's digits, trained with {' and with '.join(args.library)} on {args.device}"
    figure = new_figure(title, 12, 0.9 + 3.1 * len(args.optimizer))
    rows = figure.subplots(len(args.optimizer), 3, squeeze=False)
    for name, (losses, accuracies, confusion) in zip(args.optimizer, rows, strict=True):
        losses.set(title=f"Training loss, {name}", ylabel="mean cross-entropy (nats)", yscale="log")
        accuracies.set(title=f"Validation accuracy, {name}", ylabel="accuracy (%)")
        for library in args.library:
            history = runs[name, library].history
            for axes, key in ((losses, "loss"), (accuracies, "accuracy")):
                axes.plot(range(1, len(history[key]) + 1), history[key], label=library, **LOOKS[library])
        for axes, corner in ((losses, "upper right"), (accuracies, "lower right")):
            axes.set(xlabel="epoch", xticks=range(0, args.epochs + 1, max(1, args.epochs // 8)))
            axes.grid(alpha=0.3)
            axes.legend(loc=corner)
        truth, predicted = runs[name, args.library[-1]].answers
        ConfusionMatrixDisplay.from_predictions(
            truth, predicted, ax=confusion, cmap="Blues", colorbar=False, text_kw={"size": 8}
        )
        confusion.set(title=f"Test images by class, {name}, {args.library[-1]}", xlabel="predicted", ylabel="true")
    save(figure, args.figure)
