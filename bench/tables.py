"""Results as Markdown tables: what is compared with what, and how many rows of it a reader sees."""

from collections.abc import Iterable
from statistics import geometric_mean
from typing import NamedTuple

from bench.results import Row

COMMAND = "pytest bench"
OURS = "fastnn"
DTYPES = {"fp32": "fp32", "tf32": "TF32", "bf16": "bf16"}
CASES_SHOWN = 6  # a counted figure with more different numbers is shown by what is worst in it
NOTHING = "-"


class Speedup(NamedTuple):
    """A baseline's time over ours, and the number to read it by: what it is at most, or the worst of a mean."""

    ratio: float
    beside: float | None


# {(graphed, baseline, dtype): {workload: speed-up}}. A ratio is of rows that are both graphed or both not.
Speedups = dict[tuple[bool, str, str], dict[str, Speedup]]


def case_of(row: Row) -> str:
    return row["workload"] if row["batch"] is None else f"{row['workload']} ({row['batch']})"


def list_of(row: Row) -> str:
    return f"{row['workload']} ({row['tensors']} tensors)"


def graphed_name(graphed: bool) -> str:
    return "in a CUDA graph" if graphed else "ungraphed"


def provenance(machine: Row, host: bool = False) -> str:
    """What a number is worth nothing without; the processor instead of the GPU for the host's numbers."""
    command = COMMAND + (" --full" if machine["selection"] == "full" else "")
    return (
        f"{machine['cpu' if host else 'device']}, torch {machine['torch']}, Triton {machine['triton']}, "
        f"Python {machine['python']}, {machine['date']}, commit {machine['commit']}: {command}"
    )


def compared(rows: Iterable[Row], feature: str, phase: str) -> list[Row]:
    """Our timed rows of a feature that have baselines, ungraphed first."""
    ours = [row for row in rows if row["kind"] == "timed" and row["implementation"] == OURS]
    chosen = [row for row in ours if (row["feature"], row["phase"]) == (feature, phase) and row["ratios"]]
    return sorted(chosen, key=lambda row: row["graphed"])


def training_speedups(rows: Iterable[Row]) -> Speedups:
    """Of the MLPs' training step, beside the roofline model's bound."""
    found: Speedups = {}
    for row in compared(rows, "mlp", "training step"):
        for baseline, ratio in row["ratios"].items():
            column = found.setdefault((row["graphed"], baseline, row["dtype"]), {})
            column[case_of(row)] = Speedup(ratio, row["bounds"].get(baseline))
    return found


def step_speedups(rows: Iterable[Row]) -> Speedups:
    """Of each list of tensors: the mean over the optimizers that have the baseline, and the worst; clipping apart."""
    ratios: dict[tuple[bool, str, str], dict[str, list[float]]] = {}
    for row in [*compared(rows, "optimizer", "step"), *compared(rows, "clipping", "step")]:
        for baseline, ratio in row["ratios"].items():
            name = f"{baseline} clip_grad_norm_" if row["feature"] == "clipping" else baseline
            ratios.setdefault((row["graphed"], name, row["dtype"]), {}).setdefault(list_of(row), []).append(ratio)
    return {
        column: {name: Speedup(geometric_mean(values), min(values)) for name, values in lists.items()}
        for column, lists in ratios.items()
    }


def mean_speedup(cases: dict[str, Speedup]) -> Speedup | None:
    if not cases:
        return None
    beside = [speedup.beside for speedup in cases.values() if speedup.beside is not None]
    mean_beside = geometric_mean(beside) if len(beside) == len(cases) else None
    return Speedup(geometric_mean(speedup.ratio for speedup in cases.values()), mean_beside)


def table(header: list[str], body: Iterable[Iterable[str]], made_on: str) -> list[str]:
    """Markdown, and below it the line that says where the numbers are from."""
    lines = [header, ["---"] * len(header), *body]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return [*("| " + " | ".join(line) + " |" for line in cells), "", f"<sub>{made_on}</sub>", ""]


