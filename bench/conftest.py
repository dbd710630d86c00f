"""Options, progress, and what is done with the rows of a run. Benchmarks run one at a time, whatever the tests do."""

import os
from collections import Counter
from pathlib import Path

import pytest

from bench import gpu, measure, report, results
from bench.progress import ROWS, Progress

BENCH = Path(__file__).parent
WAITS = "waits for a CUDA GPU"


def pytest_xdist_auto_num_workers() -> int:
    return 0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastnn's benchmarks")
    group.addoption("--full", action="store_true", help="every workload, dtype and implementation, not a selection")
    group.addoption("--results", metavar="FILE", help="where the results go; bench/results/DEVICE.json for a whole run")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("benchmarks run one at a time: leave out -n")
    config.addinivalue_line("filterwarnings", "default")  # a baseline's warning is no reason to lose its row
    config.option.benchmark_quiet = True  # its table is per call; ours, at the end, compares
    config.stash[ROWS] = []
    config.pluginmanager.register(Progress(config), "fastnn-progress")


def selection(config: pytest.Config) -> str:
    return "full" if config.getoption("full") else "quick"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    if not gpu.AVAILABLE and not gpu.REHEARSAL:
        for item in items:
            if "gpu_only" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason=WAITS))


@pytest.fixture
def gpu_only() -> None:
    """Of rows that are timed on a GPU."""


@pytest.fixture
def record(request: pytest.FixtureRequest):
    """Takes one row or a list of rows into the results."""

    def take(rows: results.Row | list[results.Row]) -> None:
        rows = rows if isinstance(rows, list) else [rows]
        request.config.stash[ROWS] += rows
        request.node.stash[ROWS] = rows

    return take


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info |= results.machine(selection(config))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    measure.add_ratios(session.config.stash[ROWS])


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    """The tables, what waits for a GPU, what became worse, and where the results went."""
    write, rows = terminalreporter.write_line, config.stash[ROWS]
    skipped = terminalreporter.stats.get("skipped", [])
    waiting = Counter(report.nodeid.split("::")[1].split("[")[0] for report in skipped if WAITS in str(report.longrepr))
    if gpu.REHEARSAL:
        write(f"A rehearsal: {len(rows)} rows ran and passed their gate; nothing was measured, nothing is kept.")
    elif rows:
        machine = results.machine(selection(config))
        if any(row["kind"] == "timed" for row in rows):
            machine |= {"copy_gb_s": round(gpu.copy_rate() / 1e9, 1)}
            machine |= {"gemm_tflop_s": {dtype: round(gpu.gemm_rate(dtype) / 1e12, 1) for dtype in gpu.DTYPES}}
        terminalreporter.section("results")
        for line in report.section(machine, rows, {}):
            write(line)
        keep(config, machine, rows, write)
    if waiting:
        write(f"Rows that wait for a CUDA GPU: {', '.join(f'{count} of {name}' for name, count in waiting.items())}.")


def keep(config: pytest.Config, machine: results.Row, rows: list[results.Row], write) -> None:
    """Names what became worse and writes the results of a whole run; those of part of one only where --results says."""
    whole = not (config.option.keyword or config.option.markexpr or config.option.collectonly)
    whole &= [Path(arg).resolve() for arg in config.args] == [BENCH]
    path = Path(config.getoption("results") or results.file_for(machine))
    if whole or config.getoption("results"):
        before = results.last_committed(results.file_for(machine))
        for regression in report.regressions(before, (machine, rows)) if before and whole else []:
            write(f"worse: {regression}", red=True)
        results.save(path, machine, rows)
        write(f"Written: {os.path.relpath(path)}." + " python -m bench puts it into README." * whole)
    else:
        write("Part of a run: nothing is kept; --results FILE would.")
