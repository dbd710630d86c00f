"""Rows of figures that are exact without a GPU, as bench/results.py describes them."""

from typing import Any

Row = dict[str, Any]


def counted(
    figure: str, case: str, unit: str, ours: float, eager: float | None = None, better: str = "lower"
) -> list[Row]:
    """A row of ours and, where eager PyTorch was counted too, one of its own and the ratio to it."""
    what = {"kind": "counted", "figure": figure, "case": case}
    row = {**what, "implementation": "fastnn", "value": ours, "unit": unit, "better": better}
    if eager is None:
        return [row]
    if ours:
        row["ratios"] = {"eager": eager / ours}
    return [{**what, "implementation": "eager", "value": eager, "unit": unit, "better": better}, row]
