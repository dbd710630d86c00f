"""`pytest bench` as a command: progress, what waits for a GPU, a rehearsal, and what happens to the results.

As on a machine without a GPU, wherever the tests run.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import results


def run_pytest(*arguments: str, interpret: bool, expected: int = 0, root: Path = results.ROOT, **changed: str) -> str:
    # An xdist worker's own variables would tell pytest-benchmark that it runs in parallel.
    ours = ("TRITON_INTERPRET", "PYTEST_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} | changed | ({"TRITON_INTERPRET": "1"} if interpret else {})
    # Of the plugins, hypothesis takes most of a start: 0.7 s of 4.5.
    command = [sys.executable, "-m", "pytest", "bench", "-p", "no:hypothesispytest", *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_rows_side_by_side_are_refused():
    out = run_pytest("-n", "2", "-k", "bench_clip", interpret=True, expected=4)
    assert "benchmarks run one at a time: leave out -n" in out


def test_rows_that_wait_for_a_gpu_are_named():
    out = run_pytest("-k", "bench_clip_grad_norm", interpret=False)
    assert "Rows that wait for a CUDA GPU: 8 of bench_clip_grad_norm." in out
    assert "8 skipped" in out


def test_a_rehearsal_runs_rows_of_every_feature_and_keeps_nothing():
    chosen = "tabular-odd and bf16 and not graphed or SGD and mlp-60 or bench_clip and mlp-60"
    out = run_pytest("-k", chosen, interpret=True)
    assert "[ 1/20] bench_block[tabular-odd 1024 bf16 eager forward]: passed" in out
    assert "[20/20] bench_mlp[tabular-odd 1024 bf16 compile training step]: passed" in out  # torch.compile last
    assert "A rehearsal: 20 rows ran and passed their gate; nothing was measured, nothing is kept." in out
    assert "Written" not in out
    assert "partial" not in out


@pytest.fixture
def folder(tmp_path):
    """A results folder and options that keep a run of its own bench in it."""
    shutil.copytree(results.ROOT / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
    for name in ("pyproject.toml", "fastnn", "kernels", "tests"):
        (tmp_path / name).symlink_to(results.ROOT / name)
    for old in (tmp_path / "bench").glob("bench_*.py"):
        old.unlink()
    (tmp_path / "bench" / "results").mkdir()
    (tmp_path / "bench" / "bench_two.py").write_text(TWO)
    return tmp_path


TWO = """
import os

def row(case):
    what = {"kind": "counted", "figure": "launches", "case": case, "implementation": "fastnn"}
    return {**what, "value": int(os.environ.get("LAUNCHES", "9")), "unit": "launches", "better": "lower"}

def bench_first(record):
    record(row("first"))

def bench_second(record):
    if os.environ.get("LAUNCHES") == "-1":
        raise KeyboardInterrupt
    assert os.environ.get("LAUNCHES") != "0"
    record([row("second")])
"""


def launches(path) -> dict[str, int]:
    return {row["case"]: row["value"] for row in results.load(path)[1]}


def test_a_whole_run_replaces_the_devices_file_and_names_what_became_worse(folder):
    file = folder / "bench" / "results" / "no-gpu.json"
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c")
    out = run_pytest(interpret=False, root=folder)
    assert "Written: bench/results/no-gpu.json." in out
    assert launches(file) == {"first": 9, "second": 9}
    assert list(file.parent.iterdir()) == [file]
    for command in (["init", "-q"], ["add", "bench"], ["commit", "-q", "-m", "results"]):
        subprocess.run([*git, *command], cwd=folder, check=True, capture_output=True)
    out = run_pytest(interpret=False, root=folder, LAUNCHES="10")
    assert "worse: launches, first, fastnn: 9 -> 10 launches" in out
    assert "worse: launches, second, fastnn: 9 -> 10 launches" in out
    assert "worse" not in run_pytest(interpret=False, root=folder, LAUNCHES="8")


@pytest.mark.parametrize(
    ("arguments", "launched", "expected", "kept"),
    [
        (["-k", "first"], "5", 0, {"first": 5}),
        (["--deselect", "bench/bench_two.py::bench_second"], "5", 0, {"first": 5}),
        ([], "0", 1, {"first": 0}),  # the second row fails
        ([], "-1", 2, {"first": -1}),  # interrupted
    ],
    ids=["-k", "--deselect", "failing", "interrupted"],
)
def test_other_runs_replace_nothing(arguments, launched, expected, kept, folder):
    file = folder / "bench" / "results" / "no-gpu.json"
    file.write_text("{}")
    out = run_pytest(*arguments, interpret=False, expected=expected, root=folder, LAUNCHES=launched)
    assert "in bench/results/no-gpu.partial.json until the next" in out
    assert launches(file.with_suffix(".partial.json")) == kept
    assert file.read_text() == "{}"


def test_a_run_ends_in_time_and_goes_on_where_it_ended(folder):
    file = folder / "bench" / "results" / "no-gpu.json"
    out = run_pytest("--minutes", "1e-9", interpret=False, root=folder)
    left = "Rows for which no time was left: 1 of bench_first, 1 of bench_second. The same command goes on with them."
    assert left in out
    assert not file.exists()
    run_pytest("--minutes", "10", interpret=False, root=folder, LAUNCHES="5")
    assert launches(file) == {"first": 5, "second": 5}
    out = run_pytest("--minutes", "10", interpret=False, root=folder, LAUNCHES="6", expected=5)  # nothing is left
    assert launches(file) == {"first": 5, "second": 5}


def test_parts_of_a_run_meet_in_the_file_they_are_given(folder):
    for name, launched in (("first", "5"), ("second", "6"), ("first", "7")):
        out = run_pytest("-k", name, "--results", "parts.json", interpret=False, root=folder, LAUNCHES=launched)
    assert "Written: parts.json." in out
    assert launches(folder / "parts.json") == {"first": 7, "second": 6}
    refused = run_pytest("--results", "no/such/place.json", interpret=False, expected=4, root=folder)
    assert "results cannot be written to no/such" in refused
