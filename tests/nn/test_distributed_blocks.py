"""Under DDP and FSDP2, on two processes, fastnn's modules and fused models train what torch's do."""

from collections.abc import Iterator

import pytest
import torch
from support.workers import Workers

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch.distributed with gloo is not available", allow_module_level=True)

import distributed_blocks_worker as worker


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    workers = Workers(tmp_path_factory.mktemp("rendezvous"), "distributed_blocks_worker", worker.PROCESSES)
    yield workers
    workers.stop()


@pytest.mark.parametrize("kind", ["fastnn", "fuse"])
@pytest.mark.parametrize("wrapper", worker.WRAPPERS)
def test_two_processes_train_what_torchs_modules_do(workers, wrapper, kind):
    found = workers("trained", wrapper, kind)
    for ours, theirs in zip(found, workers("trained", wrapper, "torch"), strict=True):
        assert theirs.pop("launches") == 0
        # FSDP2's hooks are not traced, and what is between them is torch.nn's: a fused model runs unfused there.
        assert (ours.pop("launches") > 0) == ((wrapper, kind) != ("FSDP2", "fuse"))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0]["head.0.weight"], found[1]["head.0.weight"])
