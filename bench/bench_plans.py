"""Which plan the rules choose for each block of the workloads, and what the cost model counts for every candidate.

On a GPU every candidate is timed as well, as fastnn.tune does it, and the row says by how much the choice misses the
fastest: its regret. What is timed is our plans against each other, whose results the tests check.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch

from bench import gpu
from bench.results import Row
from bench.roofline import COMPUTED
from bench.workloads import WORKLOADS, Workload
from fastnn import costs, dispatch, plans, tuning
from fastnn.plans import Choice


def choices(M: int, N: int, K: int, dtype: torch.dtype) -> dict[str, Choice]:
    """Of a block in the middle of a network, by what is chosen."""
    return {
        "forward": plans.batch_norm_choice(M, N, K, dtype, gpu.DEVICE),
        "sums": plans.statistics_choice(M, N, dtype.itemsize, gpu.DEVICE),
        "gradients": plans.linear_backward_choice(M, N, K, dtype, gpu.DEVICE),
    }


def counted(choice: Choice) -> dict[str, Row]:
    """The model's inputs and its time for each candidate."""
    machine = dispatch.machine(gpu.DEVICE)
    launches = costs.candidates(choice.problem, machine)
    return {
        name: {
            "launches": len(launches[name]),
            "bytes": round(sum(launch.dram for launch in launches[name])),
            "l2_bytes": round(sum(launch.l2 for launch in launches[name])),
            "flops": round(sum(launch.flops for launch in launches[name])),
            "model_us": us,
        }
        for name, us in choice.microseconds.items()
    }


def timed(choice: Choice, rows: int) -> Row:
    """{} without a GPU; in a rehearsal of calls that ran, by the host's clock."""
    if not (gpu.AVAILABLE or gpu.REHEARSAL):
        return {}
    with patch.object(tuning, "clock", tuning.clock if gpu.AVAILABLE else by_the_host):
        times = tuning.measure(choice.problem, rows, gpu.DEVICE)
    times = {name: times[name] for name in choice.microseconds}
    return {"measured_us": times, "regret": round(times[choice.plan] / min(times.values()), 3)}


def by_the_host(calls: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    def once(call: Callable[[], Any]) -> float:
        start = gpu.wall_clock()
        call()
        return 1e6 * (gpu.wall_clock() - start)

    return {name: once(call) for name, call in calls.items()}


def rows_of(workload: Workload, dtype: str) -> Iterator[Row]:
    small = workload.miniature() if gpu.REHEARSAL else workload
    for M in small.batches:
        for K, N in dict.fromkeys(small.blocks):
            for what, choice in choices(M, N, K, COMPUTED[dtype]).items():
                setting = {"workload": workload.name, "batch": M, "shape": f"{K} x {N}", "dtype": dtype}
                chosen = {"plan": choice.plan, "by": choice.by, "untrusted": choice.untrusted}
                row = {"kind": "plan", "what": what, **setting, "implementation": "fastnn", **chosen}
                yield row | {"candidates": counted(choice)} | timed(choice, M)


@pytest.mark.parametrize("dtype", gpu.DTYPES)
def bench_plans(dtype: str, record) -> None:
    with gpu.precision(dtype):
        record([row for workload in WORKLOADS.values() for row in rows_of(workload, dtype)])
