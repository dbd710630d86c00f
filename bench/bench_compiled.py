"""Registers, spills, instructions and access widths of the kernels, compiled for sm_80, sm_90 and sm_100."""

from support import compiled


def bench_compiled_kernels(record) -> None:
    record(compiled.rows())
