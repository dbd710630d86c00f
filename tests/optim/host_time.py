"""What a step costs on the host, ours and torch's fused Adam in turn; prints JSON. Run by test_host.py."""

import json
import sys
from unittest.mock import patch

import torch
from support.ahead_of_time import stand_in_driver
from support.host_time import TENSORS, adam_steps, in_turns
from support.ops_log import paths_of_a_gpu
from support.optimizers import parameters, set_gradients

import fastnn
from fastnn.kernels import tables


def compare(count: int, launches: list) -> dict:
    """The best of several turns."""
    steps = adam_steps(count)
    launches.clear()
    steps["fastnn"]()
    per_step = len(launches)
    times = in_turns(steps)
    return {"theirs": min(times["fused"]), "ours": min(times["fastnn"]), "launches": per_step}


def clipped(launches: list) -> list[str]:
    """Launches of a step that clips, of three groups."""
    params = parameters([(8,), (5, 3), (2000,)])
    groups = [{"params": [param], "lr": 0.1 * (i + 1)} for i, param in enumerate(params)]
    optimizer = fastnn.optim.AdamW(groups, max_grad_norm=1.0)
    set_gradients(0, params)
    optimizer.step()
    launches.clear()
    optimizer.step()
    return [launch.kernel for launch in launches]


def upload(launches: list) -> dict:
    """Uploads and compilations of steps between which a schedule changes every number."""
    params = parameters([(8,), (5, 3), (2000,)])
    optimizer = fastnn.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=20)  # beta1 as well
    set_gradients(0, params)
    optimizer.step()
    uploads, sizes, stage = [], [], tables.Tables._stage

    def counted(self, name, values, *dtype):
        staged = stage(self, name, values, *dtype)
        uploads.append(name)
        sizes.append(staged.numel() * staged.element_size())
        return staged

    launches.clear()
    with patch.object(tables.Tables, "_stage", counted):
        for _ in range(10):
            schedule.step()
            optimizer.step()
        moving, compiled = list(uploads), {id(launch.compiled) for launch in launches}
        uploads.clear()
        for _ in range(5):
            optimizer.step()
    return {"uploads": moving, "bytes": max(sizes), "compiled": len(compiled), "idle": uploads, "steps": len(launches)}


def main() -> None:
    torch.set_num_threads(1)
    with stand_in_driver(90) as launches, paths_of_a_gpu():
        tensors = {count: compare(count, launches) for count in TENSORS}
        result = {"tensors": tensors, "schedule": upload(launches), "clipped": clipped(launches)}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
