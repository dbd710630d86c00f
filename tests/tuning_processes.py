"""Ten processes that tune a model each at once, with made-up times and one file; prints how each of them ended.

For processes in which TRITON_INTERPRET was not set when the kernels were imported.
"""

import json
import multiprocessing
import sys
import warnings
from unittest.mock import patch

import torch
from support.ops_log import ops_of_a_gpu
from torch import nn

import fastnn
from fastnn import tuning

PROCESSES = 10


def tune(width: int, start: "multiprocessing.synchronize.Barrier") -> None:
    """A model of its own: every process has rows to add. Nothing is launched on meta tensors."""
    model = fastnn.nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU()).to("meta")
    start.wait()
    with ops_of_a_gpu(), patch.object(tuning, "measure", lambda *_: {"columns": 1.0}), torch.no_grad():
        fastnn.tune(model, torch.zeros((16, 8), device="meta"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)  # of threads that numpy's library has, and that do nothing
    context = multiprocessing.get_context("fork")  # ten imports of torch would take half a minute
    barrier = context.Barrier(PROCESSES)
    processes = [context.Process(target=tune, args=(8 + n, barrier)) for n in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    json.dump([process.exitcode for process in processes], sys.stdout)
