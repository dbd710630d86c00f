"""Results as figures, each of the rows it needs or none."""

import math
import re
from collections.abc import Callable, Iterable
from itertools import cycle, zip_longest
from typing import Any

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from bench.page import BLUE, DTYPE_COLOURS, MARKERS, PALETTE, STYLE, Page, bars, log_axis, log_ticks
from bench.results import Row
from bench.tables import DTYPES, OURS, cases_of, counted, dtypes_of, graphed_name, provenance, training_speedups

Styles = dict[Any, dict[str, Any]]  # of lines, as keywords of matplotlib's


def wrapped(baseline: str) -> str:
    """max-autotune-no-cudagraphs is wider than its panel."""
    return baseline.replace("-no-", "-\nno-")


def training_steps(machine: Row, rows: list[Row]) -> Figure | None:
    found = training_speedups(rows)
    if not found:
        return None
    columns, dtypes, cases = list(dict.fromkeys(key[:2] for key in found)), dtypes_of(found), cases_of(found)
    legend: list[Artist] = [Patch(color=DTYPE_COLOURS[dtype], label=DTYPES[dtype]) for dtype in dtypes]
    legend.append(Line2D([], [], color="black", marker="|", ls="", label="the roofline model's bound"))
    title = "Speed-up of an MLP's training step by fastnn"
    page = Page(title, provenance(machine), legend, 0.9 + len(cases) * (0.1 + 0.09 * len(dtypes)))
    ends = [end for of in found.values() for speedup in of.values() for end in speedup if end]
    low, high = min(0.8, 0.9 * min(ends)), max(2.2, 1.1 * max(ends))
    for axes, (graphed, baseline) in zip(page.panels(1, len(columns), sharey=True, sharex=True), columns, strict=True):
        series = {dtype: found.get((graphed, baseline, dtype), {}) for dtype in dtypes}
        axes.set(xscale="log", xlim=(low, high), xlabel="times as fast")
        ratios = {dtype: {case: speedup.ratio for case, speedup in of.items()} for dtype, of in series.items()}
        for (dtype, case), y in bars(axes, cases, ratios, DTYPE_COLOURS, start=1).items():
            if bound := series[dtype][case].beside:
                axes.plot(bound, y, "|", color="black", ms=5)
        axes.axvline(1, color="black", lw=0.8)
        log_axis(axes.xaxis, log_ticks(low, high, base=2))
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(f"over {wrapped(baseline)},\n{graphed_name(graphed)}")
    page.figure.axes[0].set_ylabel("workload (batch)")
    return page.figure


def roofline(machine: Row, rows: list[Row]) -> Figure | None:
    ours = [row for row in rows if row["kind"] == "timed" and row["implementation"] == OURS and row["flops"]]
    if not ours:
        return None
    kinds = list(dict.fromkeys((row["feature"], row["phase"]) for row in ours))
    markers = dict(zip(kinds, MARKERS, strict=False))
    copy, gemm = machine["copy_gb_s"] / 1e3, machine["gemm_tflop_s"]  # TB/s and TFLOP/s
    legend: list[Artist] = [
        Line2D([], [], color=DTYPE_COLOURS[dtype], lw=2, label=f"{DTYPES[dtype]}: {rate:,.0f} TFLOP/s")
        for dtype, rate in gemm.items()
    ]
    legend.append(Line2D([], [], color="0.5", lw=2, label=f"copy: {1e3 * copy:,.0f} GB/s"))
    legend += [
        Line2D([], [], color="0.2", marker=marker, ls="", label=" ".join(kind)) for kind, marker in markers.items()
    ]
    legend.append(Line2D([], [], color="0.2", marker="o", ls="", mfc="none", label="hollow: in a CUDA graph"))
    page = Page("Roofline of fastnn's rows", provenance(machine), legend, 4.5)
    (axes,) = page.panels(1, 1)
    intensities = [row["flops"] / row["bytes"] for row in ours]
    left = 0.5 * min([*intensities, min(gemm.values()) / copy])
    right = 2 * max([*intensities, max(gemm.values()) / copy])
    bottom = 0.5 * min(row["tflop_s"] for row in ours)
    axes.plot([left, max(gemm.values()) / copy], [left * copy, max(gemm.values())], color="0.5", lw=2)
    for dtype, rate in gemm.items():
        axes.plot([rate / copy, right], [rate, rate], color=DTYPE_COLOURS[dtype], lw=2)
    for row, intensity in zip(ours, intensities, strict=True):
        colour = DTYPE_COLOURS[row["dtype"]]
        marker = markers[row["feature"], row["phase"]]
        axes.plot(intensity, row["tflop_s"], marker, color=colour, mfc="none" if row["graphed"] else colour, ms=5)
    top = 1.5 * max(gemm.values())
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    axes.set(xlabel="arithmetic intensity (FLOP/byte)", ylabel="arithmetic rate (TFLOP/s)")
    log_axis(axes.xaxis, log_ticks(left, right))
    log_axis(axes.yaxis, log_ticks(bottom, top))
    axes.grid(alpha=0.3)
    return page.figure


