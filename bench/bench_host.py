"""Host time of an optimizer's step and of a block: wall-clock without a GPU, of launches that only count."""

from pathlib import Path

from support import host_time
from support.processes import without_interpreter


def bench_host_time(record) -> None:
    record(without_interpreter(Path(host_time.__file__)))
