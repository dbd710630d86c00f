"""fastnn.tune with a made-up clock: what it takes, keeps and leaves alone. No GPU has run the real one yet."""

import itertools
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from support.launched import kernels_launched
from support.ops_log import paths_of_a_gpu
from support.optimizers import DEVICE
from test_explanation import equal, stack, state_of
from torch import nn

import fastnn
from fastnn import dispatch, plan_table, plans, tuning

ROWS = 64


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Nothing measured yet, and a folder of its own."""
    monkeypatch.setattr(plans, "_measured", {})
    monkeypatch.setenv("FASTNN_CACHE_DIR", str(tmp_path / "cache"))
    machine = dispatch.machine
    monkeypatch.setattr(dispatch, "machine", lambda device: machine(device)._replace(name="NVIDIA Made-up/1"))


@pytest.fixture
def gpu():
    with paths_of_a_gpu():
        yield


@pytest.fixture
def clock(monkeypatch):
    """Finds the last of the plans, which the model does not prefer, the fastest; lists what it was given to time."""
    timed = []

    def made_up(calls, device):
        assert device.type == DEVICE
        timed.append(tuple(calls))
        return {name: 10.0 - place for place, name in enumerate(calls)}

    monkeypatch.setattr(tuning, "clock", made_up)
    return timed


def forget(monkeypatch):
    monkeypatch.setattr(plans, "_measured", {})


def inputs():
    return torch.randn(ROWS, 784, requires_grad=True)


def test_the_fastest_is_taken(gpu, clock):
    before = {row.modules: row for row in fastnn.explain(stack(), inputs()).rows}["0-3"]
    assert (before.forward, before.backward) == ("whole_batch", "columns + grouped")
    generation = plans.generation
    found = {row.modules: row for row in fastnn.tune(stack(), inputs()).rows}
    after = found["0-3"]
    assert plans.generation > generation
    assert (after.forward, after.backward) == ("epilogue", "columns + library")
    assert after.why[0] == "forward: epilogue, measured by fastnn.tune (whole_batch 10.0, columns 9.0, epilogue 7.0 µs)"
    assert found["4"].reason == "alone, and the library's gradients are the plan"
    assert clock == [
        ("whole_batch", "columns", "split", "epilogue"),
        ("split", "columns"),
        ("grouped", "library"),
        ("grouped", "library"),  # of the head
    ]


KERNELS = {
    ("batch_norm", "whole_batch"): ["whole_batch_forward_kernel"],
    ("batch_norm", "columns"): ["columns_forward_kernel"],
    ("batch_norm", "split"): ["split_statistics_kernel", "apply_kernel"],
    ("batch_norm", "epilogue"): ["linear_statistics_kernel", "apply_kernel"],
    ("statistics", "columns"): ["columns_forward_kernel", "columns_backward_kernel"],
    ("statistics", "split"): ["split_statistics_kernel", "apply_kernel", "split_sums_kernel", "split_dz_kernel"],
    ("linear", "epilogue"): ["linear_forward_kernel"],
    ("linear", "apply"): ["apply_kernel"],
    ("linear_backward", "grouped"): ["linear_backward_kernel"],
    ("linear_backward", "library"): [],
}


@pytest.mark.parametrize("norm", ["batch", "running", "none"])
@pytest.mark.parametrize(("itemsize", "arithmetic"), [(4, "ieee"), (2, "half")])
def test_what_is_timed_is_each_plan_s_kernels(norm, itemsize, arithmetic, monkeypatch):
    """With a backward and without, whatever the caller's autocast and grad mode."""
    launched = {}

    def run(calls, device):
        for name, call in calls.items():
            with kernels_launched() as launched[name]:
                call()
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(tuning, "clock", run)
    for rule in ("batch_norm", "statistics", "linear_backward") if norm == "batch" else ("linear",):
        for save in (False,) if norm == "running" else (True, False):
            problem = plans.Problem(rule, 16, 8, 8, itemsize, arithmetic, norm, save)
            with torch.no_grad(), torch.autocast(DEVICE, torch.float16):
                tuning.measure(problem, 11, torch.device(DEVICE))
            assert launched == {name: KERNELS[rule, name] for name in plans.PLANS[rule]}
            launched.clear()