def colours_of(series: Iterable[str]) -> dict[str, str]:
    """Dtypes and ours have their own everywhere; the others take what is left, in turn."""
    known = {OURS: BLUE, **DTYPE_COLOURS}
    others = [name for name in series if name not in known]
    return {name: known[name] for name in series if name in known} | dict(zip(others, cycle(PALETTE), strict=False))


def short(count: int) -> str:
    return f"{count / 1e6:.0f} M" if count >= 1e6 else f"{count / 1e3:.0f} k"


def optimizer_times(machine: Row, rows: list[Row]) -> Figure | None:
    """A panel for each optimizer, dtype and way of launching.

    Lists of tensors from few parameters to many, as time follows both their number and their size.
    """
    timed = [row for row in rows if row["kind"] == "timed" and row["feature"] == "optimizer"]
    if not timed:
        return None
    lists = {row["workload"]: row for row in sorted(timed, key=lambda row: row["parameters"])}
    names = list(lists)
    colours = colours_of(dict.fromkeys(row["implementation"] for row in timed))
    lines: dict[tuple, dict[str, dict[int, float]]] = {}
    for row in timed:
        by_name = lines.setdefault((row["optimizer"], row["dtype"], row["graphed"]), {})
        by_name.setdefault(row["implementation"], {})[names.index(row["workload"])] = row["median_us"]
    ways = sorted({key[1:] for key in lines}, key=lambda way: (list(DTYPES).index(way[0]), way[1]))
    shown = [(optimizer, *way) for optimizer in dict.fromkeys(key[0] for key in lines) for way in ways]
    width = len(ways) if len(ways) > 1 else min(3, len(shown))
    height = math.ceil(len(shown) / width)
    styles: Styles = {name: {"color": colour, "marker": "o", "ms": 4} for name, colour in colours.items()}
    legend = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    title = f"Time of an optimizer's step: {', '.join(names)}"
    page = Page(title, provenance(machine), legend, 0.8 + 1.3 * height)
    low, high = 0.7 * min(row["median_us"] for row in timed), 1.4 * max(row["median_us"] for row in timed)
    panels = page.panels(height, width, sharex=True, sharey=True)
    for i, (axes, panel) in enumerate(zip_longest(panels, shown)):
        if panel not in lines:
            axes.set_axis_off()
            continue
        for name in sorted(lines[panel], key=lambda name: name == OURS):  # ours on top
            axes.plot(*zip(*sorted(lines[panel][name].items()), strict=True), **styles[name])
        axes.set(yscale="log", ylim=(low, high), xlim=(-0.4, len(names) - 0.6))
        log_axis(axes.yaxis, log_ticks(low, high))
        axes.set_xticks(range(len(names)), [f"{row['tensors']}\n{short(row['parameters'])}" for row in lists.values()])
        axes.grid(alpha=0.3)
        axes.set_title(f"{panel[0]}, {DTYPES[panel[1]]}, {graphed_name(panel[2])}")
        if i % width == 0:
            axes.set_ylabel("time (µs)")
        if i + width >= len(shown):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("tensors, parameters")
    return page.figure


def counted_bars(
    machine: Row, title: str, xlabel: str, values: dict[str, dict[str, float]], line: float | None
) -> Figure:
    """Bars of {series: {category: value}}, each with its number."""
    categories = list(dict.fromkeys(category for of in values.values() for category in of))
    colours = colours_of(values)
    legend: list[Artist] = [Patch(color=colours[name], label=DTYPES.get(name, name)) for name in values]
    if line is not None:
        legend.append(Line2D([], [], color="black", lw=0.8, label="eager"))
    page = Page(title, provenance(machine), legend, 0.6 + len(categories) * (0.1 + 0.16 * len(values)))
    (axes,) = page.panels(1, 1)
    for (name, category), y in bars(axes, categories, values, colours, start=0).items():
        number = f"{values[name][category]:.3g}"
        on_white: dict[str, Any] = {"fc": "white", "ec": "none", "pad": 0.5}  # the line at eager's would cross it
        beside: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points", "va": "center_baseline"}
        axes.annotate(number, (values[name][category], y), size=7, bbox=on_white, **beside)
    if line is not None:
        axes.axvline(line, color="black", lw=0.8)
    axes.set_xlim(0, 1.08 * max(line or 0, *(value for of in values.values() for value in of.values())))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", alpha=0.3)
    return page.figure


