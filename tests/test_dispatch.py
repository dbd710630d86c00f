"""Which path and plan a call takes, and the reasons given."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from fastnn import dispatch

CPU = torch.device("cpu")


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
    "meta": (lambda: path_of(torch.ones(2, 8, device="meta")), "not meta"),
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


def test_served_dtypes_take_the_interpreter_here():
    for dtype in dispatch.KERNEL_DTYPES:
        found = path_of(torch.ones(2, 8, dtype=dtype), tensors=(None, nn.Parameter(torch.ones(8))))
        assert found == dispatch.Path("interpreter")


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


# (M, N, bytes of an element, plan on an H100): published shapes.
PLANS = [
    (64, 100, 4, "columns"),  # a column in registers, however few columns
    (1024, 501, 4, "columns"),
    (512, 2048, 2, "columns"),
    (2048, 8192, 2, "columns"),
    (10_000, 500, 4, "columns"),  # 63 programs: half the machine draws more than its share, 40 MB reread
    (20_000, 500, 4, "split"),  # 80 MB: past the 50 of L2
    (380_000, 512, 4, "split"),
    (80_000, 1024, 2, "split"),
    (5000, 100, 4, "split"),  # 13 programs
    (5000, 8, 4, "split"),
]


@pytest.mark.parametrize(("M", "N", "itemsize", "plan"), PLANS)
def test_statistics_plan_of_published_shapes(M, N, itemsize, plan):
    assert dispatch.statistics_plan(M, N, itemsize, CPU) == plan


@pytest.mark.parametrize(
    ("M", "N", "K", "dtype", "plan"),
    [
        (64, 100, 784, torch.float32, "whole_batch"),
        (64, 100, 784, torch.bfloat16, "whole_batch"),
        (512, 100, 784, torch.bfloat16, "whole_batch"),  # x is read 7 times: 5.6 MB
        (128, 100, 784, torch.float32, "whole_batch"),
        (256, 100, 784, torch.float32, "columns"),  # 200 000 multiply-adds a column, six products each
        (300, 100, 100, torch.float32, "columns"),  # more rows than a tile of split operands
        (1024, 100, 100, torch.bfloat16, "columns"),  # more rows than a tile
        (256, 4096, 256, torch.bfloat16, "columns"),  # x is read 256 times: 34 MB
        (2048, 8192, 8192, torch.bfloat16, "columns"),
        (80_000, 1024, 128, torch.bfloat16, "epilogue"),
        (80_000, 1024, 128, torch.float32, "epilogue"),
        (380_000, 512, 768, torch.bfloat16, "split"),  # a product too deep for what reading z once less saves
        (9000, 600, 300, torch.bfloat16, "split"),  # rows of x that no 16-byte copy fits
    ],
)
def test_batch_norm_plan_of_published_shapes(M, N, K, dtype, plan):
    assert dispatch.batch_norm_plan(M, N, K, dtype, CPU) == plan


def test_whole_batch_serves_more_rows_where_operands_are_not_split(monkeypatch):
    assert dispatch.batch_norm_plan(300, 100, 100, torch.float32, CPU) == "columns"
    monkeypatch.setattr(dispatch, "fp32_precision", lambda: "tf32")
    assert dispatch.batch_norm_plan(300, 100, 100, torch.float32, CPU) == "whole_batch"
    with dispatch.forced_plan("whole_batch"):
        assert dispatch.batch_norm_plan(600, 100, 100, torch.float32, CPU) == "columns"


@pytest.mark.parametrize(
    ("M", "N", "K", "plan"),
    [(64, 100, 784, "grouped"), (1024, 10, 100, "grouped"), (1024, 100, 784, "library"), (512, 2048, 2048, "library")],
)
def test_linear_backward_plan_of_published_shapes(M, N, K, plan):
    assert dispatch.linear_backward_plan(M, N, K) == plan


def test_descriptors_copy_rows_of_16_byte_multiples_at_such_addresses(monkeypatch):
    x, weight = torch.empty(32, 40), torch.empty(24, 40)
    assert dispatch.copies_tiles(x, weight)
    assert not dispatch.copies_tiles(x[:, 1:], weight[:, 1:])
    assert not dispatch.copies_tiles(x, torch.empty(24 * 40 + 1)[1:].view(24, 40))
    monkeypatch.setattr(dispatch, "machine", lambda device: dispatch.Machine(108, 40 << 20, (8, 0)))
    assert not dispatch.copies_tiles(x, weight)


@pytest.mark.parametrize(
    ("capability", "dtype", "plan"),
    [((8, 0), torch.float32, "epilogue"), ((8, 9), torch.float32, "split"), ((8, 9), torch.bfloat16, "epilogue")],
)
def test_full_fp32_takes_our_product_where_tensor_cores_are_six_times_as_fast(capability, dtype, plan, monkeypatch):
    monkeypatch.setattr(dispatch, "machine", lambda device: dispatch.H100._replace(capability=capability))
    assert dispatch.batch_norm_plan(80_000, 1024, 128, dtype, CPU) == plan


def test_several_plans_are_forced_each_where_it_serves():
    with dispatch.forced_plan("split", "library"):
        assert dispatch.statistics_plan(64, 100, 4, CPU) == "split"
        assert dispatch.linear_backward_plan(8, 8, 8) == "library"
    assert dispatch.linear_backward_plan(8, 8, 8) == "grouped"


def test_forced_plan_is_taken_only_where_it_serves():
    with dispatch.forced_plan("epilogue"):
        assert dispatch.statistics_plan(64, 100, 4, CPU) == "columns"
        assert dispatch.linear_plan(10_000, 10_000, 10_000, torch.float32) == "epilogue"
    assert dispatch.linear_plan(10_000, 10_000, 10_000, torch.float32) == "apply"
    assert dispatch.linear_plan(64, 100, 784, torch.float32) == "epilogue"


@pytest.mark.parametrize(
    ("interpreted", "asked", "taken"), [(False, "ieee", "bf16x6"), (False, "tf32", "tf32"), (True, "ieee", "ieee")]
)
def test_full_fp32_is_split_on_a_gpu(interpreted, asked, taken, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", interpreted)
    monkeypatch.setattr(dispatch, "fp32_precision", lambda: asked)
    assert dispatch.product_precision(torch.float32) == taken
    assert dispatch.product_precision(torch.bfloat16) == "ieee"


SETTINGS = """
import torch
from fastnn import dispatch
assert dispatch.fp32_precision() == "ieee"
{setting}
print(dispatch.fp32_precision())
"""


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("", "ieee"),
        ("torch.set_float32_matmul_precision('high')", "tf32"),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
        ("torch.backends.fp32_precision = 'tf32'", "tf32"),
        ("torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'", "ieee"),
    ],
)
def test_fp32_precision_follows_torchs_settings(setting, expected):
    """In a process of its own: once the new settings were used, torch's older getters raise."""
    code = SETTINGS.format(setting=setting)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("Triton cannot be imported: ")
    assert "numpy" in done.stdout


def test_without_triton_everything_imports_and_runs_eagerly():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Triton not usable" in done.stdout
