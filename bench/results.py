"""A run's results: one JSON file with the machine it ran on and a flat row per measurement.

    {"machine": {...}, "rows": [{...}, ...]}

Every row has "kind", which says what kind of statement it is:

- "timed": on a GPU; "median_us" of "feature" in "phase" for a "workload", "dtype" and "implementation"
- "counted": exact on any machine; "value" in "unit" of a "figure" for a "case" and "implementation"
- "plan": which plan "what" of a "workload", "batch", "shape" and "dtype" takes, with the cost model's inputs for each
  of "candidates"; on a GPU "measured_us" of each, and "regret", the choice's time over the fastest's
- "host": wall-clock of the host alone, its launches only counted; means something as a ratio to its baselines only

A row of ours has "ratios": for each baseline of the same run, its time over ours.
"""

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastnn

Row = dict[str, Any]
ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "results"
NO_GPU = "no GPU"
# What tells one row of a run from another, by kind.
KEYS = {
    "timed": ("feature", "phase", "optimizer", "workload", "batch", "dtype", "graphed", "implementation"),
    "counted": ("figure", "case", "implementation"),
    "plan": ("what", "workload", "batch", "shape", "dtype", "implementation"),
    "host": ("figure", "case", "implementation"),
}


def key(row: Row) -> tuple:
    """Identifies a row within a run, and the same measurement in another run."""
    return (row["kind"], *(row.get(name) for name in KEYS[row["kind"]]))  # only an optimizer's row has "optimizer"


def setting(row: Row) -> tuple:
    """What rows of different implementations that are compared have in common."""
    return tuple(row.get(name) for name in KEYS[row["kind"]] if name != "implementation")


def machine(selection: str) -> Row:
    """Device, versions, commit and date: what a number is worth nothing without. selection: "quick" or "full"."""
    found: Row = {
        "device": NO_GPU,
        "selection": selection,
        "cpu": _cpu_model(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "fastnn": fastnn.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "l2_bytes": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def file_for(machine: Row) -> Path:
    """Where the results of such a run live: a file a device and selection, its history is git's."""
    selection = ["quick"] if machine["selection"] == "quick" and machine["device"] != NO_GPU else []
    return FOLDER / ("-".join([*machine["device"].lower().split(), *selection]) + ".json")


def save(path: Path, machine: Row, rows: list[Row]) -> None:
    """One row a line, so that a change of one figure is a change of one line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    text = f'{{"machine": {json.dumps(machine, ensure_ascii=False, indent=1)},\n"rows": [\n{lines}\n]}}\n'
    partial = path.with_suffix(".partial")  # a reader never meets half a file
    partial.write_text(text)
    os.replace(partial, path)


def earlier(path: Path, machine: Row) -> list[Row]:
    """What the same machine, versions and commit have put into that file."""
    if not path.exists():
        return []
    there, rows = load(path)
    same = all(there.get(name) == machine.get(name) for name in ("device", "torch", "triton", "commit"))
    return rows if same else []


def joined(earlier: list[Row], rows: list[Row]) -> list[Row]:
    """Rows of two parts of a run, where both have one the later; ratios to baselines that only one of them had stay."""
    before, now = ({key(row): row for row in part} for part in (earlier, rows))

    def completed(row: Row) -> Row:
        older = before.get(key(row), {})
        return row | {name: older[name] | row[name] for name in ("ratios", "bounds") if name in older and name in row}

    return [row for row in earlier if key(row) not in now] + [completed(row) for row in rows]


def load(path: Path) -> tuple[Row, list[Row]]:
    """(machine, rows); ValueError if the file holds no results."""
    try:
        content = json.loads(path.read_text())
        return content["machine"], content["rows"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of pytest bench: {error!r}") from error


def last_committed(path: Path) -> tuple[Row, list[Row]] | None:
    """What HEAD holds under that path; None where there is no such file, or no git."""
    shown = _git("show", f"HEAD:{path.relative_to(ROOT).as_posix()}")
    if shown is None:
        return None
    content = json.loads(shown)
    return content["machine"], content["rows"]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def _commit() -> str:
    """The short hash, with a + where the tree differs from it apart from results."""
    head = _git("rev-parse", "--short", "HEAD")
    if head is None or _git("ls-files", "--error-unmatch", "bench/results.py") is None:
        return "unknown"  # or another repository's, around an unpacked archive
    changed = _git("status", "--porcelain", "--", ".", ":!bench/results", ":!README.md")
    return head.strip() + ("+" if changed else "")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
