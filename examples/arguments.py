"""The command line of digits.py: every argument checked before anything is trained, an error in one line."""

import argparse
from pathlib import Path
from typing import Any

import torch
from recipe import ACTIVATIONS, INITIALISATIONS, LIBRARIES, OPTIMIZERS, SCHEDULES, TRAIN

WHERE = ("figure", "checkpoint", "resume", "log")  # no part of what is trained


def make_parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(usage=argparse.SUPPRESS, description=description)  # so that an error is one line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    devices = ["cuda", *gpus, "cpu"] if gpus else ["cpu"]
    real: dict[str, Any] = {"type": float, "metavar": "X"}
    whole: dict[str, Any] = {"type": int, "metavar": "N"}
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    own = argparse.SUPPRESS  # no attribute unless given
    default = "(default: %(default)s)"
    add = parser.add_argument_group("model").add_argument
    add(
        "--hidden", type=int, nargs="+", default=[256, 128], metavar="N", help="widths of the blocks (default: 256 128)"
    )
    add("--activation", choices=ACTIVATIONS, default="relu", help=f"after each BatchNorm {default}")
    add("--init", choices=INITIALISATIONS, default="he-normal", help=f"of the weights; biases start at 0 {default}")
    add("--dropout", **real, default=0.3, help=f"probability of dropping a value {default}")
    add = parser.add_argument_group("optimisation").add_argument
    libraries, optimizers = [*LIBRARIES], [*OPTIMIZERS, "all"]
    add("--library", **several, choices=libraries, default=libraries, help=f"{', '.join(libraries)} (default: both)")
    add("--optimizer", **several, choices=optimizers, default=["adam"], help=f"{', '.join(optimizers)} (default: adam)")
    add("--lr", **real, default=own, help="learning rate (default: the optimizer's own)")
    add("--schedule", choices=SCHEDULES, default="constant", help=f"of the learning rate {default}")
    add("--epochs", **whole, default=40, help=f"passes over the training part {default}")
    add("--batch-size", **whole, default=64, help=f"images per step {default}")
    add("--clip-norm", **real, default=0.0, help="largest norm of all gradients together (default: 0, any)")
    add("--clip-value", **real, default=0.0, help="largest absolute value in a gradient (default: 0, any)")
    add = parser.add_argument_group("regularisation").add_argument
    add("--weight-decay", **real, default=own, help="of the weights (default: the optimizer's own)")
    add("--l1", **real, default=0.0, help=f"weight of the parameters' absolute values in the loss {default}")
    add("--noise", **real, default=0.0, help=f"standard deviation of noise on the standardised images {default}")
    add("--shift", **whole, default=0, help=f"pixels by which images are moved at most, each way {default}")
    add("--patience", **whole, default=0, help="epochs without a better validation to stop after (default: 0, never)")
    add = parser.add_argument_group("run").add_argument
    add("--seed", **whole, default=0, help=f"of split, weights, batches, dropout and augmentation {default}")
    add("--device", choices=devices, default=devices[0], help=f"where all train {default}")
    add("--graph", action="store_true", help="replay each step as one CUDA graph")
    add("--figure", type=Path, default="digits.png", metavar="PATH", help=f"the report: .png, .pdf or .svg {default}")
    add("--checkpoint", type=Path, default="digits.pt", metavar="PATH", help=f"written after every epoch {default}")
    add("--resume", action="store_true", help="go on with the checkpoint's unfinished runs")
    add("--log", type=Path, metavar="DIRECTORY", help="scalars and histograms for TensorBoard (default: none)")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for the first argument that is wrong."""
    finite = float("inf")
    for argument, right, meaning in (
        ("--epochs", args.epochs >= 1, "at least 1"),
        ("--batch-size", 2 <= args.batch_size <= TRAIN, f"from 2 to {TRAIN}"),
        ("--hidden", min(args.hidden) >= 1, "at least 1"),
        ("--dropout", 0 <= args.dropout <= 1, "from 0 to 1"),
        ("--lr", 0 < getattr(args, "lr", 1) < finite, "positive and finite"),
        ("--weight-decay", 0 <= getattr(args, "weight_decay", 0) < finite, "at least 0 and finite"),
        ("--l1", 0 <= args.l1 < finite, "at least 0 and finite"),
        ("--clip-norm", 0 <= args.clip_norm < finite, "at least 0 and finite"),
        ("--clip-value", 0 <= args.clip_value < finite, "at least 0 and finite"),
        ("--noise", 0 <= args.noise < finite, "at least 0 and finite"),
        ("--shift", 0 <= args.shift <= 4, "from 0 to 4"),
        ("--patience", args.patience >= 0, "at least 0"),
        ("--seed", 0 <= args.seed < 2**32, "from 0 to 2**32 - 1"),
        ("--graph", not args.graph or args.device != "cpu", "on a CUDA GPU"),
    ):
        if not right:
            raise ValueError(f"argument {argument}: must be {meaning}")
    check_path("--figure", args.figure, (".png", ".pdf", ".svg"))
    check_path("--checkpoint", args.checkpoint)
    if args.log and args.log.exists() and not args.log.is_dir():
        raise ValueError(f"argument --log: {args.log} is no directory")


def check_path(argument: str, path: Path, endings: tuple[str, ...] = ()) -> None:
    """Raises ValueError unless a file can be written there; leaves what is there, or that nothing is."""
    if endings and path.suffix not in endings:
        raise ValueError(f"argument {argument}: must be a {', '.join(endings[:-1])} or {endings[-1]}")
    there = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"argument {argument}: cannot write {path}: {error.strerror}") from error
    if not there:
        path.unlink()


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the result, as a checkpoint keeps it."""
    return {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in WHERE}


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Exits with 2 and one line on the standard error if an argument is wrong."""
    add_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    args.optimizer = list(OPTIMIZERS if "all" in args.optimizer else dict.fromkeys(args.optimizer))
    args.library = list(dict.fromkeys(args.library))
    return args
