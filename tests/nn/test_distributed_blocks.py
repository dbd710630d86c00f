"""Under DDP and FSDP2, on two processes, fastnn's modules and fused models train what torch's do."""

import json
import os
import subprocess
import sys

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch.distributed with gloo is not available", allow_module_level=True)

from nn import distributed_blocks_worker as worker


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    rendezvous = (tmp_path_factory.mktemp("gloo") / "rendezvous").as_uri()
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    command = [sys.executable, worker.__file__]
    processes = [
        subprocess.Popen([*command, str(rank), rendezvous], env=environment, stdout=subprocess.PIPE)
        for rank in range(worker.PROCESSES)
    ]
    return [json.loads(process.communicate(timeout=200)[0]) for process in processes]


@pytest.mark.parametrize("kind", ["fastnn", "fuse"])
@pytest.mark.parametrize("wrapper", worker.WRAPPERS)
def test_two_processes_train_what_torchs_modules_do(trained, wrapper, kind):
    for found in trained:
        theirs, ours = found[wrapper]["torch"], found[wrapper][kind]
        assert theirs.pop("launches", 0) == 0
        # FSDP2's hooks are not traced, and what is between them is torch.nn's: a fused model runs unfused there.
        assert (ours.pop("launches") > 0) == ((wrapper, kind) != ("FSDP2", "fuse"))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(torch.tensor(value), torch.tensor(theirs[name]), rtol=1e-4, atol=1e-5, msg=name)
    assert trained[0][wrapper][kind]["head.0.weight"] == trained[1][wrapper][kind]["head.0.weight"]
