"""What is worse or gone between two hand-made runs is named; noise, improvements and new rows are not."""

import pytest
from support.made_up_results import counted, host, machine, plan, timed

from bench import report

OLD = machine(commit="1111111"), [
    timed("eager", 30.0), timed("fastnn", 10.0, ratios={"eager": 3.0}),
    counted("accesses", "columns", 8), counted("accesses", "columns", 21, "eager"),
    counted("wide", "columns", 100, better="higher"),
    host(60, "fused", 100.0), host(60, "fastnn", 10.0, ratios={"fused": 10.0}),
    plan("moco", regret=1.1),
]  # fmt: skip


def changed(position: int, **change) -> report.Run:
    rows = [row | change if i == position else row for i, row in enumerate(OLD[1])]
    return machine(commit="2222222"), rows


def without(position: int) -> report.Run:
    return machine(commit="2222222"), [row for i, row in enumerate(OLD[1]) if i != position]


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (changed(1, median_us=10.6), ["mlp", "training step", "notes-mlp (64)", "bf16", "ungraphed", "10.00", "10.60"]),
        (changed(2, value=9), ["accesses", "columns", "8 -> 9"]),
        (changed(4, value=99), ["wide", "columns", "100 -> 99"]),
        (changed(6, ratios={"fused": 7.9}), ["Adam, 60 tensors", "fused", "10.00", "7.90"]),
        (
            changed(7, plan="columns", regret=1.2),
            ["forward, moco (64), 784 x 100, bf16", "1.10", "columns, 1.20"],
        ),
        *[(without(i), ["vanished"]) for i in range(len(OLD[1]))],
    ],
)
def test_what_is_worse_or_gone_is_named_with_both_commits(new, words):
    (sentence,) = report.regressions(OLD, new)
    for word in [*words, "1111111", "2222222"]:
        assert word in sentence


@pytest.mark.parametrize(
    "new",
    [
        OLD,
        changed(1, median_us=10.4),  # within 5 %
        changed(1, median_us=11.4, iqr_us=3.0),  # 14 %, and three standard errors are 14.7 %
        changed(1, median_us=5.0),
        changed(0, median_us=60.0),  # torch's own affair
        changed(2, value=7),
        changed(3, value=24),
        changed(4, value=101),
        changed(6, ratios={"fused": 8.1}),
        changed(6, ratios={"fused": 30.0}),
        changed(7, plan="columns", regret=1.0),
        changed(7, regret=1.15),
        (OLD[0], [*OLD[1], timed("fastnn", 99.0, graphed=True), counted("new", "figure", 5)]),
    ],
)
def test_noise_improvements_new_rows_and_baselines_are_not(new):
    assert report.regressions(OLD, new) == []


def test_noise_is_judged_by_the_noisier_run():
    noisy = [row | {"iqr_us": 3.0} if row["kind"] == "timed" else row for row in OLD[1]]
    assert report.regressions((OLD[0], noisy), changed(1, median_us=11.5)) == []
    assert report.regressions((OLD[0], noisy), changed(1, median_us=12.0)) != []


def test_another_device_is_compared_by_what_is_exact():
    slower = changed(1, median_us=99.0)
    other = machine(device="Another GPU")
    assert report.regressions(OLD, slower) != []
    assert report.regressions(OLD, (other, slower[1])) == []
    assert report.regressions(OLD, (other, without(1)[1])) == []
    assert len(report.regressions(OLD, (other, changed(2, value=9)[1]))) == 1


def test_rows_of_two_optimizers_are_two():
    step = {"feature": "optimizer", "phase": "step"}
    old = [timed("fastnn", 10.0, optimizer=name, **step) for name in ("SGD", "Adam")]
    new = [timed("fastnn", median, optimizer=name, **step) for name, median in (("SGD", 20.0), ("Adam", 10.0))]
    (sentence,) = report.regressions((machine(), old), (machine(), new))
    assert "SGD" in sentence