def times(ratio: float | None) -> str:
    """A ratio; in bold type where the baseline is the faster one."""
    if ratio is None:
        return NOTHING
    return f"**{ratio:.2f}**" if ratio < 1 else f"{ratio:.2f}"


def speedup_table(found: Speedups, first: str, beside: str, made_on: str, mean: bool) -> list[str]:
    """A line for each workload and a column for each baseline, which holds all dtypes."""
    columns = list(dict.fromkeys((graphed, baseline) for graphed, baseline, _ in sorted(found, key=lambda key: key[0])))
    dtypes = dtypes_of(found)

    def cell(by_dtype: list[Speedup | None]) -> str:
        ratios = " / ".join(times(speedup and speedup.ratio) for speedup in by_dtype)
        numbers = [speedup and speedup.beside for speedup in by_dtype]
        if not any(numbers):
            return ratios
        return f"{ratios}<br>{beside} " + " / ".join(f"{number:.2f}" if number else NOTHING for number in numbers)

    by_column = [[found.get((*column, dtype), {}) for dtype in dtypes] for column in columns]
    body = [[case, *(cell([cases.get(case) for cases in column]) for column in by_column)] for case in cases_of(found)]
    if mean:
        body.append(["geometric mean", *(cell([mean_speedup(cases) for cases in column]) for column in by_column)])
    header = [first, *(f"{baseline}, {graphed_name(graphed)}" for graphed, baseline in columns)]
    return table(header, body, made_on)


def dtypes_of(found: Speedups) -> list[str]:
    return [name for name in DTYPES if any(name == dtype for _, _, dtype in found)]


def cases_of(found: Speedups) -> list[str]:
    return list(dict.fromkeys(case for cases in found.values() for case in cases))


def training_table(machine: Row, rows: list[Row]) -> list[str]:
    found = training_speedups(rows)
    if not found:
        return []
    lead = (
        f"How many times as fast as each baseline a training step of an MLP is ({dtype_names(found)}; "
        "of: what the roofline model gives; bold: slower):"
    )
    return [lead, "", *speedup_table(found, "workload (batch)", "of", provenance(machine), mean=True)]


def optimizer_table(machine: Row, rows: list[Row]) -> list[str]:
    found = step_speedups(rows)
    if not found:
        return []
    optimizers = dict.fromkeys(row["optimizer"] for row in compared(rows, "optimizer", "step"))
    lead = (
        f"How many times as fast as each baseline a step is ({dtype_names(found)}; geometric mean over those of "
        f"{', '.join(optimizers)} that have the baseline; bold: slower):"
    )
    return [lead, "", *speedup_table(found, "parameters", "worst", provenance(machine), mean=False)]


def dtype_names(found: Speedups) -> str:
    return " / ".join(DTYPES[dtype] for dtype in dtypes_of(found))


def quantity(value: float, unit: str, figure: str) -> str:
    """A number, with its unit unless the figure's name says it."""
    if unit == "bytes" and value >= 100_000:
        return f"{value / 1e6:,.1f} MB"
    number = f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3g}"
    return number if unit in figure else f"{number} {unit}"


def counted(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, Row]]]:
    """{figure: {case: {implementation: row}}}"""
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row["kind"] == "counted":
            found.setdefault(row["figure"], {}).setdefault(row["case"], {})[row["implementation"]] = row
    return found


def worst(rows: Iterable[Row]) -> Row:
    """The row that is worst, in the direction the rows themselves call better."""
    return max(rows, key=lambda row: row["value"] if row["better"] == "lower" else -row["value"])


