"""The cost model's arithmetic by hand, and what must hold of it whatever its rates are."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import block_traffic

from fastnn import costs, plans
from fastnn.costs import Launch, Problem
from fastnn.dispatch import H100, Machine

A100 = Machine(108, 40 << 20, (8, 0))
MACHINES = [H100._replace(capability=capability) for capability in costs.RATES]


def problem(rule="batch_norm", M=1024, N=512, K=256, itemsize=2, arithmetic="half", **rest):
    return Problem(rule, M, N, K, itemsize, arithmetic, **rest)


def seconds(plan, machine=H100):
    return sum(costs.launch_seconds(launch, machine) for launch in plan)


def test_a_launch_takes_the_longest_of_its_parts():
    """On an H100: 3.35 TB/s, 5.5 TB/s from L2, 132 multiprocessors."""
    whole = {"accesses": 1, "programs": 132}
    assert costs.launch_seconds(Launch("nothing", dram=0, **whole), H100) == 2e-6
    assert costs.launch_seconds(Launch("memory", dram=3.35e9, **whole), H100) == pytest.approx(1e-3)
    assert costs.launch_seconds(Launch("L2", dram=1e9, l2=4.5e9, **whole), H100) == pytest.approx(1e-3)
    assert costs.launch_seconds(Launch("FLOP", dram=0, flops=1e12, rate=5e14, **whole), H100) == pytest.approx(2e-3)
    assert costs.launch_seconds(Launch("steps", dram=0, steps=10, **whole), H100) == pytest.approx(5e-6)


def test_few_programs_draw_few_shares():
    """33 of 132: twice their quarter of device memory, 2.5 times that of L2, a quarter of the FLOPs."""
    few = {"accesses": 1, "programs": 33}
    assert costs.launch_seconds(Launch("memory", dram=3.35e9, **few), H100) == pytest.approx(2e-3)
    assert costs.launch_seconds(Launch("L2", dram=0, l2=5.5e9, **few), H100) == pytest.approx(1e-3 / 0.625)
    assert costs.launch_seconds(Launch("FLOP", dram=0, flops=1e12, rate=5e14, **few), H100) == pytest.approx(8e-3)


def test_split_by_hand():
    """2^17 rows of 1024 in bf16 are 2^28 bytes: forward 1 and 2 accesses, backward 2 and 3."""
    plan = costs.candidates(problem("statistics", M=1 << 17, N=1024), H100)["split"]
    assert [launch.accesses for launch in plan] == [1, 2, 2, 3]
    assert seconds(plan) == pytest.approx(8 * 2**28 / 3.35e12)


def test_columns_by_hand():
    """Of 2^17 rows nothing is in L2 any more: 3 + 5 accesses by 64 programs, which draw 128 shares of 132.

    Of 2048 rows and 8192 features a forward's two tensors, 132 programs' of 32 columns, are 35 MB of L2's 50.
    """
    tall = costs.candidates(problem("statistics", M=1 << 17, N=1024), H100)["columns"]
    assert seconds(tall) == pytest.approx(8 * 2**28 / 3.35e12 * 132 / 128)
    forward, _ = costs.candidates(problem("statistics", M=2048, N=8192), H100)["columns"]
    assert (forward.dram, forward.l2) == (2 * 2**25, 2**25)
    in_registers, _ = costs.candidates(problem("statistics", M=1024, N=8192), H100)["columns"]
    assert (in_registers.dram, in_registers.l2) == (2 * 2**24, 0)


def test_whole_batch_by_hand():
    """7 programs of 16 columns each read x, 64 x 784 of bf16; the first from device memory."""
    (launch,) = costs.candidates(problem(M=64, N=100, K=784), H100)["whole_batch"]
    assert launch.programs == 7
    assert launch.dram == 2 * (64 * 784 + 100 * 784 + 2 * 64 * 100)
    assert launch.l2 == 6 * 2 * 64 * 784
    assert launch.flops == 2 * 64 * 112 * 784
    assert launch.rate == 0.6 * 989e12


def test_products_by_hand():
    """The library's fp32 runs on no tensor cores; ours makes six products of bf16."""
    fp32 = problem(M=1 << 17, N=1024, K=128, itemsize=4, arithmetic="ieee")
    found = costs.candidates(fp32, H100)
    library, *_ = found["split"]
    ours, apply = found["epilogue"]
    assert library.flops == ours.flops == 2 * 2**17 * 1024 * 128
    assert (library.rate, ours.rate) == (0.8 * 67e12, pytest.approx(0.6 * 989e12 / 6))
    assert library.dram == ours.dram == 4 * (2**17 * 128 + 1024 * 128 + 2**17 * 1024)
    assert (ours.accesses, apply.accesses) == (1, 2)


