"""Launches of a training step, forward, backward and optimizer: counted by a driver that stands in for a GPU's."""

from pathlib import Path

from support import launch_counts
from support.processes import without_interpreter


def bench_launches(record) -> None:
    record(without_interpreter(Path(launch_counts.__file__)))
