"""What fastnn.tune has measured, on disk: a JSON file for each device, Triton, torch and fastnn.

    {"format": 1, "machine": {"device": ..., ...}, "problems": [{"rule": ..., ..., "microseconds": {plan: ...}}, ...]}

Only what reads as this, of this machine and with plans that the rules know, is taken; any other file is replaced.
"""

import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fastnn

from . import dispatch, plans
from .plans import Problem

try:
    import fcntl
except ImportError:  # Windows: the last of several writers wins
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
Times = dict[str, float]  # microseconds by plan
_TYPES = {"rule": str, "arithmetic": str, "norm": str, "save": bool}  # of a problem's fields; the others are sizes


def folder() -> Path:
    """FASTNN_CACHE_DIR, else fastnn in XDG_CACHE_HOME, else in ~/.cache."""
    named = os.environ.get("FASTNN_CACHE_DIR")
    if named:
        return Path(named)
    home = os.path.expanduser("~")
    if home == "~" and not os.environ.get("XDG_CACHE_HOME"):
        raise OSError("there is no home folder; FASTNN_CACHE_DIR may name another")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path(home, ".cache")) / "fastnn"


def identity(device: torch.device) -> dict[str, str]:
    """What times depend on beside the problem. torch brings the library whose products compete."""
    import triton

    machine = dispatch.machine(device)
    capability = ".".join(map(str, machine.capability))
    versions = {"triton": triton.__version__, "torch": torch.__version__, "fastnn": fastnn.__version__}
    return {"device": machine.name, "capability": capability, **versions}


def path_of(machine: dict[str, str]) -> Path:
    return folder() / (re.sub(r"[^A-Za-z0-9.+]+", "-", "-".join(machine.values())) + ".json")


def load(machine: dict[str, str]) -> tuple[dict[Problem, Times], str]:
    """What the file of that machine holds, and why it was not taken where it was not."""
    try:
        return _parsed(path_of(machine).read_text(encoding="utf-8"), machine), ""
    except FileNotFoundError:
        return {}, ""
    except OSError as error:  # which names the file
        return {}, f"no table is taken: {error}"
    except (ValueError, OverflowError, RecursionError) as error:  # JSON's and Unicode's are ValueErrors
        return {}, f"{path_of(machine)} is not taken: {error}"


def _parsed(text: str, machine: dict[str, str]) -> dict[Problem, Times]:
    """ValueError where the text is not a table of this machine."""
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("machine") != machine:
        raise ValueError(f"it is not of format {FORMAT} and of {machine}")
    rows = content.get("problems")
    if not isinstance(rows, list):
        raise ValueError("it has no list of problems")
    return dict(map(_problem, rows))


def _problem(row: Any) -> tuple[Problem, Times]:
    """A row as it was written; ValueError where it is not one."""
    if not isinstance(row, dict) or set(row) != {*Problem._fields, "microseconds"}:
        raise ValueError(f"{row!r} is no problem")
    problem, times = Problem(**{name: row[name] for name in Problem._fields}), row["microseconds"]
    if any(type(value) is not _TYPES.get(name, int) for name, value in problem._asdict().items()):
        raise ValueError(f"{row!r} has a field of another type")
    if not isinstance(times, dict) or not times or not set(times) <= set(plans.PLANS.get(problem.rule, ())):
        raise ValueError(f"{row!r} names plans that do not compete")
    if any(type(us) not in (int, float) or not math.isfinite(us) or us <= 0 for us in times.values()):
        raise ValueError(f"{row!r} has times that are none")
    return problem, {name: float(us) for name, us in times.items()}


def store(machine: dict[str, str], measured: dict[Problem, Times]) -> str:
    """Adds to the machine's file, for its readers in one step; why it could not, where it could not."""
    try:
        path = path_of(machine)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.with_suffix(".lock")):
            there, _ = load(machine)
            _replace(path, machine, there | measured)
    except OSError as error:
        return f"times are kept for this process alone: {error}"
    return ""


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Of all processes that write there, so that none loses what another has added meanwhile."""
    with open(lock, "a") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # some network file systems have no locks: the last writer wins
                fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


def _replace(path: Path, machine: dict[str, str], table: dict[Problem, Times]) -> None:
    rows = [{**problem._asdict(), "microseconds": times} for problem, times in sorted(table.items())]
    lines = ",\n".join(map(json.dumps, rows))
    text = f'{{"format": {FORMAT}, "machine": {json.dumps(machine)}, "problems": [\n{lines}\n]}}\n'
    descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
