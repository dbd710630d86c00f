"""One Linear + BatchNorm1d + ReLU + Dropout: forward, backward, training step, and the forward in eval mode.

Forward, backward and eval are the device's time, from memory that is not in L2. The training step is the time that
passes in a loop, the host's part included; its graphed rows are compared with one another only.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

from bench import gate, gpu, roofline
from bench.measure import timed_row
from bench.models import GRAPHED, UNGRAPHED, Block
from bench.selection import ModelCase, choose
from bench.workloads import WORKLOADS

QUICK = ("notes-mlp", "mag240m", "recsys-fm", "tabular-odd")
PHASES = ("forward", "backward", "eval", "training step")


def cases() -> Iterator[ModelCase]:
    """The phase changes fastest: its phases share one compiled block."""
    for workload in WORKLOADS.values():
        for batch in workload.batches:
            for dtype in gpu.DTYPES:
                setting = "block", workload.name, batch, dtype
                yield from (ModelCase(*setting, name, phase=phase) for name in UNGRAPHED for phase in PHASES)
                yield from (ModelCase(*setting, name, graphed=True) for name in GRAPHED)


def quick(case: ModelCase) -> bool:
    measured = case.implementation in ("eager", "compile", "fastnn")
    return case.name in QUICK and case.dtype == "bf16" and measured and not case.graphed


@functools.lru_cache(maxsize=1)
def prepared(case: ModelCase) -> tuple[Block, Callable[[], None]]:
    """A block and its training step, which has passed the gate."""
    workload, (batch,) = case.size
    block = Block(workload, batch, case.dtype, case.implementation)
    gate.settle_gates(block)
    step = block.step
    if case.graphed and case.implementation != "max-autotune":
        with block.precision():
            step = gpu.capture(block.step)
    gate.check_block(block, step)
    return block, step


@choose(cases(), quick)
def bench_block(case: ModelCase, gpu_only: None, benchmark, record) -> None:
    block, step = prepared(replace(case, phase="training step"))
    workload, (batch,) = case.size
    K, N = workload.blocks[0]
    labels = {**case.labels, "shape": f"{batch} x {K} x {N}"}
    call, prepare = {
        "forward": (block.forward, None),
        "backward": (block.backward, lambda: (block.forward(),)),
        "eval": (block.evaluate, None),
        "training step": (step, None),
    }[case.phase]
    if case.phase == "eval":
        gate.check_eval(block)
    try:
        with block.precision():
            models = ("fastnn", "eager", "compile", "max-autotune-no-cudagraphs", "max-autotune")
            work = {name: roofline.block(batch, K, N, case.dtype, workload.p, name)[case.phase] for name in models}
            record(timed_row(benchmark, labels, call, work, case.dtype, prepare))
    finally:
        block.layers.train()
