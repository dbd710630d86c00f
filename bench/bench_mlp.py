"""A whole training step: forward and backward of every block and the head, then AdamW's step.

The time that passes in a loop, the host's part included, over inputs that lie beyond L2 together. Graphed rows are one
CUDA graph a step, compared with one another only.
"""

from collections.abc import Callable, Iterator

from bench import gate, gpu, roofline
from bench.measure import timed_row
from bench.models import GRAPHED, UNGRAPHED, Mlp
from bench.selection import ModelCase, choose
from bench.workloads import WORKLOADS

QUICK = ("notes-mlp", "mag240m", "recsys-fm", "tabular-odd", "crossq", "gin")


def cases() -> Iterator[ModelCase]:
    for workload in WORKLOADS.values():
        for batch in workload.batches:
            for dtype in gpu.DTYPES:
                setting = workload.name, batch, dtype
                yield from (ModelCase(*setting, name) for name in UNGRAPHED)
                yield from (ModelCase(*setting, name, graphed=True) for name in GRAPHED)
        if workload.varying:  # not as a graph, whose sizes are fixed
            yield from (ModelCase(workload.name, None, dtype, name) for dtype in gpu.DTYPES for name in UNGRAPHED)


def quick(case: ModelCase) -> bool:
    return case.name in QUICK and case.dtype in ("tf32", "bf16") and "max-autotune" not in case.implementation


def prepared(case: ModelCase, p: float) -> tuple[Mlp, Callable[[], None]]:
    mlp = Mlp(*case.size, case.dtype, case.implementation, case.graphed, p)
    if case.graphed and case.implementation != "max-autotune":
        with mlp.precision():
            return mlp, gpu.capture(mlp.step)
    return mlp, mlp.step


@choose(cases(), quick)
def bench_mlp(case: ModelCase, gpu_only: None, benchmark, record) -> None:
    workload, batches = case.size
    gate.check_mlp(*prepared(case, p=0.0))  # hidden layers show no mask; a single block's rows check theirs
    mlp, step = prepared(case, workload.p)
    itemsize = roofline.ITEMSIZE[case.dtype]
    batch = sum(batches) // len(batches)  # on average, where it varies
    models = ("fastnn", "eager", "compile", "max-autotune-no-cudagraphs", "max-autotune")
    work = {name: roofline.mlp(workload, batch, itemsize, name) for name in models}
    widths = workload.widths if workload.head is None else (*workload.widths, workload.head)
    labels = {"feature": "mlp", **case.labels, "shape": " x ".join(map(str, (case.batch or "varying", *widths)))}
    with mlp.precision():
        record(timed_row(benchmark, labels, step, work, case.dtype))
