"""Bytes that each workload's stack saves for its backward."""

from support import saved_bytes


def bench_saved_bytes(record) -> None:
    record(saved_bytes.rows())