def test_gradients_by_hand():
    """dW in 2 x 25 tiles of 64 x 32 with a depth of 64 rows, dx in 1 x 25 with one of 100 features, in steps of 32."""
    found = costs.candidates(problem("linear_backward", M=64, N=100, K=784, itemsize=4, arithmetic="ieee"), H100)
    (grouped,), library = found["grouped"], found["library"]
    assert grouped.programs == 75
    assert grouped.flops == 2 * 64 * 32 * (50 * 64 + 25 * 100)
    assert grouped.steps == 4
    assert [launch.flops for launch in library] == [2 * 64 * 100 * 784] * 2
    (pipelined,) = costs.candidates(problem("linear_backward", M=64, N=100, K=784), H100)["grouped"]
    assert pipelined.steps == 0


def test_narrow_rows_slow_our_products():
    """Rows of 300 bf16 numbers are copied 8 bytes at a time, those of 343 two."""
    rates = [costs.candidates(problem(K=K), H100)["epilogue"][0].rate for K in (304, 300, 343)]
    assert [rate / rates[0] for rate in rates] == [1, 1 / 2, 1 / 8]


@pytest.mark.parametrize("case", block_traffic.TRAINING)
def test_accesses_are_those_the_interpreter_counts(case):
    """block_traffic.py holds what tests/bench/test_counted.py counts: 6, 8, 8, 11, 8, 10 and 7."""
    names, M, N, block = block_traffic.TRAINING[case]
    forward, *rest = names.split()
    sums = rest[0] if len(rest) == 2 else "split" if forward == "split" else "columns"
    norm = block.get("norm", "batch")
    shape = problem("batch_norm" if norm == "batch" else "linear", M, N, 8, 4, "ieee", norm=norm)
    launches = costs.candidates(shape, H100)[forward] + costs.backward_passes(shape, H100)[sums]
    products = 1 if "grouped" in rest else 2
    counted = dict(zip(block_traffic.TRAINING, (6, 8, 8, 11, 8, 10, 7), strict=True))
    assert sum(launch.accesses for launch in launches) + products == counted[case]


sizes = st.integers(1, 1 << 14)
problems = st.builds(
    Problem, st.sampled_from(sorted(plans.PLANS)), st.integers(1, 20).map(lambda n: 1 << n), sizes, sizes,
    st.just(4), st.sampled_from(["tf32", "ieee"]), st.sampled_from(["batch", "running", "none"]), st.booleans(),
)  # fmt: skip


@settings(deadline=None)
@given(problems, st.sampled_from(MACHINES))
def test_every_plan_costs_something_finite_and_no_less_than_its_launches(shape, machine):
    found = costs.candidates(shape, machine)
    assert set(found) <= set(plans.PLANS[shape.rule])
    for plan in found.values():
        assert len(plan) * costs.LAUNCH_SECONDS <= seconds(plan, machine) < math.inf


@settings(deadline=None)
@given(problems, st.sampled_from(MACHINES))
def test_more_rows_move_more_bytes(shape, machine):
    """They may take less time: more programs draw more bandwidth."""
    less, more = (costs.candidates(s, machine) for s in (shape, shape._replace(M=2 * shape.M)))
    for name in set(less) & set(more):
        assert sum(launch.dram for launch in less[name]) < sum(launch.dram for launch in more[name])


@settings(deadline=None)
@given(problems, st.sampled_from(MACHINES), st.sampled_from(["dram", "l2", "half", "tf32", "fp32"]))
def test_a_faster_machine_takes_no_longer(shape, machine, rate):
    before = {name: seconds(plan, machine) for name, plan in costs.candidates(shape, machine).items()}
    kept = costs.RATES[machine.capability]
    costs.RATES[machine.capability] = kept._replace(**{rate: 2 * getattr(kept, rate)})
    try:
        after = {name: seconds(plan, machine) for name, plan in costs.candidates(shape, machine).items()}
    finally:
        costs.RATES[machine.capability] = kept
    assert all(after[name] <= before[name] for name in before)


def test_rates_are_those_of_the_nearest_capability_below():
    assert costs.rates(A100) == costs.RATES[8, 0]
    for capability, known in (((8, 7), (8, 6)), ((10, 3), (10, 0)), ((11, 0), (10, 0)), ((12, 1), (12, 0))):
        assert costs.rates(A100._replace(capability=capability)) == costs.RATES[known]


def test_rates_are_in_one_order():
    """As tensor cores are faster than FMA, and L2 than device memory."""
    for rates in costs.RATES.values():
        assert rates.half > rates.tf32 >= rates.fp32
        assert rates.l2 > rates.dram
