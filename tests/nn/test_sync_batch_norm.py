"""Under SyncBatchNorm, ranks with other plans and batch sizes issue the same collectives and train the same network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch.distributed with gloo is not available", allow_module_level=True)

from nn import sync_batch_norm_worker as worker


def test_ranks_with_other_tables_and_batches_issue_the_same_collectives(tmp_path):
    script, rendezvous = Path(worker.__file__), (tmp_path / "rendezvous").as_uri()
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    command = [sys.executable, str(script)]
    processes = [
        subprocess.Popen([*command, str(rank), rendezvous], env=environment, stdout=subprocess.PIPE) for rank in (0, 1)
    ]
    first, second = (json.loads(process.communicate(timeout=120)[0]) for process in processes)
    assert first["collectives"] == second["collectives"] == 2 * [[3, 16], [3, 8], [3, 8], [3, 16]]
    assert set(first["kernels"]) != set(second["kernels"])  # the tables did turn plans around

    model = torch.nn.Sequential(*worker.layers(torch.nn.BatchNorm1d))
    x, y = worker.joined_batch()
    F.cross_entropy(model(x), y, reduction="sum").backward()
    for parameter, *parts in zip(model.parameters(), first["gradients"], second["gradients"], strict=True):
        torch.testing.assert_close(sum(map(torch.tensor, parts)), parameter.grad, rtol=1e-4, atol=1e-4)
