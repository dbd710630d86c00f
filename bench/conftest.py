"""Benchmarks run one at a time, whatever the tests do."""


def pytest_xdist_auto_num_workers() -> int:
    return 0
