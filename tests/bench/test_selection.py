"""The order of a run that may be cut short, and what is left of it."""

from types import SimpleNamespace

import pytest

from bench import results
from bench.selection import ModelCase, StepCase, in_turn


class Item:
    """What in_turn asks of pytest's items."""

    def __init__(self, case: ModelCase | StepCase | None = None, full: bool = False) -> None:
        self.full = full
        if case is not None:
            self.callspec = SimpleNamespace(params={"case": case})

    def get_closest_marker(self, name: str) -> bool | None:
        return self.full or None if name == "full" else None


def step(implementation: str, dtype: str = "bf16", full: bool = True, graphed: bool = False) -> Item:
    return Item(ModelCase("mlp", "gin", 500, dtype, implementation, graphed), full)


def row_of(item: Item, **more: object) -> results.Row:
    return {"kind": "timed", **item.callspec.params["case"].labels, **more}


counted = Item()
quick, eager, ours = step("eager", "tf32", full=False), step("eager"), step("fastnn")
compiled, autotuned = step("compile"), step("max-autotune-no-cudagraphs")
graphed = {name: step(name, graphed=True) for name in ("eager", "fastnn", "max-autotune")}
ALL = [autotuned, graphed["max-autotune"], compiled, graphed["fastnn"], ours, eager, graphed["eager"], quick, counted]


def test_what_is_not_timed_runs_first_then_what_is_quick_then_what_is_cheap():
    order = [counted, quick, ours, eager, compiled, graphed["fastnn"], graphed["eager"], autotuned]
    assert in_turn(ALL, []) == [*order, graphed["max-autotune"]]


def test_a_run_that_goes_on_runs_what_is_missing_and_ours_beside_it():
    there = [row_of(item) for item in (quick, eager, ours, compiled, graphed["eager"], graphed["fastnn"])]
    assert in_turn(ALL, there) == [autotuned, ours, graphed["max-autotune"], graphed["fastnn"]]
    assert in_turn(ALL, [row_of(item) for item in ALL if item is not counted]) == []


def test_ours_runs_where_it_is_missing_and_baselines_are_not():
    assert in_turn([eager, ours], [row_of(eager)]) == [ours]


@pytest.mark.parametrize("optimizer", ["Adam", "none"])
def test_rows_of_steps_are_told_apart(optimizer):
    theirs, mine = (Item(StepCase("mlp-60", "fp32", name, optimizer)) for name in ("foreach", "fastnn"))
    assert in_turn([theirs, mine], [row_of(mine)]) == [theirs, mine]
    assert in_turn([theirs, mine], [row_of(theirs), row_of(mine)]) == []


def test_ratios_of_both_parts_stay():
    first = row_of(ours, median_us=10.0, ratios={"eager": 3.0, "compile": 2.0}, bounds={"eager": 4.0})
    again = row_of(ours, median_us=11.0, ratios={"max-autotune-no-cudagraphs": 1.5}, bounds={})
    (found,) = results.joined([first], [again])
    assert again["ratios"] == {"max-autotune-no-cudagraphs": 1.5}  # what is joined is left as it was
    assert found["median_us"] == 11.0
    assert found["ratios"] == {"eager": 3.0, "compile": 2.0, "max-autotune-no-cudagraphs": 1.5}
    assert found["bounds"] == {"eager": 4.0}
