"""`pytest bench` as a command: progress, what waits for a GPU, a rehearsal, and what happens to the results."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from bench import conftest, results

MACHINE = {"device": "no GPU", "selection": "quick", "commit": "new"}


def run_pytest(*arguments: str, interpret: bool, expected: int = 0) -> str:
    # An xdist worker's own variables would tell pytest-benchmark that it runs in parallel.
    ours = ("TRITON_INTERPRET", "PYTEST_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    command = [sys.executable, "-m", "pytest", "bench", *arguments]
    done = subprocess.run(command, cwd=results.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_rows_side_by_side_are_refused():
    out = run_pytest("-n", "2", "-k", "bench_clip", interpret=True, expected=4)
    assert "benchmarks run one at a time: leave out -n" in out


def test_rows_that_wait_for_a_gpu_are_named():
    if conftest.gpu.AVAILABLE:
        pytest.skip("there is a GPU to run them")
    out = run_pytest("-k", "bench_clip_grad_norm", interpret=False)
    assert "Rows that wait for a CUDA GPU: 8 of bench_clip_grad_norm." in out
    assert "8 skipped" in out


def test_a_rehearsal_runs_rows_of_every_feature_and_keeps_nothing():
    chosen = "tabular-odd and bf16 and not graphed or SGD and mlp-60 or bench_clip and mlp-60"
    out = run_pytest("-k", chosen, interpret=True)
    assert "[ 1/20] bench_block[tabular-odd 1024 bf16 eager forward]: passed" in out
    assert "[20/20] bench_optimizer[SGD mlp-60 fp32 fastnn]: passed" in out
    assert "A rehearsal: 20 rows ran and passed their gate; nothing was measured, nothing is kept." in out
    assert "written" not in out


class Config:
    """As much of pytest's as `keep` asks."""

    def __init__(self, keyword: str = "", results: str | None = None, args: tuple[str, ...] = ("bench",)) -> None:
        self.option = SimpleNamespace(keyword=keyword, markexpr="", collectonly=False)
        self.args = args
        self.getoption = {"results": results}.get


def counted(value: int) -> dict:
    row = {"kind": "counted", "figure": "launches", "case": "a step", "implementation": "fastnn", "value": value}
    return row | {"unit": "launches", "better": "lower"}


@pytest.fixture
def written(monkeypatch, tmp_path):
    """What `keep` says, with a results folder of its own and a committed run of 9 launches."""
    monkeypatch.chdir(results.ROOT)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(conftest, "BENCH", results.ROOT / "bench")
    monkeypatch.setattr(results, "last_committed", lambda path: (MACHINE | {"commit": "old"}, [counted(9)]))
    said: list[str] = []
    return SimpleNamespace(said=said, write=lambda line, **markup: said.append(line), file=tmp_path / "no-gpu.json")


def test_a_whole_run_is_written_and_compared_with_the_last_committed_one(written):
    conftest.keep(Config(), MACHINE, [counted(10)], written.write)
    assert results.load(written.file) == (MACHINE, [counted(10)])
    (worse,) = [line for line in written.said if line.startswith("worse: ")]
    assert "9 -> 10" in worse
    assert "old -> new" in worse
    written.said.clear()
    conftest.keep(Config(), MACHINE, [counted(9)], written.write)
    assert not [line for line in written.said if line.startswith("worse: ")]


@pytest.mark.parametrize("config", [Config(keyword="sgd"), Config(args=("bench/bench_mlp.py",))], ids=["-k", "file"])
def test_part_of_a_run_replaces_nothing(config, written):
    conftest.keep(config, MACHINE, [counted(10)], written.write)
    assert not written.file.exists()
    assert written.said == ["Part of a run: nothing is kept; --results FILE would."]


def test_part_of_a_run_goes_where_it_is_told(written, tmp_path):
    conftest.keep(Config(keyword="sgd", results=str(tmp_path / "part.json")), MACHINE, [counted(10)], written.write)
    assert results.load(tmp_path / "part.json") == (MACHINE, [counted(10)])
    assert not written.file.exists()