def test_the_clock_takes_medians_of_calls_in_turns_each_after_l2_is_emptied(monkeypatch):
    """By a device whose time is moved by what is enqueued; an event's distance is in milliseconds."""
    now, log = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = now[0]

        def elapsed_time(self, end):
            return end.time - self.time

    def enqueue(name, *milliseconds):
        times = itertools.chain(milliseconds, itertools.repeat(milliseconds[-1]))

        def call(*args):
            log.append(name)
            now[0] += next(times)

        return call

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", enqueue("sleep", 1.0), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(dispatch, "machine", lambda device: dispatch.H100._replace(l2_bytes=64))
    slow_at_first = [9.0] * (tuning.WARM_UPS + tuning.ROUNDS // 2)
    calls = {"columns": enqueue("columns", *slow_at_first, 0.25), "split": enqueue("split", 0.5)}
    assert tuning.clock(calls, torch.device(DEVICE)) == {"columns": 250.0, "split": 500.0}
    warm_up = ["columns"] * tuning.WARM_UPS + ["split"] * tuning.WARM_UPS
    assert log == warm_up + ["sleep", "columns", "sleep", "split"] * tuning.ROUNDS


def test_the_kernels_run_by_the_measured_plan(gpu, clock, monkeypatch):
    launched = []
    for name in ("forward_whole_batch", "forward_linear_statistics"):
        launch = getattr(dispatch.launch, name)
        monkeypatch.setattr(
            dispatch.launch, name, lambda *a, launch=launch, name=name: (launched.append(name), launch(*a))[1]
        )
    model, x = stack(), inputs()
    model(x)
    fastnn.tune(model, x)
    launched.clear()
    model(x)
    assert launched == ["forward_linear_statistics"]


@pytest.mark.parametrize("norm", ["none", "running"])
def test_forwards_without_batch_statistics_are_measured_too(gpu, clock, norm):
    layers = [nn.BatchNorm1d(6)] if norm == "running" else []
    model = fastnn.nn.Sequential(nn.Linear(5, 6), *layers, nn.ReLU()).eval()
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        (row,) = fastnn.tune(model, torch.randn(7, 5)).rows
    assert (row.forward, clock) == ("apply", [("epilogue", "apply")])
    ((_, problem),) = plans._measured
    assert problem == plans.Problem("linear", 8, 6, 5, 2, "half", norm, False)


def test_nothing_is_measured_twice(gpu, clock, monkeypatch):
    fastnn.tune(stack(), inputs())
    clock.clear()
    fastnn.tune(stack(), torch.randn(ROWS - 10, 784, requires_grad=True))  # of the same bucket
    assert clock == []
    forget(monkeypatch)
    row = fastnn.tune(stack(), inputs()).rows[0]
    assert (clock, row.forward) == ([], "epilogue")  # from disk
    fastnn.tune(stack(), torch.randn(ROWS + 1, 784, requires_grad=True))
    assert clock  # of another


def test_only_tune_reads_the_disk(gpu, clock, monkeypatch):
    fastnn.tune(stack(), inputs())
    forget(monkeypatch)
    assert fastnn.explain(stack(), inputs()).rows[0].forward == "whole_batch"


def test_the_file_is_of_device_and_versions(gpu, clock, monkeypatch):
    fastnn.tune(stack(), inputs())
    (path,) = Path(os.environ["FASTNN_CACHE_DIR"]).glob("*.json")
    content = json.loads(path.read_text())
    assert content["machine"]["device"] == "NVIDIA Made-up/1"
    assert set(content["machine"]) == {"device", "capability", "triton", "torch", "fastnn"}
    assert len(content["problems"]) == 4
    forget(monkeypatch)
    monkeypatch.setattr(fastnn, "__version__", "9.9")
    clock.clear()
    fastnn.tune(stack(), inputs())
    assert len(clock) == 4


def test_nothing_of_the_users_is_changed(gpu, clock):
    model, x = stack(), inputs()
    before = state_of(model, x)
    fastnn.tune(model, x)
    assert clock
    assert equal(before, state_of(model, x))


def test_deterministic_mode_neither_measures_nor_takes(gpu, clock):
    model, x = stack(), inputs()
    fastnn.tune(model, x)
    clock.clear()
    torch.use_deterministic_algorithms(True)
    try:
        found = fastnn.tune(model, torch.randn(ROWS * 2, 784, requires_grad=True))
        assert fastnn.explain(model, x).rows[0].forward == "whole_batch"
    finally:
        torch.use_deterministic_algorithms(False)
    assert (clock, found.notes) == ([], (tuning.DETERMINISTIC,))
    assert fastnn.explain(model, x).rows[0].forward == "epilogue"


def test_sync_batch_norm_is_not_tuned(gpu, clock):
    model = fastnn.nn.Sequential(*stack(), nn.Sequential(nn.SyncBatchNorm(10)).eval())
    found = fastnn.tune(model, inputs())
    assert (clock, found.notes) == ([], (tuning.SYNC_BATCH_NORM,))
    assert found.rows[0].forward == "whole_batch"


def test_capture_is_refused_before_anything_is_done(gpu, clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    called = []
    with pytest.raises(RuntimeError, match="before the capture"):
        fastnn.tune(stack().register_forward_hook(lambda *args: called.append(1)) and stack(), inputs())
    assert (called, clock) == ([], [])


def test_where_no_kernel_serves_nothing_is_measured(clock):
    """On a CPU, also in the interpreter. No warning, and no file."""
    found = fastnn.tune(stack().cpu(), inputs().cpu())
    assert (clock, found.notes[-1]) == ([], tuning.NOT_SERVED)
    assert not Path(os.environ["FASTNN_CACHE_DIR"]).exists()


def test_what_does_not_fit_into_memory_is_left_to_the_model(gpu, clock, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setitem(tuning.WORK, "batch_norm", full)
    found = fastnn.tune(stack(), inputs())
    assert found.rows[0].forward == "whole_batch"
    assert found.notes == ("Not measured, for want of memory: batch_norm of 64 rows.",)


def test_bad_input():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        fastnn.tune(stack, inputs())


def warnings_of_tune():
    """But for those of Triton 3.6's interpreter."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fastnn.tune(stack(), inputs())
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


def test_a_corrupt_file_costs_one_warning_and_is_replaced(gpu, clock, monkeypatch):
    path = plan_table.path_of(plan_table.identity(torch.device(DEVICE)))
    path.parent.mkdir()
    path.write_text("{")
    (warned,) = warnings_of_tune()
    assert "is not taken" in warned
    assert len(clock) == 4
    forget(monkeypatch)
    assert warnings_of_tune() == []
    assert len(clock) == 4


@pytest.mark.parametrize("where", ["below a file", "read-only"])
def test_a_folder_that_cannot_be_used_costs_one_warning(where, gpu, clock, monkeypatch, tmp_path):
    if where == "below a file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("FASTNN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    else:  # as a mode would say for any user but root

        def refused(*args, **settings):
            raise PermissionError("read-only")

        monkeypatch.setattr(plan_table, "_replace", refused)
    (warned,) = warnings_of_tune()
    assert "for this process alone" in warned
    assert warnings_of_tune() == []
    assert fastnn.explain(stack(), inputs()).rows[0].forward == "epilogue"
