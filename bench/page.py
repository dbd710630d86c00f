"""A page to draw on: SVG that a README shows at 860 pixels, the same bytes from the same numbers.

Text stays text, in whatever font the reader has; it is laid out in DejaVu Sans, which is wider than most. Title and
legend have a strip above the panels and the machine one below them, so that neither covers a number.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

WIDTH = 9.0  # inches, of 96 pixels each in a browser
TITLE, LEGEND_LINE, FOOT = 0.38, 0.23, 0.26  # inches of the strips above and below the panels
LEGEND_COLUMNS = 5
# Okabe and Ito's colours, which colour-blind readers tell apart.
BLUE, ORANGE, SKY = "#0072B2", "#E69F00", "#56B4E9"
DTYPE_COLOURS = {"fp32": SKY, "tf32": ORANGE, "bf16": BLUE}
PALETTE = (ORANGE, "#009E73", "#D55E00", "#CC79A7")
MARKERS = "os^Dv<>P*X"
STYLE: list[Any] = ["default", {
    "svg.fonttype": "none", "svg.hashsalt": "fastnn", "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8,
    "figure.facecolor": "white", "savefig.facecolor": "white", "legend.fontsize": 8, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
}]  # fmt: skip


class Page:
    """A figure with room for title, legend and machine around its panels."""

    def __init__(self, title: str, machine: str, legend: Sequence[Artist], height: float) -> None:
        head = TITLE + LEGEND_LINE * math.ceil(len(legend) / LEGEND_COLUMNS)
        height += head + FOOT
        self.figure = Figure(figsize=(WIDTH, height), layout="constrained")
        panels = (0.005, FOOT / height, 0.99, 1 - (head + FOOT) / height)
        self.figure.get_layout_engine().set(rect=panels)  # type: ignore[union-attr, call-arg]
        self.figure.text(0.01, 1 - 0.1 / height, title, size=11, weight="bold", va="top", gid="title")
        self.figure.text(0.01, 0.08 / height, machine, size=7, color="0.35", gid="machine")
        if legend:
            place = (0.0, 1 - TITLE / height)
            look: dict[str, Any] = {"ncols": LEGEND_COLUMNS, "borderaxespad": 0.2}
            self.figure.legend(handles=legend, loc="upper left", bbox_to_anchor=place, **look)

    def panels(self, rows: int, columns: int, **shared: Any) -> list[Axes]:
        return list(self.figure.subplots(rows, columns, squeeze=False, **shared).flat)


def bars(
    axes: Axes, categories: Sequence[str], series: dict[str, dict[str, float]], colours: dict, start: float
) -> dict:
    """A group of horizontal bars for each category, from `start` on; {(series, category): its y}."""
    thick = 0.8 / len(series)
    places = {}
    for i, (name, values) in enumerate(series.items()):
        for place, category in enumerate(categories):
            if category in values:
                y = place + (i - (len(series) - 1) / 2) * thick
                axes.barh(y, values[category] - start, thick, start, color=colours[name])
                places[name, category] = y
    axes.set_yticks(range(len(categories)), categories)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(categories) - 0.4, -0.6)  # the first on top
    return places


def log_ticks(low: float, high: float, base: float = 10) -> list[float]:
    """Powers of the base between the two; of ten with steps between them where there would be few."""
    powers = range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)
    decades = math.log10(high / low)
    steps = (1,) if base != 10 or decades > 2.5 else (1, 3) if decades > 1 else (1, 2, 5)
    ticks = (step * base**power for power in powers for step in steps)
    return [tick for tick in ticks if low <= tick <= high]


def log_axis(axis: Any, ticks: Iterable[float]) -> None:
    """Plain numbers, at these places alone."""
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(lambda value, _: f"{value:,.12g}")


def title_of(figure: Figure) -> str:
    return next(text.get_text() for text in figure.texts if text.get_gid() == "title")


def save(figure: Figure, path: Path) -> None:
    with matplotlib.style.context(STYLE):
        figure.savefig(path, format="svg", metadata={"Title": title_of(figure), "Date": None, "Creator": None})
