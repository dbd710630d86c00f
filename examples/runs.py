"""A training's state, and the file that keeps it: replaced as a whole after each epoch, or not at all."""

import argparse
import io
import os
from pathlib import Path
from typing import Any

import torch
from recipe import LIBRARIES, OPTIMIZERS, SCHEDULES, TRAIN, build, make_optimizer
from torch import Tensor


def random_states(device: str) -> list[Tensor]:
    """Of the generators that dropout draws from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device != "cpu" else [])


class Run:
    """One training: model, optimizer and schedule, the random numbers to come, and what has been seen so far."""

    def __init__(self, optimizer: str, implementation: str, args: argparse.Namespace) -> None:
        self.args, self.library = args, LIBRARIES[implementation]
        torch.manual_seed(args.seed)  # the initial weights, for every run the same
        layers = args.hidden, args.dropout, args.activation, args.init
        self.model = build(self.library.nn.Sequential, *layers).to(args.device)
        class_name, settings = OPTIMIZERS[optimizer]
        changes = {name: value for name, value in vars(args).items() if name in ("lr", "weight_decay")}
        if args.graph:  # steps counted on the GPU, and a rate that a schedule can still change: a number is part of it
            on_gpu = "fused" if class_name in ("SGD", "Adagrad") else "capturable"  # these two have no such flag
            rate = changes.get("lr", settings["lr"])
            changes |= {"lr": torch.tensor(rate, device=args.device), on_gpu: True}
        self.optimizer = make_optimizer(self.model.parameters(), implementation, optimizer, **changes)
        self.schedule = SCHEDULES[args.schedule](self.optimizer, args.epochs, TRAIN // args.batch_size)
        self.shuffle = torch.Generator().manual_seed(args.seed)  # the order of the batches, and augmentation
        torch.manual_seed(args.seed)  # the dropout masks
        self.random = random_states(args.device)
        self.history: dict[str, list[float]] = {"loss": [], "accuracy": [], "validation loss": [], "lr": [], "ms": []}
        self.best: list[float] = [-1.0, 0.0, 0]  # accuracy, negative loss and number of the best epoch
        self.weights: dict[str, Tensor] = {}  # after it
        self.finished, self.kernels, self.answers = False, "-", ([0], [0])

    @property
    def epochs(self) -> int:
        return len(self.history["loss"])

    def goes_on(self) -> bool:
        stops = self.args.patience and self.epochs - self.best[2] >= self.args.patience
        return self.epochs < self.args.epochs and not stops

    def state_dict(self) -> dict[str, Any]:
        seen = {name: getattr(self, name) for name in ("history", "best", "weights", "finished", "kernels")}
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        return seen if self.finished else seen | parts | {"random": self.random, "shuffle": self.shuffle.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("history", "best", "weights", "finished", "kernels"):
            setattr(self, name, state[name])
        self.model.load_state_dict(self.weights)  # of the right shapes, or an error
        if not self.finished:
            for name in ("model", "optimizer", "schedule"):
                getattr(self, name).load_state_dict(state[name])
            self.random = state["random"]
            self.shuffle.set_state(state["shuffle"])


def write(path: Path, content: dict[str, Any]) -> None:
    """Written beside and renamed, so that an interrupt or a full disk leaves the old file as it was."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        torch.save(content, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """Raises ValueError, in one line, if that is no file written by `write` of tensors and plain values."""
    try:
        with path.open("rb") as file:
            kept = io.BytesIO(file.read())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    try:
        content = torch.load(kept, weights_only=True, map_location="cpu")
    except Exception as error:  # of pickle, zipfile, torch: what a damaged file raises depends on where it is damaged
        raise ValueError(f"{path} is no checkpoint, or a damaged one") from error
    kinds = {"settings": dict, "runs": dict, "finished": bool}
    if not isinstance(content, dict) or {name: type(value) for name, value in content.items()} != kinds:
        raise ValueError(f"{path} is no checkpoint of this program")
    return content


class Checkpoint:
    """The file of a program's runs: their settings, and each run's `state_dict` after its last whole epoch.

    Raises:
        ValueError: the file is there and cannot be read, or holds an unfinished run that `resume` does not ask for;
            `resume`, and it is not there or was made with other settings. Nothing has been written then.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool) -> None:
        self.path, self.saved = path, resume
        self.content: dict[str, Any] = {"settings": settings, "runs": {}, "finished": False}
        if not path.exists() and not resume:
            return
        found = read(path)
        if resume:
            for name in {**found["settings"], **settings}:
                then, now = (of.get(name, "its default") for of in (found["settings"], settings))
                if then != now:
                    raise ValueError(f"{path} was made with {name} {then}, not {now}")
            self.content = found
        elif not found["finished"]:
            raise ValueError(f"{path} holds an unfinished run: go on with it by --resume, or remove it")

    def give(self, name: str, run: Run) -> None:
        """What is kept under that name, if anything; raises ValueError if it does not fit."""
        try:
            if name in self.content["runs"]:
                run.load_state_dict(self.content["runs"][name])
        except Exception as error:  # tensors of other shapes, entries that are missing or of another type
            reason = str(error).strip().splitlines()[-1].strip()
            raise ValueError(f"{self.path} does not fit: {reason}") from error

    def save(self, name: str, run: Run) -> None:
        self.content["runs"][name] = run.state_dict()
        write(self.path, self.content)
        self.saved = True

    def finish(self) -> None:
        self.content["finished"] = True
        write(self.path, self.content)
