"""README's block of results, and what became worse between two runs."""

from collections.abc import Iterator
from pathlib import Path

from bench import results
from bench.results import Row
from bench.tables import (
    OURS,
    case_of,
    counted_table,
    graphed_name,
    host_table,
    optimizer_table,
    plan_table,
    training_table,
)

BEGIN, END = "<!-- results: written by python -m bench -->", "<!-- /results -->"
FEATURES = {
    "block": "forward and backward of a block",
    "mlp": "an MLP's training step",
    "optimizer": "an optimizer's step",
    "clipping": "a clipped step",
}
SLOWER = 1.05  # two sessions on one GPU differ by some per cent through clocks and temperature
STANDARD_ERRORS = 3
# The median's standard error is 1.253 sigma / sqrt(n) for normal noise, and the interquartile range 1.349 sigma.
IQR_TO_ERROR = 1.253 / 1.349
HOST_WORSE = 1.25  # best turns on a CPU that others use, too

Run = tuple[Row, list[Row]]  # machine, rows


def awaited(runs: list[Run]) -> list[str]:
    """Which features nobody has timed yet, said once for all runs."""
    timed = {row["feature"] for _, rows in runs for row in rows if row["kind"] == "timed"}
    missing = [words for feature, words in FEATURES.items() if feature not in timed]
    if not missing:
        return []
    lead = "Not timed on a GPU yet" if timed else "**No timing has been taken on a GPU yet.** Awaited"
    return [f"{lead}: {'; '.join(missing)}.", ""]


def section(machine: Row, rows: list[Row], figures: dict[str, str]) -> list[str]:
    """One run's tables, and its figures {title: address} folded below them; with timings, what is counted, too."""
    timings = [*training_table(machine, rows), *optimizer_table(machine, rows)]
    counts = [*counted_table(machine, rows), *host_table(machine, rows)]
    images = [line for title, address in figures.items() for line in (f"![{title}]({address})", "")]
    counts = folded("Counted, and timed on the host", counts) if timings else counts
    plans = folded("Plans, and what the cost model gives for them", plan_table(machine, rows))
    return [f"**{machine['device']}**", "", *timings, *counts, *plans, *folded("Figures", images)]


def folded(summary: str, lines: list[str]) -> list[str]:
    return ["<details>", f"<summary>{summary}</summary>", "", *lines, "</details>", ""] if lines else []


def replaced(readme: str, lines: list[str], path: Path) -> str:
    """README's text with these lines between its markers; ValueError unless it has each of them once, in this order."""
    before, begin, rest = readme.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not (begin and end) or BEGIN in after or END in before + after:
        raise ValueError(f"{path} must have the line '{BEGIN}' and below it the line '{END}', once each")
    return before + begin + "\n" + "\n".join(lines).strip() + "\n\n" + end + after


def regressions(old: Run, new: Run) -> list[str]:
    """What is worse in the new run or gone from it, a sentence each.

    - a timed row of ours, on the same device: by more than 5 % and than three times the larger standard error of the
      two medians, which is at least 2.1 of their difference's
    - a counted row of ours: by anything, it is exact
    - a host row's ratio to a baseline: by more than a quarter
    - a plan's regret, on the same device: by more than 5 %
    - a row that vanished, a baseline's too: timed ones only if the device is the same

    A baseline that is slower than before is not ours to answer for.
    """
    (old_machine, old_rows), (new_machine, new_rows) = old, new
    same_device = old_machine["device"] == new_machine["device"]
    now = {results.key(row): row for row in new_rows}
    found = []
    for row in old_rows:
        if row["kind"] in ("timed", "plan") and not same_device:
            continue
        if results.key(row) not in now:
            found.append(f"{in_words(row)}: vanished")
        elif row["implementation"] == OURS:
            found += [f"{in_words(row)}: {change}" for change in COMPARE[row["kind"]](row, now[results.key(row)])]
    return [f"{sentence} ({old_machine['commit']} -> {new_machine['commit']})" for sentence in found]


def in_words(row: Row) -> str:
    if row["kind"] == "plan":
        return f"plan of {row['what']}, {case_of(row)}, {row['shape']}, {row['dtype']}"
    if row["kind"] != "timed":
        return f"{row['figure']}, {row['case']}, {row['implementation']}"
    optimizer = [row["optimizer"]] if row["feature"] == "optimizer" else []
    what = [row["feature"], row["phase"], *optimizer, case_of(row), row["dtype"], graphed_name(row["graphed"])]
    return f"{', '.join(what)}, {row['implementation']}"


def relative_error(row: Row) -> float:
    """Standard error of the median over the median."""
    return IQR_TO_ERROR * row["iqr_us"] / row["rounds"] ** 0.5 / row["median_us"]


def slower(old: Row, new: Row) -> Iterator[str]:
    noise = STANDARD_ERRORS * max(relative_error(old), relative_error(new))
    if new["median_us"] / old["median_us"] > max(SLOWER, 1 + noise):
        yield f"{old['median_us']:.2f} us -> {new['median_us']:.2f} us"


def worse_count(old: Row, new: Row) -> Iterator[str]:
    change = new["value"] - old["value"]
    if change > 0 if new["better"] == "lower" else change < 0:
        yield f"{old['value']} -> {new['value']} {new['unit']}"


def worse_ratio(old: Row, new: Row) -> Iterator[str]:
    for baseline in sorted(old["ratios"].keys() & new["ratios"].keys()):
        before, after = old["ratios"][baseline], new["ratios"][baseline]
        if before / after > HOST_WORSE:
            yield f"{baseline}'s time over ours {before:.2f} -> {after:.2f}"


def worse_plan(old: Row, new: Row) -> Iterator[str]:
    """Of two rows that were timed; another plan by the model alone is no worse for that."""
    if new.get("regret", 1) / old.get("regret", new.get("regret", 1)) > SLOWER:
        yield f"{old['plan']}, {old['regret']:.2f} times the fastest -> {new['plan']}, {new['regret']:.2f} times"


COMPARE = {"timed": slower, "counted": worse_count, "host": worse_ratio, "plan": worse_plan}
