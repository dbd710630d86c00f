"""The rows of `pytest bench`: what tells them apart, and which of them run without --full."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from bench import gpu, results
from bench.results import Row
from bench.workloads import PARAMETERS, WORKLOADS, Shapes, Workload


@dataclass(frozen=True)
class ModelCase:
    """A row of a block or stack. `graphed` says that the whole step is one CUDA graph, whoever made it."""

    feature: str  # "block" or "mlp"
    name: str  # of the workload
    batch: int | None  # None: another every step
    dtype: str
    implementation: str
    graphed: bool = False
    phase: str = "training step"

    @property
    def clock(self) -> str:
        return "wall" if self.phase == "training step" else "device"

    @property
    def size(self) -> tuple[Workload, tuple[int, ...]]:
        """The workload and its batches to run: in a rehearsal their miniature."""
        workload = WORKLOADS[self.name]
        small = workload.miniature() if gpu.REHEARSAL else workload
        if self.batch is None:
            return small, small.batches
        return small, (small.batches[workload.batches.index(self.batch)],)

    @property
    def labels(self) -> Row:
        names = ("feature", "batch", "dtype", "implementation", "graphed", "phase", "clock")
        return {"workload": self.name, **{name: getattr(self, name) for name in names}}

    def __str__(self) -> str:
        graphed = ["graphed"] * self.graphed
        batch = "varying" if self.batch is None else str(self.batch)
        return " ".join([self.name, batch, self.dtype, self.implementation, *graphed, self.phase])


@dataclass(frozen=True)
class StepCase:
    """A row of an optimizer's step, or of clipping, on a list of parameters."""

    name: str  # of the list
    dtype: str
    implementation: str
    optimizer: str = "none"
    graphed: bool = False
    clock: str = "wall"

    @property
    def feature(self) -> str:
        return "clipping" if self.optimizer == "none" else "optimizer"

    @property
    def shapes(self) -> Shapes:
        """Of the parameters to step: in a rehearsal of as many small ones, up to 10."""
        shapes = PARAMETERS[self.name]
        return [tuple(size % 5 + 2 for size in shape) for shape in shapes[:10]] if gpu.REHEARSAL else shapes

    @property
    def labels(self) -> Row:
        names = ("feature", "dtype", "implementation", "optimizer", "graphed", "clock")
        size = {"tensors": len(self.shapes), "parameters": sum(map(math.prod, self.shapes))}
        labels = {"phase": "step", "workload": self.name, "batch": None, **size, "shape": f"{len(self.shapes)} tensors"}
        return labels | {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        return " ".join([self.optimizer, self.name, self.dtype, self.implementation, *["graphed"] * self.graphed])


Case = ModelCase | StepCase
# Where a row stands in a run, which may be cut short: an autotuned one takes longer than ten others. Graphed rows stand
# after those that are not: a capture that fails may leave CUDA's generator unusable.
TURNS = {"compile": 1, "compiled step": 1, "max-autotune-no-cudagraphs": 3, "max-autotune": 4}
GRAPHED_TURN = 2


def case_of(item: pytest.Item) -> Case | None:
    """None for what is no timed row."""
    return item.callspec.params.get("case") if hasattr(item, "callspec") else None


def in_turn(items: list[pytest.Item], earlier: list[Row]) -> list[pytest.Item]:
    """What is still to run of a run that has left these rows: what is quick first, and of that what is cheap.

    A ratio is of one run: where a baseline is still to run, ours runs again beside it. What is no timed row ran before
    all others.
    """

    def turn(item: pytest.Item) -> tuple[bool, int]:
        case = case_of(item)
        place = TURNS.get(case.implementation, GRAPHED_TURN * case.graphed) if case is not None else -1
        return item.get_closest_marker("full") is not None, place

    there = {results.key(row) for row in earlier}
    timed = {item: {"kind": "timed", **case.labels} for item in items if (case := case_of(item)) is not None}
    waiting = {item: results.setting(row) for item, row in timed.items() if results.key(row) not in there}
    first: dict[tuple, tuple[bool, int]] = {}
    for item, setting in waiting.items():
        first[setting] = min(turn(item), first.get(setting, turn(item)))
    turns = {item: turn(item) for item in items if item in waiting or (item not in timed and not earlier)}
    for item, row in timed.items():
        if row["implementation"] == "fastnn" and results.setting(row) in first:
            turns[item] = first[results.setting(row)]
    return sorted((item for item in items if item in turns), key=turns.__getitem__)


def choose(cases: Iterable[Case], quick: Callable[[Any], bool]) -> Any:
    """Parametrises a bench by `case`: by its own clock, marked "full" where it is not quick."""
    clocks = {"device": gpu.device_clock, "wall": gpu.wall_clock}
    params = []
    for case in cases:
        marks = [pytest.mark.benchmark(timer=clocks[case.clock])]
        if not quick(case):
            marks.append(pytest.mark.full)
        params.append(pytest.param(case, id=str(case), marks=marks))
    return pytest.mark.parametrize("case", params)
