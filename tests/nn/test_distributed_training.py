"""Modules and optimizers together on two processes: DDP, ZeRO, FSDP2 and checkpoints that another number takes up.

The measure is torch.nn and torch.optim on one process, on the joined batch. Two processes train the same as long as no
BatchNorm takes statistics of a batch: each process would take those of its own part, as torch's do.
"""

from collections.abc import Iterator

import pytest
import torch
from support.workers import Workers

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch.distributed with gloo is not available", allow_module_level=True)

import distributed_training_worker as worker

pytestmark = pytest.mark.usefixtures("on_host")


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    workers = Workers(tmp_path_factory.mktemp("rendezvous"), "distributed_training_worker", worker.PROCESSES)
    yield workers
    workers.stop()


def assert_same(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found["state"], expected["state"], rtol=10 * tolerance, atol=tolerance)


def assert_by_kernels(found):
    assert "step_kernel" in found["launches"]
    assert len(set(found["launches"])) > 2


TRAININGS = {
    "DDP": ("ddp", False),
    "DDP, two micro-batches": ("ddp", False, 2),
    "ZeroRedundancyOptimizer": ("zero",),
    "FSDP2": ("fsdp2", False, False),
    "FSDP2, recomputed": ("fsdp2", False, True),
}


@pytest.mark.parametrize("training", TRAININGS)
def test_two_processes_train_as_one_on_the_joined_batch(workers, training):
    function, *args = TRAININGS[training]
    expected = worker.on_one_process("SGD", worker.STEPS)
    for found in workers(function, "fastnn", *args):
        assert_same(found, expected)
        assert_by_kernels(found)


def test_gradients_that_ddps_hook_compresses_train_as_torchs_modules_do(workers):
    """In fp16, of 11 bits: an ulp of a gradient, times steps and rate, is what rounding the other way may make."""
    for found, expected in zip(workers("ddp_in_fp16", "fastnn"), workers("ddp_in_fp16", "torch"), strict=True):
        assert_same(found, expected, 1e-3)
        assert_by_kernels(found)


@pytest.mark.parametrize("training", [*(name for name in TRAININGS if not name.startswith("Zero"))])
def test_statistics_of_a_batch_are_each_processs_own_as_with_torch(workers, training):
    """Buffers too, which a recomputed forward moves twice. On the joined batch statistics and training are others."""
    function, _, *args = TRAININGS[training]
    ours, theirs = (workers(function, library, True, *args) for library in ("fastnn", "torch"))
    for found, expected in zip(ours, theirs, strict=True):
        assert_same(found, expected)
        assert_by_kernels(found)
    joined = worker.on_one_process("SGD", worker.STEPS, of_batch=True)
    assert (ours[0]["state"]["2.0.weight"] - joined["state"]["2.0.weight"]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # where a process is alone
def test_a_checkpoint_of_two_processes_goes_on_in_one_and_that_in_two(workers, tmp_path):
    """torch.distributed.checkpoint, in mid-training: the same as eight steps in one go."""
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    workers("leg", "fastnn", False, range(3), None, first)
    alone = worker.leg("fastnn", False, range(3, 5), first, second)
    assert_same(alone, worker.on_one_process("AdamW", 5))
    assert_by_kernels(alone)
    expected = worker.on_one_process("AdamW", 8)
    for found in workers("leg", "fastnn", False, range(5, 8), second, None):
        assert_same(found, expected)
        assert_by_kernels(found)


def test_a_checkpoint_goes_on_as_an_uninterrupted_run_on_as_many_processes(workers, tmp_path):
    """With statistics of batches. Of running ones, which differ, it holds one process's, as with torch's modules."""
    resumed = {}
    for library in ("fastnn", "torch"):
        workers("leg", library, True, range(3), None, str(tmp_path / library))
        resumed[library] = workers("leg", library, True, range(3, 6), str(tmp_path / library), None)
    uninterrupted = workers("leg", "fastnn", True, range(6), None, None)
    for ours, theirs, expected in zip(resumed["fastnn"], resumed["torch"], uninterrupted, strict=True):
        assert_same(ours, theirs)
        for name, tensor in expected["state"].items():
            assert torch.equal(ours["state"][name], tensor) or "running" in name, name
