"""Which plan a call takes."""

import subprocess
import sys

import pytest
import torch

from fastnn import dispatch, plans

CPU = torch.device("cpu")

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
    assert plans.statistics_plan(M, N, itemsize, CPU) == plan


@pytest.mark.parametrize(
    ("M", "N", "K", "dtype", "plan"),
    [
        (64, 100, 784, torch.float32, "whole_batch"),
        (64, 100, 784, torch.bfloat16, "whole_batch"),
        (512, 100, 100, torch.bfloat16, "whole_batch"),
        (512, 100, 784, torch.bfloat16, "columns"),  # each of 7 programs reads 0.8 MB of x, 8 µs for one multiprocessor
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
    assert plans.batch_norm_plan(M, N, K, dtype, CPU) == plan


def test_whole_batch_serves_more_rows_where_operands_are_not_split(monkeypatch):
    assert plans.batch_norm_plan(300, 100, 100, torch.float32, CPU) == "columns"
    monkeypatch.setattr(plans, "fp32_precision", lambda: "tf32")
    assert plans.batch_norm_plan(300, 100, 100, torch.float32, CPU) == "whole_batch"
    with plans.forced_plan("whole_batch"):
        assert plans.batch_norm_plan(600, 100, 100, torch.float32, CPU) == "columns"


@pytest.mark.parametrize(
    ("M", "N", "K", "dtype", "plan"),
    [
        (64, 100, 784, torch.float32, "grouped"),
        (1024, 10, 100, torch.bfloat16, "grouped"),
        (1024, 10, 100, torch.float32, "library"),  # 32 steps that wait for their loads: fp32 is not pipelined
        (1024, 100, 784, torch.float32, "library"),
        (512, 2048, 2048, torch.float32, "library"),
        (512, 2048, 2048, torch.bfloat16, "library"),
    ],
)
def test_linear_backward_plan_of_published_shapes(M, N, K, dtype, plan):
    assert plans.linear_backward_plan(M, N, K, dtype, CPU) == plan


@pytest.mark.parametrize(
    ("capability", "dtype", "plan"),
    [((8, 0), torch.float32, "epilogue"), ((8, 9), torch.float32, "split"), ((8, 9), torch.bfloat16, "epilogue")],
)
def test_full_fp32_takes_our_product_where_tensor_cores_are_six_times_as_fast(capability, dtype, plan, monkeypatch):
    monkeypatch.setattr(dispatch, "machine", lambda device: dispatch.H100._replace(capability=capability))
    assert plans.batch_norm_plan(80_000, 1024, 128, dtype, CPU) == plan


def test_several_plans_are_forced_each_where_it_serves():
    with plans.forced_plan("split", "library"):
        assert plans.statistics_plan(64, 100, 4, CPU) == "split"
        assert plans.linear_backward_plan(8, 8, 8, torch.float32, CPU) == "library"
    assert plans.linear_backward_plan(8, 8, 8, torch.float32, CPU) == "grouped"


def test_forced_plan_is_taken_only_where_it_serves():
    with plans.forced_plan("epilogue"):
        assert plans.statistics_plan(64, 100, 4, CPU) == "columns"
        assert plans.linear_plan(10_000, 10_000, 10_000, torch.float32, CPU) == "epilogue"
    assert plans.linear_plan(10_000, 10_000, 10_000, torch.float32, CPU) == "apply"
    assert plans.linear_plan(64, 100, 784, torch.float32, CPU) == "epilogue"


@pytest.mark.parametrize(
    ("interpreted", "asked", "taken"), [(False, "ieee", "bf16x6"), (False, "tf32", "tf32"), (True, "ieee", "ieee")]
)
def test_full_fp32_is_split_on_a_gpu(interpreted, asked, taken, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", interpreted)
    monkeypatch.setattr(plans, "fp32_precision", lambda: asked)
    assert plans.product_precision(torch.float32) == taken
    assert plans.product_precision(torch.bfloat16) == "ieee"


SETTINGS = """
import torch
from fastnn import dispatch, plans
assert plans.fp32_precision() == "ieee"
{setting}
print(plans.fp32_precision())
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
