"""The gate before a timed row: right results pass, each wrong one is named, and nothing of it is timed or kept."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch import nn

from bench import bench_block, bench_clipping, bench_mlp, bench_optimizers, gate
from bench.models import Block
from bench.selection import ModelCase, StepCase
from bench.workloads import WORKLOADS
from fastnn import plans
from fastnn.kernels import launch

BLOCK = ModelCase("block", "tabular-odd", 1024, "fp32", "fastnn")
MLP = ModelCase("mlp", "recsys-fm", 2048, "bf16", "fastnn")
STEP = StepCase("mlp-60", "fp32", "fastnn", "AdamW")
CLIP = StepCase("mlp-60", "fp32", "fastnn")
BENCHES = {
    BLOCK: bench_block.bench_block,
    MLP: bench_mlp.bench_mlp,
    STEP: bench_optimizers.bench_optimizer,
    CLIP: bench_clipping.bench_clip_grad_norm,
}


class Benchmark:
    """As much of pytest-benchmark's fixture as a row uses; `timed` says whether it came to that."""

    def __init__(self) -> None:
        self.extra_info: dict = {}
        self.timed = False

    def pedantic(self, call, setup=None, rounds=1, iterations=1):
        self.timed = True
        args, kwargs = setup() if setup else ((), {})
        call(*args, **kwargs)
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=1e-3, iqr=1e-5, rounds=rounds))


def run_row(case) -> tuple[Benchmark, list[dict]]:
    benchmark, rows = Benchmark(), []
    bench_block.prepared.cache_clear()
    BENCHES[case](case, None, benchmark, rows.append)
    return benchmark, rows


@pytest.mark.parametrize("case", BENCHES, ids=str)
def test_a_right_result_is_timed(case):
    benchmark, (row,) = run_row(case)
    assert benchmark.timed
    assert benchmark.extra_info == row
    assert row["median_us"] == 1000
    assert row["gb_s"] == pytest.approx(row["bytes"] / 1e-3 / 1e9, abs=0.01)


def with_values(**changed):
    """A kernel that is given other numbers: functions of its own, by name."""

    def spoil(launcher):
        return lambda values, tiles: launcher(values | {n: change(values[n]) for n, change in changed.items()}, tiles)

    return spoil


def without_counting(launcher):
    def spoilt(values, tiles):
        (one,) = launcher(values, tiles)
        counting, place = one.by_triton, launch.FORWARD.index("batches")
        one.by_triton = lambda given, keep: counting((*given[:place], None, *given[place + 1 :]), keep)
        return [one]

    return spoilt


with_other_momentum = with_values(momentum=lambda momentum: 0.11)
with_other_rate = with_values(threshold=lambda _: 58982, keep_scale=lambda _: 10.0)
WRONG = [
    ("forward_columns", with_values(eps=lambda eps: eps + 2e-4), "out"),
    ("forward_columns", without_counting, "num_batches_tracked"),
    ("forward_columns", with_other_momentum, "running_mean"),
    ("forward_columns", with_other_rate, "dropout: the rate is"),
    ("backward_columns", with_values(keep_scale=lambda scale: 1.0001 * scale), "gradient of x"),
]


@pytest.mark.parametrize(("name", "spoil", "named"), WRONG)
def test_a_wrong_kernel_is_named_and_neither_timed_nor_kept(name, spoil, named, monkeypatch):
    monkeypatch.setattr(launch, name, spoil(getattr(launch, name)))
    benchmark, rows = Benchmark(), []
    bench_block.prepared.cache_clear()
    with plans.forced_plan("columns"), pytest.raises(AssertionError, match=named):
        bench_block.bench_block(BLOCK, None, benchmark, rows.append)
    assert not benchmark.timed
    assert rows == []


def doing_nothing(optimizer):
    return lambda: None


def taking_two(optimizer):
    step = optimizer.step
    return lambda: (step(), step())


def forgetting_state(optimizer):
    step = optimizer.step

    def forgetful():
        before = [state["exp_avg_sq"].clone() for state in optimizer.state.values()]
        step()
        for state, old in zip(optimizer.state.values(), before, strict=True):
            state["exp_avg_sq"].copy_(old)

    return forgetful


def poisoning_state(optimizer):
    step = optimizer.step
    return lambda: (step(), [state["exp_avg_sq"].fill_(float("nan")) for state in optimizer.state.values()])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (doing_nothing, "change of parameter 0"),
        (taking_two, "parameter 0"),
        (forgetting_state, "exp_avg_sq"),
        (poisoning_state, "exp_avg_sq of parameter 0: not finite|change of parameter 0"),
    ],
)
def test_a_wrong_step_is_named(spoil, named, dtype, monkeypatch):
    make_optimizer = bench_optimizers.make_optimizer

    def spoilt(*args, **settings):
        optimizer = make_optimizer(*args, **settings)
        optimizer.step()
        optimizer.step = spoil(optimizer)
        return optimizer

    monkeypatch.setattr(bench_optimizers, "make_optimizer", spoilt)
    benchmark, rows = Benchmark(), []
    with pytest.raises(AssertionError, match=named):
        bench_optimizers.bench_optimizer(replace(STEP, dtype=dtype), None, benchmark, rows.append)
    assert not benchmark.timed
    assert rows == []


def test_a_wrong_norm_is_named(monkeypatch):
    monkeypatch.setattr(bench_clipping, "clip_grad_norm_", lambda params, norm: nn.utils.clip_grad_norm_(params, 1.01))
    with pytest.raises(AssertionError, match="gradient 0"):
        run_row(CLIP)


@pytest.mark.parametrize(("place", "where"), [((slice(None), 7), "column"), ((7,), "row"), ((...,), " is")])
def test_what_nobody_wrote_is_not_taken_for_dropped(place, where):
    """In a miniature the gradients would tell; at a block's real size a few columns drown."""
    block = Block(WORKLOADS["tabular-odd"], 256, "fp32", "eager")
    before = nn.Sequential(*block.layers)
    out = block.forward().detach()
    assert gate.dropout_mask(block, before, block.x, out) is not None
    out[place] = 0
    with pytest.raises(AssertionError, match=f"the rate.* {where.strip()}"):
        gate.dropout_mask(block, before, block.x, out)


@pytest.mark.parametrize("implementation", ["eager", "fastnn"])
def test_steps_in_one_autocast_context_see_the_weights_of_the_step_before(implementation):
    """As a timed row's do, and the steps before a capture."""
    mlp, step = bench_mlp.prepared(replace(MLP, implementation=implementation), p=0.0)
    with mlp.precision():
        for _ in range(3):
            step()
        gate.check_mlp(mlp, step)