def cases_named(rows: list[Row], words: str) -> list[tuple[str, dict[str, Row]]]:
    """(case, rows by implementation) of the figure with these words in its name; the others qualify its number."""
    return [pair for figure, cases in counted(rows).items() if words in figure for pair in cases.items()]


def saved_bytes(machine: Row, rows: list[Row]) -> Figure | None:
    values: dict[str, dict[str, float]] = {}
    for case, pair in cases_named(rows, "saved for the backward"):
        workload, _, dtype = case.rpartition(", ")
        if pair.keys() == {OURS, "eager"}:
            values.setdefault(dtype, {})[workload] = 100 * pair[OURS]["value"] / pair["eager"]["value"]
    if not values:
        return None
    figure = counted_bars(machine, "Saved for the backward", "bytes relative to eager's (%)", values, line=100)
    figure.axes[0].set_ylabel("workload, batch")
    return figure


def accesses(machine: Row, rows: list[Row]) -> Figure | None:
    values: dict[str, dict[str, float]] = {}
    for case, by_implementation in cases_named(rows, "accesses of [M, N] in a training step"):
        for name, row in sorted(by_implementation.items(), key=lambda pair: pair[0] != OURS):
            values.setdefault(name, {})[case] = row["value"]
    if not values:
        return None
    title, xlabel = (
        "Accesses of the activation in a training step",
        "accesses of [M, N], GEMM operands included; eager's are the least its ops can make",
    )
    figure = counted_bars(machine, title, xlabel, values, line=None)
    figure.axes[0].set_ylabel("plan")
    return figure


def host_time(machine: Row, rows: list[Row]) -> Figure | None:
    """Of an optimizer's step, over the number of tensors. Ratios of the best turns of one run."""
    best = {
        (row["case"], row["implementation"]): row["best_us"]
        for row in rows
        if row["kind"] == "host" and row["figure"] == "host time of an optimizer step"
    }
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for (case, implementation), theirs in best.items():
        named = re.fullmatch(r"(.+), (\d+) tensors", case)
        if named and implementation != OURS and (case, OURS) in best:
            line = lines.setdefault((named[1], implementation), {})
            line[int(named[2])] = 100 * best[case, OURS] / theirs
    if not lines:
        return None
    colour_of = colours_of(dict.fromkeys(baseline for _, baseline in lines))
    optimizers = list(dict.fromkeys(optimizer for optimizer, _ in lines))
    styles: Styles = {key: {"color": colour_of[key[1]], "marker": MARKERS[optimizers.index(key[0])]} for key in lines}
    legend = [Line2D([], [], **styles[key], label=f"{key[0]}, relative to torch's {key[1]}") for key in lines]
    legend.append(Line2D([], [], color="black", lw=0.8, label="torch"))
    page = Page("Host time of an optimizer's step", provenance(machine, host=True), legend, 2.6)
    (axes,) = page.panels(1, 1)
    for key, line in lines.items():
        axes.plot(*zip(*sorted(line.items()), strict=True), **styles[key])
    counts = sorted({count for line in lines.values() for count in line})
    axes.axhline(100, color="black", lw=0.8)
    axes.set(xscale="log", xlabel="tensors", ylabel="fastnn's time relative to torch's (%)")
    axes.set_ylim(0, 1.05 * max(100, *(value for line in lines.values() for value in line.values())))
    log_axis(axes.xaxis, counts)
    axes.grid(alpha=0.3)
    return page.figure


FIGURES: dict[str, Callable[[Row, list[Row]], Figure | None]] = {
    "training-step": training_steps,
    "roofline": roofline,
    "optimizers": optimizer_times,
    "saved": saved_bytes,
    "accesses": accesses,
    "host": host_time,
}


def draw(machine: Row, rows: list[Row]) -> dict[str, Figure]:
    """Every figure that these rows make, by name."""
    with matplotlib.style.context(STYLE):
        drawn = {name: make(machine, rows) for name, make in FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}
