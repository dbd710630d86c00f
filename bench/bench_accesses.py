"""Accesses of [M, N] in a block, and bytes of an optimizer's step: what Triton's interpreter counts, on any machine."""

from pathlib import Path

from support import block_traffic, step_traffic
from support.processes import in_interpreter


def bench_block_traffic(record) -> None:
    record(in_interpreter(Path(block_traffic.__file__)))


def bench_step_traffic(record) -> None:
    record(in_interpreter(Path(step_traffic.__file__)))
