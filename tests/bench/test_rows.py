"""The rows of the timed benches: which there are, what they are compared with, and what the model says of them."""

import pytest
import torch
from support.optimizers import HAS_FUSED, SEVEN

from bench import bench_block, bench_clipping, bench_mlp, bench_optimizers, bench_plans, measure, results, roofline
from bench.workloads import PARAMETERS, WORKLOADS
from fastnn import dispatch, plans


@pytest.fixture
def h100(monkeypatch):
    """The machine whose plans are expected, whatever is here."""
    monkeypatch.setattr(dispatch, "machine", lambda device: dispatch.H100)


CASES = {
    "block": list(bench_block.cases()),
    "mlp": list(bench_mlp.cases()),
    "optimizer": list(bench_optimizers.cases()),
    "clipping": list(bench_clipping.cases()),
}
SETTINGS = [(w.name, batch, dtype) for w in WORKLOADS.values() for batch in w.batches for dtype in roofline.ITEMSIZE]


@pytest.mark.parametrize("feature", CASES)
def test_no_two_rows_of_a_feature_are_the_same_row(feature):
    keys = [results.key({"kind": "timed", **case.labels}) for case in CASES[feature]]
    assert len(set(keys)) == len(keys)
    assert len({str(case) for case in CASES[feature]}) == len(keys)
    assert {case.labels["feature"] for case in CASES[feature]} == {feature}


@pytest.mark.parametrize("feature", ["block", "mlp"])
def test_each_workload_dtype_and_batch_meets_every_baseline_graphed_and_not(feature):
    found: dict = {}
    for case in CASES[feature]:
        if case.phase == "training step" and case.batch is not None:
            setting = found.setdefault((case.name, case.batch, case.dtype), {True: [], False: []})
            setting[case.graphed].append(case.implementation)
    assert sorted(found) == sorted(SETTINGS)
    for implementations in found.values():
        assert sorted(implementations[False]) == ["compile", "eager", "fastnn", "max-autotune-no-cudagraphs"]
        assert sorted(implementations[True]) == ["eager", "fastnn", "max-autotune"]


def test_each_optimizer_meets_every_step_of_torchs_on_every_list():
    plain = [case for case in CASES["optimizer"] if not case.graphed and case.dtype == "fp32"]
    for optimizer in SEVEN:
        for name in PARAMETERS:
            met = {case.implementation for case in plain if (case.optimizer, case.name) == (optimizer, name)}
            assert met == {"foreach", "compiled step", "fastnn"} | ({"fused"} if optimizer in HAS_FUSED else set())


def timed(implementation: str, median: float, graphed: bool = False, **labels) -> dict:
    bounds = {"bounds": {"eager": 3.0, "compile": 2.0}} if implementation == "fastnn" else {}
    labels = {"feature": "mlp", "phase": "training step", "workload": "gin", "batch": 500, "dtype": "bf16", **labels}
    return {
        "kind": "timed",
        **labels,
        "graphed": graphed,
        "implementation": implementation,
        "median_us": median,
    } | bounds


def test_ratios_are_of_rows_that_differ_in_the_implementation_alone():
    ours = timed("fastnn", 10.0)
    rows = [ours, timed("eager", 30.0), timed("eager", 70.0, graphed=True), timed("compile", 90.0, batch=9000)]
    rows += [timed("compile", 80.0, dtype="tf32"), timed("max-autotune", 60.0, graphed=True)]
    found, *others = measure.with_ratios(rows)
    assert found == ours | {"ratios": {"eager": 3.0}, "bounds": {"eager": 3.0}}
    assert others == rows[1:]
    *_, graphed = measure.with_ratios([*rows, timed("fastnn", 20.0, graphed=True)])
    assert graphed["ratios"] == {"eager": 3.5, "max-autotune": 3.0}


