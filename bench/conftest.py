"""Options, progress, and what is done with the rows of a run. Benchmarks run one at a time, whatever the tests do."""

import os

# Before torch starts CUPTI: stopped and started again between CUDA graphs, the profiler has crashed.
os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
os.environ.setdefault("TEARDOWN_CUPTI", "0")

from collections import Counter
from pathlib import Path

import pytest

from bench import gpu, measure, report, results
from bench.progress import ROWS, Progress

BENCH = Path(__file__).parent
MACHINE, PATH = pytest.StashKey[results.Row](), pytest.StashKey[Path]()
ALL, WHOLE = pytest.StashKey[int](), pytest.StashKey[bool]()  # rows of a whole run; whether this was one
WAITS = "waits for a CUDA GPU"


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


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("benchmarks run one at a time: leave out -n")
    config.addinivalue_line("filterwarnings", "default")  # a baseline's warning is no reason to lose its row
    config.option.benchmark_quiet = True  # its table is per call; ours, at the end, compares
    config.stash[ROWS] = []
    config.stash[MACHINE] = machine = results.machine("full" if config.getoption("full") else "quick")
    config.stash[PATH] = path = Path(config.getoption("results") or results.file_for(machine))
    if not os.access(path.parent, os.W_OK):
        raise pytest.UsageError(f"results cannot be written to {path.parent}")
    config.pluginmanager.register(Progress(config), "fastnn-progress")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Graphed rows last: a capture that fails may leave CUDA's generator unusable."""
    if not config.getoption("full"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    items.sort(key=lambda item: " graphed" in item.name)
    config.stash[ALL] = len(items)
    if not gpu.AVAILABLE and not gpu.REHEARSAL:
        for item in items:
            if "gpu_only" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason=WAITS))


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
            results.save(partial(stash[PATH]), stash[MACHINE], stash[ROWS])

    return take


def partial(path: Path) -> Path:
    return path.with_suffix(".partial.json")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info |= config.stash[MACHINE]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    measure.add_ratios(session.config.stash[ROWS])
    path = Path(session.config.args[0]).resolve()
    whole = exitstatus == 0 and len(session.config.args) == 1 and path == BENCH
    session.config.stash[WHOLE] = whole and session.testscollected == session.config.stash[ALL]


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    """The tables, what waits for a GPU, what became worse, and where the results went."""
    write, rows, machine = terminalreporter.write_line, config.stash[ROWS], config.stash[MACHINE]
    skipped = terminalreporter.stats.get("skipped", [])
    waiting = Counter(report.nodeid.split("::")[1].split("[")[0] for report in skipped if WAITS in str(report.longrepr))
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
    if waiting:
        write(f"Rows that wait for a CUDA GPU: {', '.join(f'{count} of {name}' for name, count in waiting.items())}.")


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
        rows = results.merged(path, machine, rows)
    elif not config.stash[WHOLE]:
        path = partial(path)
    results.save(path, machine, rows)
    if path != partial(config.stash[PATH]):
        partial(config.stash[PATH]).unlink(missing_ok=True)
        write(f"Written: {os.path.relpath(path)}.")
    else:
        write(f"Part of a run, or one with failures: in {os.path.relpath(path)} until the next.")
