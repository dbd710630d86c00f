"""Results nobody measured, to test the report on: every workload and figure, with numbers by formula."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from bench.models import GRAPHED, UNGRAPHED
from bench.workloads import WORKLOADS
from support.optimizers import HAS_FUSED, SEVEN

Row = dict[str, Any]
Run = tuple[Row, list[Row]]
LISTS = {"notes-mlp": (6, 89_610), "mlp-60": (60, 1 << 20), "barlow": (9, 151 << 20), "transformer": (300, 350 << 20)}
HOST = "host time of an optimizer step"


def machine(**changed: Any) -> Row:
    made_up = {
        "device": "Made-Up GPU", "selection": "quick", "cpu": "Made-Up CPU @ 2.70GHz", "python": "3.12.1",
        "torch": "2.13.0", "triton": "3.9.0", "commit": "0123abc", "date": "2001-02-03", "copy_gb_s": 4000.0,
        "gemm_tflop_s": {"fp32": 50.0, "tf32": 400.0, "bf16": 700.0},
    }  # fmt: skip
    return made_up | changed


def timed(implementation: str, median_us: float, **changed: Any) -> Row:
    """A row of notes-mlp's training step unless changed."""
    row = {
        "kind": "timed", "feature": "mlp", "phase": "training step", "workload": "notes-mlp", "batch": 64,
        "dtype": "bf16", "graphed": False, "implementation": implementation, "median_us": median_us,
        "iqr_us": 0.01 * median_us, "rounds": 25, "bytes": 10**6, "flops": 10**8, "tflop_s": 100 / median_us,
    }  # fmt: skip
    return row | changed


def counted(figure: str, case: str, value: float, implementation: str = "fastnn", **changed: Any) -> Row:
    row = {"figure": figure, "case": case, "implementation": implementation, "value": value, "unit": "accesses"}
    return {"kind": "counted", **row, "better": "lower"} | changed


def host(tensors: int, implementation: str, best_us: float, **changed: Any) -> Row:
    row = {"figure": HOST, "case": f"Adam, {tensors} tensors", "implementation": implementation}
    return {"kind": "host", **row, "best_us": best_us} | changed


def plan(workload: str, **changed: Any) -> Row:
    """The forward's of one block, unless changed."""
    row = {"workload": workload, "batch": 64, "shape": "784 x 100", "dtype": "bf16", "implementation": "fastnn"}
    candidates = {
        name: {"launches": 1 + i, "model_us": 2.0 + 2 * i} for i, name in enumerate(("whole_batch", "columns"))
    }
    return {"kind": "plan", "what": "forward", **row, "plan": "whole_batch", "candidates": candidates} | changed


def plans() -> Iterator[Row]:
    for name, dtype in product(WORKLOADS, ("fp32", "tf32", "bf16")):
        yield plan(name, dtype=dtype)
        yield plan(name, dtype=dtype, what="sums", plan="columns")


def training_steps() -> Iterator[Row]:
    sizes = [(workload.name, batch) for workload in WORKLOADS.values() for batch in workload.batches]
    for i, ((name, batch), dtype, graphed) in enumerate(product(sizes, ("fp32", "tf32", "bf16"), (False, True))):
        setting = {"workload": name, "batch": batch, "dtype": dtype, "graphed": graphed}
        ours = 20.0 + 7 * i
        ratios = {
            baseline: round(0.93 + (1 + i % 13) / (3 + 4 * j), 3)
            for j, baseline in enumerate(GRAPHED if graphed else UNGRAPHED)
            if baseline != "fastnn"
        }
        yield from (timed(baseline, ours * ratio, **setting) for baseline, ratio in ratios.items())
        bounds = {baseline: round(ratio * 1.2 + 0.1, 3) for baseline, ratio in ratios.items()}
        work = {"flops": 10**8 * (i + 1) ** 2, "tflop_s": 0.1 * (i + 1) ** 1.4, "bytes": 10**7}
        yield timed("fastnn", ours, **setting, ratios=ratios, bounds=bounds, **work)
        for phase in ("forward", "backward", "training step", "eval"):
            block = setting | {"feature": "block", "phase": phase, "ratios": ratios, "bounds": bounds}
            yield timed("fastnn", ours, **block, **work | {"bytes": 10**8 // len(phase)})


def optimizer_steps() -> Iterator[Row]:
    for optimizer, (name, (tensors, parameters)), dtype, graphed in product(
        SEVEN, LISTS.items(), ("fp32", "bf16"), (False, True)
    ):
        if optimizer == "Adagrad" and graphed:
            continue
        size = {"tensors": tensors, "parameters": parameters, "optimizer": optimizer, "flops": 0, "batch": None}
        setting = {
            "feature": "optimizer",
            "phase": "step",
            "workload": name,
            **size,
            "dtype": dtype,
            "graphed": graphed,
        }
        ours = 5 + tensors / 10 + parameters / 1e6 * (7 if dtype == "fp32" else 4)
        ratios = {"foreach": 3.5 + tensors / 200}
        if optimizer in HAS_FUSED:
            ratios["fused"] = 1.1 + SEVEN.index(optimizer) / 50
        if not graphed:
            ratios["compiled step"] = 0.98 + tensors / 300
        yield from (timed(baseline, ours * ratio, **setting) for baseline, ratio in ratios.items())
        yield timed("fastnn", ours, **setting, ratios=ratios, bounds={})
    for name, (tensors, parameters) in LISTS.items():
        size = {"workload": name, "tensors": tensors, "parameters": parameters, "flops": 0, "batch": None}
        setting = {"feature": "clipping", "phase": "step", "optimizer": "none", "dtype": "fp32", **size}
        yield timed("foreach", 30.0, **setting)
        yield timed("fastnn", 12.0, **setting, ratios={"foreach": 2.5}, bounds={})


def counted_rows() -> Iterator[Row]:
    figure = "accesses of [M, N] in a training step"
    for i, plan in enumerate(("columns in registers", "columns streamed", "split", "without BatchNorm")):
        yield counted(figure, plan, 21, "eager")
        yield counted(figure, plan, 8 + i // 2)
    for i, (workload, dtype) in enumerate(product(WORKLOADS.values(), ("fp32", "bf16"))):
        for batch in workload.batches:
            case, unit = f"{workload.name}, {batch}, {dtype}", {"unit": "bytes"}
            yield counted("bytes saved for the backward", case, 10**6 * (i + 3), "eager", **unit)
            yield counted("bytes saved for the backward", case, 10**6, **unit)
    for i, (kernel, architecture) in enumerate(product(("forward", "backward", "step"), ("sm_80", "sm_90", "sm_100"))):
        case = f"{kernel}_kernel, 1024 x 1024, bf16, {architecture}"
        yield counted("registers per thread", case, 60 + i, unit="registers")
        yield counted("16-byte accesses", case, 100 - i, unit="%", better="higher")


def host_rows() -> Iterator[Row]:
    for tensors in (10, 60, 300):
        best = {"fastnn": 10 + tensors / 4, "fused": 50.0 + 2 * tensors, "foreach": 40.0 + 5 * tensors}
        ratios = {name: round(time / best["fastnn"], 3) for name, time in best.items() if name != "fastnn"}
        for name, time in best.items():
            yield host(tensors, name, time, **({"ratios": ratios} if name == "fastnn" else {}))


def with_gpu() -> Run:
    return machine(), [*training_steps(), *optimizer_steps(), *counted_rows(), *plans(), *host_rows()]


def without_gpu() -> Run:
    return machine(device="no GPU"), [*counted_rows(), *plans(), *host_rows()]
