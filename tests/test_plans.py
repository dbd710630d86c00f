"""Which plan a call takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.processes import without_interpreter

import fastnn
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
        (10_000, 500, 500, torch.float32, "columns"),  # by the model ours is faster, unmeasured in full fp32
        (2048, 400, 400, torch.bfloat16, "epilogue"),  # 25 programs of columns draw less bandwidth than 128 chunks
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


def all_plans(M, N, K, dtype):
    found = [plans.statistics_plan(M, N, dtype.itemsize, CPU), plans.linear_backward_plan(M, N, K, dtype, CPU)]
    found += [plans.forward_plan(M, N, K, dtype, CPU, norm, save) for norm in ("batch", "running", "none")
              for save in (True, False)]  # fmt: skip
    return found, [plans.rounds_operands(M, N, K, dtype, CPU, norm, True) for norm in ("batch", "none")]


features = st.integers(1, 4096)


@given(st.integers(0, 20), st.data(), features, features, st.sampled_from([torch.float32, torch.bfloat16]))
def test_batch_sizes_of_one_bucket_take_one_plan(exponent, data, N, K, dtype):
    rows = st.integers((1 << exponent) // 2 + 1, 1 << exponent)
    M, other = data.draw(rows), data.draw(rows)
    assert plans.bucket(M) == plans.bucket(other) == 1 << exponent
    assert all_plans(M, N, K, dtype) == all_plans(other, N, K, dtype)


@given(st.integers(1, 1 << 20))
@example(1)
@example(256)
@example(257)
def test_a_bucket_is_the_next_power_of_two(M):
    bucket = plans.bucket(M)
    assert bucket.bit_count() == 1
    assert M <= bucket < 2 * M


def test_limits_of_rows_are_ends_of_buckets():
    """So that a bucket never lets a plan in that its largest batch cannot run."""
    for split in (False, True):
        assert plans.bucket(dispatch.tiles.whole_batch_rows(split)) == dispatch.tiles.whole_batch_rows(split)


def test_a_choice_says_why():
    choice = plans.batch_norm_choice(380_000, 512, 768, torch.float32, CPU)
    assert (choice.plan, choice.by) == ("split", plans.MODEL)
    assert set(choice.microseconds) == {"split", "epilogue"}
    assert choice.untrusted == {"epilogue": "unmeasured in full fp32"}
    with plans.forced_plan("epilogue"):
        assert plans.batch_norm_choice(380_000, 512, 768, torch.float32, CPU)[:2] == ("epilogue", plans.FORCED)


def test_what_is_measured_is_taken_for_its_problem_alone(monkeypatch):
    monkeypatch.setattr(plans, "_measured", {})
    choice, before = plans.batch_norm_choice(80, 100, 784, torch.bfloat16, CPU), plans.generation
    times = {"whole_batch": 9.0, "columns": 5.0, "split": 4.0, "epilogue": 6.0}
    plans.learn(CPU, {choice.problem: times})
    assert plans.generation > before
    found = plans.batch_norm_choice(128, 100, 784, torch.bfloat16, CPU)
    assert (found.plan, found.by) == ("columns", plans.MEASURED)  # with these columns, split is no candidate
    assert found.microseconds == {"whole_batch": 9.0, "columns": 5.0, "epilogue": 6.0}
    with plans.forced_plan("epilogue"):
        assert plans.batch_norm_plan(128, 100, 784, torch.bfloat16, CPU) == "epilogue"
    others = [(129, 100, 784, torch.bfloat16, "batch", True), (80, 101, 784, torch.bfloat16, "batch", True),
              (80, 100, 785, torch.bfloat16, "batch", True), (80, 100, 784, torch.float32, "batch", True),
              (80, 100, 784, torch.bfloat16, "batch", False), (80, 100, 784, torch.bfloat16, "none", True)]  # fmt: skip
    for M, N, K, dtype, norm, save in others:
        assert plans.forward_choice(M, N, K, dtype, CPU, norm, save).by == plans.MODEL
    monkeypatch.setattr(dispatch, "machine", lambda device: dispatch.H100._replace(name="another"))
    assert plans.batch_norm_choice(128, 100, 784, torch.bfloat16, CPU).by == plans.MODEL


def test_tables_of_tf32_and_full_fp32_are_apart(monkeypatch):
    monkeypatch.setattr(plans, "_measured", {})
    plans.learn(CPU, {plans.linear_choice(64, 100, 784, torch.float32, CPU).problem: {"apply": 1.0, "epilogue": 2.0}})
    assert plans.linear_plan(64, 100, 784, torch.float32, CPU) == "apply"
    monkeypatch.setattr(plans, "fp32_precision", lambda: "tf32")
    assert plans.linear_plan(64, 100, 784, torch.float32, CPU) == "epilogue"


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


def test_forcing_is_a_generation_and_is_undone():
    before = plans.generation
    with fastnn.forced_plan("split"):
        within = plans.generation
    assert before < within < plans.generation
    with pytest.raises(ZeroDivisionError), fastnn.forced_plan("split"):
        raise ZeroDivisionError
    assert plans.statistics_plan(64, 100, 4, CPU) == "columns"


def test_a_forced_plan_without_that_name_is_refused_at_once():
    with pytest.raises(ValueError, match=r"names must name plans of whole_batch, .*, library, got 'spilt'"):
        fastnn.forced_plan("split", "spilt")


IN_ENVIRONMENT = """
import torch, fastnn
from fastnn import plans
CPU = torch.device("cpu")
print(plans.statistics_plan(64, 100, 4, CPU), plans.linear_backward_plan(8, 8, 8, torch.float32, CPU))
with fastnn.forced_plan("grouped"):
    print(plans.statistics_plan(64, 100, 4, CPU), plans.linear_backward_plan(8, 8, 8, torch.float32, CPU))
"""


def run_with(value):
    environment = os.environ | {"FASTNN_PLAN": value}
    command = [sys.executable, "-c", IN_ENVIRONMENT]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_plans_are_forced_by_the_environment_and_the_context_wins():
    assert run_with("split, library").stdout.split() == ["split", "library", "columns", "grouped"]


def test_a_wrong_name_in_the_environment_is_refused_at_import():
    done = run_with("split,fast")
    assert done.returncode
    assert "ValueError: FASTNN_PLAN must name plans of whole_batch, " in done.stderr
    assert "got 'fast'" in done.stderr


def test_200_batch_sizes_compile_and_measure_nothing_new():
    """OGB's GIN, after a few batches of each bucket. Another number of rows every step is its way of training."""
    for found in without_interpreter(Path(__file__).with_name("varying_rows.py")).values():
        first = found["first"]
        assert first <= 30
        assert len(found["compiled"]) == first + 200
        assert all(found["compiled"][:1])
        assert found["compiled"][first:] == [[]] * 200
        # Of two blocks a forward, sums and gradients, for each of the six buckets from 512 to 16384.
        assert found["measured"][first - 1] == found["measured"][-1] == 2 * 3 * 6


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