def counted_line(figure: str, cases: dict[str, dict[str, Row]]) -> list[str]:
    """[what is counted, ours, eager's]: every case with a number of its own, or of many what is worst."""

    def shown(row: Row | None) -> str:
        return quantity(row["value"], row["unit"], figure) if row else NOTHING

    equal: dict[tuple[str, ...], list[str]] = {}
    for case, of in cases.items():
        equal.setdefault((shown(of.get(OURS)), shown(of.get("eager"))), []).append(case)
    pairs = [(of[OURS]["value"], of["eager"]["value"]) for of in cases.values() if len(of) == 2]
    if len(equal) <= CASES_SHOWN:
        columns = [" / ".join(numbers) if set(numbers) != {NOTHING} else "" for numbers in zip(*equal, strict=True)]
        names = " / ".join(map(in_short, equal.values()))
        return [f"{figure}: {names if len(equal) > 1 or len(cases) == 1 else f'all {len(cases)} cases'}", *columns]
    if len(pairs) == len(cases) and min(map(min, pairs)) > 0:
        ratios = [ours / eager for ours, eager in pairs]
        lower = next(iter(cases.values()))[OURS]["better"] == "lower"
        summary = f"{geometric_mean(ratios):.2f} (worst {max(ratios) if lower else min(ratios):.2f})"
        return [f"{figure}: geometric mean of {len(pairs)} cases relative to eager", summary, "1"]
    return [f"{figure}: worst of {len(cases)} cases", *(worst_by_group(cases, name) for name in (OURS, "eager"))]


def in_short(cases: list[str]) -> str:
    return ", ".join(cases) if len(cases) <= 3 else f"{cases[0]} and {len(cases) - 1} more"


def worst_by_group(cases: dict[str, dict[str, Row]], implementation: str) -> str:
    """The worst number for each last part of the cases' names, as in "columns_forward_kernel, 1024 x 1024, sm_90"."""
    groups: dict[str, list[Row]] = {}
    for case, by_implementation in cases.items():
        if implementation in by_implementation:
            groups.setdefault(case.rpartition(", ")[2], []).append(by_implementation[implementation])
    worsts = {group: worst(rows) for group, rows in groups.items()}
    return ", ".join(f"{quantity(row['value'], row['unit'], row['figure'])} ({name})" for name, row in worsts.items())


def counted_table(machine: Row, rows: list[Row]) -> list[str]:
    lines = [counted_line(figure, cases) for figure, cases in counted(rows).items()]
    return table(["counted", OURS, "eager, at least"], lines, provenance(machine)) if lines else []


def host_table(machine: Row, rows: list[Row]) -> list[str]:
    """Ratios alone: a host's microseconds are those of its processor and of what else it does."""
    ours = [row for row in rows if row["kind"] == "host" and row.get("ratios")]
    if not ours:
        return []
    baselines = dict.fromkeys(baseline for row in ours for baseline in row["ratios"])
    body = [
        [f"{row['figure']}: {row['case']}", *(times(row["ratios"].get(baseline)) for baseline in baselines)]
        for row in ours
    ]
    header = ["times as fast as torch, on the host alone", *baselines]
    return table(header, body, provenance(machine, host=True))


def plan_table(machine: Row, rows: list[Row]) -> list[str]:
    """A line for each block and a column for each dtype: forward, sums and gradients, with the model's microseconds."""
    chosen = [row for row in rows if row["kind"] == "plan"]
    if not chosen:
        return []
    cells: dict[str, dict[str, list[str]]] = {}
    for row in chosen:
        time = row["candidates"][row["plan"]]["model_us"]
        of = cells.setdefault(f"{case_of(row)}, {row['shape']}", {}).setdefault(row["dtype"], [])
        of.append(f"{row['plan']} {time:,.1f}" + (f" (regret {row['regret']:.2f})" if "regret" in row else ""))
    dtypes = [dtype for dtype in DTYPES if any(dtype in of for of in cells.values())]
    body = [[case, *(", ".join(of.get(dtype, [NOTHING])) for dtype in dtypes)] for case, of in cells.items()]
    lead = "A block's forward, sums over rows in its backward, and its Linear's gradients; µs by the cost model"
    regrets = [row["regret"] for row in chosen if "regret" in row]
    if regrets:
        mean = f"{geometric_mean(regrets):.3f} (worst {max(regrets):.2f})"
        lead += f"; regret, the plan's measured time over the fastest's: geometric mean {mean}"
    header = ["workload (batch), K x N", *(DTYPES[dtype] for dtype in dtypes)]
    return [f"{lead}:", "", *table(header, body, provenance(machine))]
