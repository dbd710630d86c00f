"""Search for the settings of an MLP on scikit-learn's digits: in a grid, at random, or by Optuna's TPE.

A trial is judged by cross-validation on the training part; each fold standardises by its own training images. The best
settings are trained once more on the whole training part, for the one look at the test part. The table shows every
trial, the figure (tune.png) how the error depends on each setting. `--library torch.nn` searches with torch's own.

    $ python examples/tune.py --search optuna --trials 20
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from arguments import check_path, make_parser
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from recipe import LIBRARIES, TEST, build, make_optimizer, pyramid
from report import new_figure, save
from rich import box, print
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, cross_val_score, train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from torch import nn

# Of each setting: what it is when not searched, how Optuna draws it, and its values in a grid.
Axis = tuple[Any, Callable[[optuna.Trial], Any], list]
AXES: dict[str, Axis] = {
    "lr": (3e-3, lambda trial: trial.suggest_float("lr", 1e-4, 1e-1, log=True), [1e-3, 3e-3, 1e-2]),
    "width": (256, lambda trial: trial.suggest_categorical("width", [64, 128, 256]), [64, 128, 256]),
    "depth": (2, lambda trial: trial.suggest_int("depth", 1, 4), [1, 2, 3]),
    "dropout": (0.3, lambda trial: trial.suggest_float("dropout", 0, 0.6), [0.0, 0.2, 0.4]),
    "weight_decay": (1e-3, lambda trial: trial.suggest_float("weight_decay", 1e-6, 1e-1, log=True), [1e-4, 1e-3, 1e-2]),
    "optimizer": (
        "adamw",
        lambda trial: trial.suggest_categorical("optimizer", ["nesterov", "adam", "adamw", "rmsprop"]),
        ["nesterov", "adam", "adamw"],
    ),
    "batch_size": (64, lambda trial: trial.suggest_categorical("batch_size", [32, 64, 128]), [32, 64, 128]),
}
SAMPLERS: dict[str, Callable[[argparse.Namespace], optuna.samplers.BaseSampler]] = {
    "grid": lambda args: optuna.samplers.GridSampler({name: AXES[name][2] for name in args.axes}, seed=args.seed),
    "random": lambda args: optuna.samplers.RandomSampler(seed=args.seed),
    "optuna": lambda args: optuna.samplers.TPESampler(seed=args.seed, n_startup_trials=max(2, args.trials // 3)),
}


def make_module(library: str, width: int, depth: int, dropout: float) -> nn.Module:
    return build(LIBRARIES[library].nn.Sequential, pyramid(width, depth), dropout)


def make_estimator(args: argparse.Namespace, settings: dict[str, Any]) -> Pipeline:
    """Standardisation and network as one estimator of scikit-learn's."""
    net = NeuralNetClassifier(
        make_module,
        criterion=nn.CrossEntropyLoss,
        optimizer=make_optimizer,
        max_epochs=args.epochs,
        batch_size=settings["batch_size"],
        train_split=None,
        iterator_train__shuffle=True,
        iterator_train__drop_last=True,
        module__library=args.library,
        **{f"module__{name}": settings[name] for name in ("width", "depth", "dropout")},
        optimizer__library=args.library,
        optimizer__name=settings["optimizer"],
        **{f"optimizer__{name}": settings[name] for name in ("lr", "weight_decay")},
        verbose=0,
    )
    return make_pipeline(StandardScaler(), net)


def search(args: argparse.Namespace, x: np.ndarray, y: np.ndarray) -> optuna.Study:
    """Every trial has its settings in `user_attrs`, searched or not, and the folds' standard deviation."""
    folds = StratifiedKFold(args.folds, shuffle=True, random_state=args.seed)

    def objective(trial: optuna.Trial) -> float:
        settings = {name: suggest(trial) if name in args.axes else usual for name, (usual, suggest, _) in AXES.items()}
        torch.manual_seed(args.seed)  # weights, batches and dropout: the settings alone differ
        scores = 100 * cross_val_score(make_estimator(args, settings), x, y, cv=folds)
        trial.set_user_attr("settings", settings)
        trial.set_user_attr("deviation", scores.std())
        return scores.mean()

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=SAMPLERS[args.search](args))
    with Progress() as progress:
        task = progress.add_task(args.search, total=args.trials)
        study.optimize(objective, n_trials=args.trials, callbacks=[lambda *_: progress.advance(task)])
    return study


