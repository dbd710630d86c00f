"""Which path a call takes, and the reasons given."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastnn import dispatch


def path_of(x, dtype=None, features=8, tensors=()):
    return dispatch.path(x, dtype or x.dtype, features, tensors)


class Subclass(torch.Tensor):
    pass


EAGER = {
    "float64": (lambda: path_of(torch.ones(2, 8, dtype=torch.float64)), "no kernels for torch.float64"),
    "complex": (lambda: path_of(torch.ones(2, 8, dtype=torch.complex64)), "no kernels for torch.complex64"),
    "empty": (lambda: path_of(torch.ones(0, 8)), "empty input"),
    "subclass": (lambda: path_of(torch.ones(2, 8).as_subclass(Subclass)), "tensor subclass Subclass"),
    "parameter subclass": (
        lambda: path_of(torch.ones(2, 8), tensors=(torch.ones(8).as_subclass(Subclass),)),
        "tensor subclass Subclass",
    ),
    "meta": (lambda: path_of(torch.ones(2, 8, device="meta")), "meta"),
    "mixed devices": (
        lambda: path_of(torch.ones(2, 8), tensors=(torch.ones(8, device="meta"),)),
        "tensors on different devices",
    ),
    "float64 parameters": (
        lambda: path_of(torch.ones(2, 8), tensors=(torch.ones(8, dtype=torch.float64),)),
        "no kernels for torch.float64 parameters",
    ),
    "wide": (lambda: path_of(torch.ones(2, 8), features=1 << 21), "more than 1048576 features"),
}


@pytest.mark.parametrize("case", EAGER)
def test_what_the_kernels_do_not_serve_runs_eagerly_with_a_reason(case):
    call, reason = EAGER[case]
    found = call()
    assert found.eager
    assert reason in found.reason


def test_served_dtypes_take_the_kernels_in_the_interpreter_or_compiled():
    for dtype in dispatch.KERNEL_DTYPES:
        found = path_of(torch.ones(2, 8, dtype=dtype), tensors=(None, nn.Parameter(torch.ones(8))))
        assert found == dispatch.Path("interpreter" if dispatch.INTERPRETED else "triton")


def test_old_gpus_and_rocm_run_eagerly(monkeypatch):
    reason = dispatch._find_cuda_reason.__wrapped__
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert reason(0) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert reason(0) == ""
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in reason(0)


@pytest.mark.real_empty
def test_the_cuda_path_is_found_while_dynamo_traces(monkeypatch):
    monkeypatch.setattr(dispatch, "_find_cuda_reason", lambda index: "")
    monkeypatch.setattr(dispatch, "INTERPRETED", False)

    def shifted(x):
        return x + (1 if dispatch._cuda_reason(0) == "" else -1)

    assert torch.compile(shifted, backend="eager", fullgraph=True)(torch.zeros(1)).item() == 1


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, fastnn
from fastnn import dispatch
assert dispatch.device_path(torch.device("cpu")) == dispatch.Path("eager", "Triton is not installed")
block = fastnn.nn.LinearBatchNormReLUDropout(4, 3)
block(torch.randn(5, 4)).sum().backward()
from fastnn.__main__ import main
assert main() == 0
"""


def test_interpreter_without_numpy_says_what_is_missing():
    """Triton's interpreter is written in numpy, which neither Triton nor torch's wheels bring along."""
    code = WITHOUT_TRITON.replace("triton", "numpy", 1).split("assert")[0] + "print(dispatch.NO_KERNELS)\n"
    code += "from fastnn.__main__ import main; sys.exit(main())"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert done.stdout.startswith("Triton cannot be imported: ")
    assert "numpy" in done.stdout


TRAINING = """
import copy, sys, torch, fastnn
from fastnn import dispatch
block, x = fastnn.nn.LinearBatchNormReLUDropout(4, 3, p=0.0), torch.randn(5, 4)
plain = torch.nn.Sequential(*copy.deepcopy(list(block)))
for model, optim in ((block, fastnn.optim), (plain, torch.optim)):
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
torch.testing.assert_close(block.state_dict(), plain.state_dict())
print(*dispatch.device_path(torch.device("cpu")), "fastnn.kernels.launch" in sys.modules, sep="|")
"""


@pytest.mark.parametrize("version", ["3.5.1", "4.0.0", "3.10.2+git1"])
def test_another_triton_is_warned_of_once_and_not_used(version):
    """Where everything is imported anew: torch's own ops train the same, and no kernel is so much as imported."""
    done = subprocess.run(
        [sys.executable, "-c", f"import triton; triton.__version__ = {version!r}{TRAINING}"],
        capture_output=True, text=True, check=True, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    why = f"Triton {version} is not served: fastnn is for 3.6 and newer, below 4"
    served = version.startswith("3.10")
    assert done.stdout.strip() == ("interpreter||True" if served else f"eager|{why}|False")
    assert done.stderr.count("is not served") == (0 if served else 1)


def test_without_triton_everything_imports_and_runs_eagerly():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Triton not usable" in done.stdout
