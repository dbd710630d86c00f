"""Training steps with another number of rows each: what they compile, and what tune measures; prints both as JSON.

Our kernels compile for sm_90 and are launched by a driver that only counts; torch's ops run on meta tensors.

For processes in which TRITON_INTERPRET was not set when the kernels were imported.
"""

import json
import os
import random
import sys
import tempfile
from unittest.mock import patch

import torch
from support.ahead_of_time import stand_in_driver
from support.ops_log import OpsLog, ops_of_a_gpu

import fastnn
from bench.workloads import WORKLOADS
from fastnn import costs, dispatch, tuning

WORKLOAD = WORKLOADS["gin"]
FEWEST, MOST = WORKLOAD.batches
STEPS = 200


def first_sizes() -> list[int]:
    """Of each bucket a multiple of 16 and another number, near both of its ends: what a compilation may depend on."""
    ends = [FEWEST, *(1 << exponent for exponent in range(9, 14)), MOST]
    near = [end + more for end in ends for more in (-15, 0, 15, 32)]
    return [M for M in near if FEWEST <= M <= MOST]


def by_the_model(problem: costs.Problem, rows: int, device: torch.device) -> dict[str, float]:
    machine = dispatch.machine(device)
    return {name: costs.microseconds(plan, machine) for name, plan in costs.candidates(problem, machine).items()}


def train(dtype: torch.dtype) -> dict[str, object]:
    """Steps with a kernel that no earlier one had compiled, and problems that tune measured in each step."""
    draw = random.Random(0)
    sizes = first_sizes()
    model = fastnn.nn.Sequential(*WORKLOAD.layers()).to("meta", dtype)
    compiled: dict[int, str] = {}
    news: list[list[str]] = []
    measured: list[int] = []
    with stand_in_driver(90) as launches, ops_of_a_gpu(), OpsLog(), patch.object(tuning, "measure") as measure:
        measure.side_effect = by_the_model
        for M in sizes + [draw.randint(FEWEST, MOST) for _ in range(STEPS)]:
            x = torch.zeros((M, WORKLOAD.widths[0]), dtype=dtype, device="meta", requires_grad=True)
            fastnn.tune(model, x)
            model(x).sum().backward()
            new = {id(launch.compiled): f"{launch.kernel} of {M} rows" for launch in launches}
            news.append([kernel for key, kernel in new.items() if key not in compiled])
            compiled |= new
            launches.clear()
            measured.append(measure.call_count)
    return {"first": len(sizes), "compiled": news, "measured": measured}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTNN_CACHE_DIR"] = folder
        json.dump({str(dtype): train(dtype) for dtype in (torch.float32, torch.bfloat16)}, sys.stdout)