def shown(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def make_table(study: optuna.Study, accuracies: list[float]) -> Table:
    title = "Accuracy in %: mean and standard deviation over the folds"
    table = Table(title=title, title_style="", box=box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("trial", "mean", "±", "lr", "width", "depth", "drop", "decay", "optimizer", "batch"):
        table.add_column(heading, justify="right")
    for accuracy, trial in sorted(zip(accuracies, study.trials, strict=True), key=lambda pair: -pair[0]):
        settings, deviation = trial.user_attrs["settings"], trial.user_attrs["deviation"]
        cells = (shown(settings[name]) for name in AXES)
        table.add_row(str(trial.number), f"{accuracy:.2f}", f"{deviation:.2f}", *cells)
    return table


def draw(study: optuna.Study, accuracies: list[float], args: argparse.Namespace) -> None:
    """The error over the trials and over each setting that was searched."""
    columns = min(4, 1 + len(args.axes))
    rows = math.ceil((1 + len(args.axes)) / columns)
    title = (
        f"{args.search} search on scikit-learn's digits with {args.library}: {len(accuracies)} trials, the best starred"
    )
    figure = new_figure(title, 3.2 * columns, 0.6 + 2.6 * rows)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    numbers = [trial.number for trial in study.trials]
    errors = np.maximum(100 - np.array(accuracies), 0.05)  # on a logarithmic scale the good ones stand apart
    best = numbers.index(study.best_trial.number)
    for axes, name in zip(panels, ["trial", *args.axes], strict=False):
        places = numbers if name == "trial" else [trial.user_attrs["settings"][name] for trial in study.trials]
        if name in ("optimizer", "width", "depth", "batch_size"):
            ticks = sorted(set(places))
            axes.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
            places = [ticks.index(place) for place in places]
            axes.set_xlim(-0.5, len(ticks) - 0.5)
        elif name in ("lr", "weight_decay"):
            axes.set_xscale("log")
        if name == "trial":
            axes.plot(numbers, np.minimum.accumulate(errors), color="0.6", drawstyle="steps-post", label="best so far")
            axes.legend(loc="upper right")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.scatter(places, errors, s=18, color="tab:blue", alpha=0.7)
        axes.plot(places[best], errors[best], "*", ms=13, color="tab:orange", mec="black")
        axes.set(xlabel=name.replace("_", " "), yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    for axes in panels:
        axes.set_axis_off()
    for axes in figure.axes[::columns]:
        axes.set_ylabel("error (%)")
    save(figure, args.figure)


def parse() -> argparse.Namespace:
    parser = make_parser((__doc__ or "").split("\n")[0])
    add = parser.add_argument
    default = "(default: %(default)s)"
    whole: dict[str, Any] = {"type": int, "metavar": "N"}
    add("--search", choices=SAMPLERS, default="optuna", help=f"how settings are chosen {default}")
    names = ", ".join(AXES)
    add("--axes", nargs="+", choices=AXES, default=[*AXES], metavar="NAME", help=f"searched: {names} (default: all)")
    add("--trials", **whole, default=20, help=f"settings to try, at most {default}")
    add("--folds", **whole, default=3, help=f"of the cross-validation {default}")
    add("--epochs", **whole, default=15, help=f"passes over the training part in each fold {default}")
    add("--library", choices=LIBRARIES, default="fastnn.nn", help=f"of Sequential and optimizers {default}")
    add("--seed", **whole, default=0, help=f"of split, folds, weights, batches and search {default}")
    add("--figure", type=Path, default="tune.png", metavar="PATH", help=f"the trials: .png, .pdf or .svg {default}")
    args = parser.parse_args()
    args.axes = list(dict.fromkeys(args.axes))
    grid = math.prod(len(AXES[name][2]) for name in args.axes)
    try:
        for argument, right, meaning in (
            ("--trials", args.trials >= 1, "at least 1"),
            ("--trials", args.search != "grid" or args.trials >= grid, f"at least {grid}, the size of that grid"),
            ("--folds", 2 <= args.folds <= 100, "from 2 to 100"),
            ("--epochs", args.epochs >= 1, "at least 1"),
            ("--seed", 0 <= args.seed < 2**32, "from 0 to 2**32 - 1"),
        ):
            if not right:
                raise ValueError(f"argument {argument}: must be {meaning}")
        check_path("--figure", args.figure, (".png", ".pdf", ".svg"))
    except ValueError as error:
        parser.error(str(error))
    args.trials = min(args.trials, grid) if args.search == "grid" else args.trials
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(1)  # layers this small gain nothing from more, and on a busy CPU lose by it
    x, y = load_digits(return_X_y=True)
    x = x.astype(np.float32)
    x, x_test, y, y_test = train_test_split(x, y, test_size=TEST, stratify=y, random_state=args.seed)
    study = search(args, x, y)
    accuracies = [float(trial.value or 0) for trial in study.trials]
    print(make_table(study, accuracies))
    draw(study, accuracies, args)
    torch.manual_seed(args.seed)
    best = make_estimator(args, study.best_trial.user_attrs["settings"]).fit(x, y)
    score = 100 * best.score(x_test, y_test)
    print(f"Trial {study.best_trial.number}, trained on the whole training part: test accuracy {score:.2f} %")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted: a search keeps nothing\n")
        sys.exit(130)
