"""The gate before a timed row: right results pass, each wrong one is named, and nothing of it is timed or kept."""

from types import SimpleNamespace

import pytest
from torch import nn

from bench import bench_block, bench_clipping, bench_mlp, bench_optimizers
from bench.selection import ModelCase, StepCase
from fastnn.kernels import launch

BLOCK = ModelCase("tabular-odd", 1024, "fp32", "fastnn")
MLP = ModelCase("recsys-fm", 2048, "bf16", "fastnn")
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


def with_first_result_scaled(launcher):
    def spoilt(*args):
        found = launcher(*args)
        found[0].mul_(1.0001)
        return found

    return spoilt


def without_counting(launcher):
    return lambda z, norm, epilogue, tiles: launcher(z, norm._replace(num_batches_tracked=None), epilogue, tiles)


def with_other_momentum(launcher):
    return lambda z, norm, epilogue, tiles: launcher(z, norm._replace(momentum=0.11), epilogue, tiles)


def with_other_rate(launcher):
    return lambda z, norm, epilogue, tiles: launcher(z, norm, epilogue._replace(p=0.9), tiles)


WRONG = [
    ("forward_columns", with_first_result_scaled, "out"),
    ("forward_columns", without_counting, "num_batches_tracked"),
    ("forward_columns", with_other_momentum, "running_mean"),
    ("forward_columns", with_other_rate, "dropout: rate"),
    ("backward_columns", with_first_result_scaled, "gradient of x"),
]


@pytest.mark.parametrize(("name", "spoil", "named"), WRONG)
def test_a_wrong_kernel_is_named_and_neither_timed_nor_kept(name, spoil, named, monkeypatch):
    monkeypatch.setattr(launch, name, spoil(getattr(launch, name)))
    benchmark, rows = Benchmark(), []
    bench_block.prepared.cache_clear()
    with pytest.raises(AssertionError, match=named):
        bench_block.bench_block(BLOCK, None, benchmark, rows.append)
    assert not benchmark.timed
    assert rows == []


def test_a_wrong_step_and_a_wrong_norm_are_named(monkeypatch):
    make_optimizer = bench_optimizers.make_optimizer

    def spoilt(name, params, *args, **settings):
        optimizer = make_optimizer(name, params, *args, **settings)
        step = optimizer.step
        optimizer.step = lambda: (step(), params[3].data.mul_(1.001))
        return optimizer

    monkeypatch.setattr(bench_optimizers, "make_optimizer", spoilt)
    with pytest.raises(AssertionError, match="parameter 3 after the step"):
        run_row(STEP)
    monkeypatch.setattr(bench_clipping, "clip_grad_norm_", lambda params, norm: nn.utils.clip_grad_norm_(params, 1.01))
    with pytest.raises(AssertionError, match="gradient 0"):
        run_row(CLIP)
