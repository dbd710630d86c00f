"""python -m fastnn: the report, every kernel checked, and a wrong kernel noticed."""

import os
import subprocess
import sys

import torch

from fastnn import __main__ as command
from fastnn import dispatch
from fastnn.kernels import launch


def test_command_checks_every_kernel_and_exits_0():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "fastnn"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch {torch.__version__}, Triton " in done.stdout
    assert done.stdout.count("  ok\n") == len(list(command.all_checks())) * len(dispatch.KERNEL_DTYPES)


def test_wrong_kernel_fails_its_row(monkeypatch, capsys, device):
    """A forward that scales by a ten-thousandth too little, in one plan."""
    split = launch.forward_split

    def wrong(values, tiles):
        return split(values | {"eps": values["eps"] + 2e-4}, tiles)

    monkeypatch.setattr(launch, "forward_split", wrong)
    monkeypatch.setattr(dispatch, "KERNEL_DTYPES", (torch.float32,))
    assert not command.check_kernels(device)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if line.endswith("FAILED")] == ["split"]