@pytest.mark.parametrize(
    ("M", "K", "plan", "accesses"),
    [(64, 700, "whole_batch", 4), (1000, 700, "columns", 5), (380_000, 700, "split", 8), (380_000, 500, "epilogue", 7)],
)
def test_the_model_moves_what_the_plans_are_counted_to_move(M, K, plan, accesses, h100):
    """Beyond the three of its products, with which tests/kernels/test_accesses.py counts 7, 8, 11 and 10."""
    N, itemsize = 512, 4
    assert plans.batch_norm_plan(M, N, K, torch.float32, bench_block.gpu.DEVICE) == plan
    step = roofline.block(M, K, N, "fp32", 0.5, "fastnn")["training step"]
    assert sum(kernel.flops for kernel in step) == 3 * 2 * M * N * K
    products = 3 * itemsize * (M * K + N * K + M * N)
    assert sum(kernel.bytes for kernel in step) == products + accesses * itemsize * M * N


@pytest.mark.parametrize(("M", "bytes_moved"), [(2000, 2 * (4 + 2)), (100, 3 * 2)])
def test_autocast_casts_operands_and_their_gradients(M, bytes_moved, h100):
    """Of a large product; of a small one they are fp32 in each of its three products."""
    K, N = 304, 30
    fp32, bf16 = (roofline.block(M, K, N, dtype, 0.5, "fastnn")["training step"] for dtype in ("fp32", "bf16"))
    casts = sum(kernel.bytes for kernel in bf16) - sum(kernel.bytes for kernel in fp32) // 2
    assert casts == bytes_moved * (M * K + N * K)


def test_a_kernel_takes_the_longest_of_memory_arithmetic_and_launch():
    kernels = [roofline.Kernel(0, 4000), roofline.Kernel(600, 10), roofline.Kernel(1, 1)]
    assert roofline.floor(kernels, bytes_rate=1000, flops_rate=100) == 4 + 6 + 0.01
    assert roofline.floor(kernels, bytes_rate=1000, flops_rate=100, launch=5) == 5 + 6 + 5


def test_the_model_gives_no_baseline_less_work_than_ours():
    for name, batch, dtype in SETTINGS:
        models = {
            implementation: roofline.mlp(WORKLOADS[name], batch, dtype, implementation)
            for implementation in ("fastnn", "eager", "compile")
        }
        times = {name: roofline.floor(kernels, 4e12, 8e14, 2e-6) for name, kernels in models.items()}
        assert times["eager"] > times["compile"] >= times["fastnn"], (name, batch, dtype)


@pytest.mark.parametrize("dtype", roofline.ITEMSIZE)
def test_each_block_has_a_row_for_what_is_chosen_with_the_models_inputs(dtype, h100, monkeypatch):
    """Counted: without a GPU, and in no rehearsal."""
    for name in ("AVAILABLE", "REHEARSAL"):
        monkeypatch.setattr(bench_plans.gpu, name, False)
    with bench_plans.gpu.precision(dtype):
        rows = [row for workload in WORKLOADS.values() for row in bench_plans.rows_of(workload, dtype)]
    blocks = sum(len(set(workload.blocks)) * len(workload.batches) for workload in WORKLOADS.values())
    assert len({results.key(row) for row in rows}) == len(rows) == 3 * blocks
    for row in rows:
        best = min(us["model_us"] for name, us in row["candidates"].items() if name not in row["untrusted"])
        assert row["candidates"][row["plan"]]["model_us"] == best
        assert "regret" not in row
    (tall,) = (row for row in rows if (row["workload"], row["what"]) == ("pointnet", "sums"))
    size = 131_072 * 1024 * roofline.ITEMSIZE[dtype]
    split = {"launches": 4, "bytes": 8 * size, "l2_bytes": 0, "flops": 0}
    assert {name: tall["candidates"]["split"][name] for name in split} == split


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_rehearsal_times_every_candidate(dtype, monkeypatch):
    monkeypatch.setattr(bench_plans.gpu, "REHEARSAL", True)
    with bench_plans.gpu.precision(dtype):
        rows = list(bench_plans.rows_of(WORKLOADS["notes-mlp"], dtype))
    assert rows
    for row in rows:
        assert row["measured_us"].keys() == row["candidates"].keys()
        assert row["regret"] == pytest.approx(
            row["measured_us"][row["plan"]] / min(row["measured_us"].values()), abs=1e-3
        )
