"""A whole training step: forward and backward of every block and the head, then AdamW's step.

The time that passes in a loop, the host's part included; each step takes another input. Graphed rows are one CUDA graph
a step, compared with one another only; but max-autotune, which graphs by itself, leaves the optimizer outside. Where
the batch varies, a row times one step with each of 16 sizes.
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
                setting = "mlp", workload.name, batch, dtype
                yield from (ModelCase(*setting, name) for name in UNGRAPHED)
                yield from (ModelCase(*setting, name, graphed=True) for name in GRAPHED)
        if workload.varying:  # not as a graph, whose sizes are fixed
            yield from (
                ModelCase("mlp", workload.name, None, dtype, name) for dtype in gpu.DTYPES for name in UNGRAPHED
            )


def quick(case: ModelCase) -> bool:
    """torch.compile in bf16 only: a row of it costs the ten seconds that it compiles."""
    dtypes = {"eager": ("tf32", "bf16"), "fastnn": ("tf32", "bf16"), "compile": ("bf16",)}
    return case.name in QUICK and case.dtype in dtypes.get(case.implementation, ())


def prepared(case: ModelCase, p: float) -> tuple[Mlp, Callable[[], None]]:
    mlp = Mlp(*case.size, case.dtype, case.implementation, case.graphed, p)
    if case.graphed and case.implementation != "max-autotune":
        with mlp.precision():
            return mlp, gpu.capture(mlp.step)
    return mlp, mlp.step


@choose(cases(), quick)
def bench_mlp(case: ModelCase, gpu_only: None, benchmark, record) -> None:
    workload, _ = case.size
    mlp, step = prepared(case, p=0.0)
    gate.check_mlp(mlp, step)
    if workload.p > 0:  # hidden layers show no mask: the whole result is checked without, the timed model's step alone
        mlp, step = prepared(case, workload.p)
        gate.check_finite_step(mlp, step)
    if case.batch is None:
        step = mlp.steps
    widths = workload.widths if workload.head is None else (*workload.widths, workload.head)
    labels = {**case.labels, "shape": " x ".join(map(str, (case.batch or "varying", *widths)))}
    with mlp.precision():
        models = ("fastnn", "eager", "compile", "max-autotune-no-cudagraphs", "max-autotune")
        work = {
            name: [kernel for M in mlp.batches for kernel in roofline.mlp(workload, M, case.dtype, name)]
            for name in models
        }
        record(timed_row(benchmark, labels, step, work, case.dtype))
