"""A line a row while `pytest bench` runs, in place of pytest's dots."""

import pytest

from bench import gpu
from bench.results import Row

ROWS = pytest.StashKey[list[Row]]()


class Progress:
    """What is running and, when it has run, what it found. On a terminal the line of a running row is overwritten."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.done = self.total = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        skipped = [item for item in session.items if item.get_closest_marker("skip")]
        self.total = len(session.items) - len(skipped)
        self.config.pluginmanager.getplugin("terminalreporter").showfspath = False  # the rows name themselves

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """No letter for what passes or waits; failures keep theirs."""
        if report.when == "call" and report.passed:
            return "passed", "", "PASSED"
        return ("skipped", "", "SKIPPED") if report.skipped else None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item):
        self.done += 1
        place = f"[{self.done:{len(str(self.total))}}/{self.total}]"
        self._write(f"{place} {item.name}", running=True)
        result = yield
        self._write(f"{place} {item.name}: {found(item.stash.get(ROWS, []))}")
        return result

    def _write(self, line: str, running: bool = False) -> None:
        reporter = self.config.pluginmanager.getplugin("terminalreporter")
        capture = self.config.pluginmanager.getplugin("capturemanager")
        if reporter is None or (running and not reporter.isatty):
            return
        with capture.global_and_fixture_disabled():
            if running:
                reporter.rewrite(line[: reporter._tw.fullwidth - 1], erase=True)
            else:
                if reporter.isatty:
                    reporter.rewrite("", erase=True)
                reporter.write_line(line)


def found(rows: list[Row]) -> str:
    if gpu.REHEARSAL:
        return "passed"
    if len(rows) != 1 or rows[0]["kind"] != "timed":
        return f"{len(rows)} rows"
    (row,) = rows
    return f"{row['median_us']:.1f} us, {row['gb_s']:.0f} GB/s ({row['copy_percent']:.0f} % of a copy)"
