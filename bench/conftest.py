"""Options, progress, and what is done with the rows of a run. Benchmarks run one at a time, whatever the tests do."""

import os
import time

# Before torch starts CUPTI: stopped and started again between CUDA graphs, the profiler has crashed.
os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
os.environ.setdefault("TEARDOWN_CUPTI", "0")

from collections import Counter
from pathlib import Path

import pytest

from bench import gpu, measure, report, results
from bench.progress import ROWS, Progress
from bench.selection import in_turn

BENCH = Path(__file__).parent
MACHINE, PATH = pytest.StashKey[results.Row](), pytest.StashKey[Path]()
ALL, WHOLE = pytest.StashKey[int](), pytest.StashKey[bool]()  # rows of a whole run; whether this was one
EARLIER = pytest.StashKey[list[results.Row]]()  # of the run that this one goes on with
START = time.monotonic()
WAITS, NO_TIME = "waits for a CUDA GPU", "no time was left"


def pytest_xdist_auto_num_workers() -> int:
    return 0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastnn's benchmarks")
    group.addoption("--full", action="store_true", help="every workload, dtype and implementation, not a selection")
    group.addoption(
        "--results",
        metavar="FILE",
        help="where the rows go; rows that the same machine, versions and commit have put there already stay "
        "(a whole run without this option: bench/results/DEVICE.json)",
    )
    group.addoption(
        "--minutes",
        type=float,
        metavar="N",
        help="start no row after so many, cheap rows first; run again, it goes on where it ended, by the results "
        "(without --results bench/results/DEVICE.json)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("benchmarks run one at a time: leave out -n")
    config.addinivalue_line("filterwarnings", "default")  # a baseline's warning is no reason to lose its row
    config.option.benchmark_quiet = True  # its table is per call; ours, at the end, compares
    config.stash[ROWS] = []
    config.stash[MACHINE] = machine = results.machine("full" if config.getoption("full") else "quick")
    if config.getoption("minutes") and not config.getoption("results"):
        config.option.results = str(results.file_for(machine))
    config.stash[PATH] = path = Path(config.getoption("results") or results.file_for(machine))
    config.stash[EARLIER] = []
    if config.getoption("results"):
        parts = results.earlier(path, machine), results.earlier(partial(path), machine)  # the latter of one cut off
        config.stash[EARLIER] = results.joined(*parts)
    if not os.access(path.parent, os.W_OK):
        raise pytest.UsageError(f"results cannot be written to {path.parent}")
    config.pluginmanager.register(Progress(config), "fastnn-progress")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What was not asked for, or has run already, is left out; the rest in turn."""
    if not config.getoption("full"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    items[:] = in_turn(items, config.stash[EARLIER] if config.getoption("minutes") else [])
    config.stash[ALL] = len(items)
    if not gpu.AVAILABLE and not gpu.REHEARSAL:
        for item in items:
            if "gpu_only" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason=WAITS))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("minutes")
    if minutes and time.monotonic() - START > 60 * minutes:
        pytest.skip(NO_TIME)


@pytest.fixture
def gpu_only() -> None:
    """Of rows that are timed on a GPU."""


@pytest.fixture
def record(request: pytest.FixtureRequest):
    """Takes one row or a list of rows into the results, and into a file at once: a run that is cut off leaves them."""

    def take(rows: results.Row | list[results.Row]) -> None:
        rows = rows if isinstance(rows, list) else [rows]
        stash = request.config.stash
        stash[ROWS] += rows
        request.node.stash[ROWS] = rows
        if not gpu.REHEARSAL:
            so_far = results.joined(stash[EARLIER], measure.with_ratios(stash[ROWS]))
            results.save(partial(stash[PATH]), stash[MACHINE], so_far)

    return take


def partial(path: Path) -> Path:
    return path.with_suffix(".partial.json")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info |= config.stash[MACHINE]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = Path(session.config.args[0]).resolve()
    whole = exitstatus == 0 and len(session.config.args) == 1 and path == BENCH
    whole = whole and session.config.getoption("minutes") is None
    session.config.stash[WHOLE] = whole and session.testscollected == session.config.stash[ALL]


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    """The tables, what has not run, what became worse, and where the results went."""
    write, machine = terminalreporter.write_line, config.stash[MACHINE]
    rows = measure.with_ratios(config.stash[ROWS])
    skipped = terminalreporter.stats.get("skipped", [])

    def rows_skipped(reason: str) -> str:
        names = [report.nodeid.split("::")[1].split("[")[0] for report in skipped if reason in str(report.longrepr)]
        return ", ".join(f"{count} of {name}" for name, count in Counter(names).items())

    if gpu.REHEARSAL:
        write(f"A rehearsal: {len(rows)} rows ran and passed their gate; nothing was measured, nothing is kept.")
    elif rows:
        if any(row["kind"] == "timed" for row in rows):
            machine |= {"copy_gb_s": round(gpu.copy_rate() / 1e9, 1)}
            machine |= {"gemm_tflop_s": {dtype: round(gpu.gemm_rate(dtype) / 1e12, 1) for dtype in gpu.DTYPES}}
        terminalreporter.section("results")
        for line in report.section(machine, rows, {}):
            write(line)
        keep(config, machine, rows, write)
    if waiting := rows_skipped(WAITS):
        write(f"Rows that wait for a CUDA GPU: {waiting}.")
    if left := rows_skipped(NO_TIME):
        write(f"Rows for which no time was left: {left}. The same command goes on with them.")


def keep(config: pytest.Config, machine: results.Row, rows: list[results.Row], write) -> None:
    """Writes the results where --results says, or those of a whole run into the device's file.

    Others stay in a partial file, so that they replace nothing. Of a whole run it names what became worse.
    """
    path = config.stash[PATH]
    if config.stash[WHOLE]:
        before = results.last_committed(results.file_for(machine))
        for regression in report.regressions(before, (machine, rows)) if before else []:
            write(f"worse: {regression}", red=True)
    if config.getoption("results"):
        rows = results.joined(config.stash[EARLIER], rows)
    elif not config.stash[WHOLE]:
        path = partial(path)
    results.save(path, machine, rows)
    if path != partial(config.stash[PATH]):
        partial(config.stash[PATH]).unlink(missing_ok=True)
        write(f"Written: {os.path.relpath(path)}.")
    else:
        write(f"Part of a run, or one with failures: in {os.path.relpath(path)} until the next.")
