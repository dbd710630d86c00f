"""The report on hand-made results: its numbers are the rows', and like is beside like."""

import json
import math
import re
import subprocess
import sys

import pytest
from support import made_up_results as made_up
from support.made_up_results import counted, host, machine, plan, timed

from bench import report, results, tables
from bench.__main__ import main

GRAPH = {"graphed": True}
UNGRAPHED_BF16 = [row for row in made_up.with_gpu()[1] if row.get("dtype", "bf16") == "bf16" and not row.get("graphed")]
SMALL = machine(), UNGRAPHED_BF16
README = f"# Title\n\nBefore.\n\n{report.BEGIN}\nold\n{report.END}\n\nAfter.\n"


def pair(ours: float, bounds: dict | None = None, *, baselines: dict[str, float], **setting) -> list[dict]:
    """Rows of a setting, ours with the ratios of the medians."""
    ratios = {name: median / ours for name, median in baselines.items()}
    theirs = [timed(name, median, **setting) for name, median in baselines.items()]
    return [*theirs, timed("fastnn", ours, ratios=ratios, bounds=bounds or {}, **setting)]


def cells(lines: list[str], start: int = 0) -> dict[str, dict[str, str]]:
    """{first cell: {column: cell}} of the first Markdown table from that line on."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:] if line.startswith("|")]
    header, _, *body = found
    assert {len(line) for line in found} == {len(header)}
    return {line[0]: dict(zip(header[1:], line[1:], strict=True)) for line in body}


def test_training_table_holds_the_rows_ratios_bounds_and_their_geometric_means():
    medians = {("crossq", 512): (10.0, 31.7), ("gin", 500): (20.0, 42.1), ("gin", 9000): (30.0, 37.3)}
    rows = []
    for (workload, batch), (ours, eager) in medians.items():
        rows += pair(ours, {"eager": 4.0 + ours}, baselines={"eager": eager}, workload=workload, batch=batch)
    found = cells(tables.training_table(machine(), rows))
    assert found["crossq (512)"] == {"eager, ungraphed": "3.17<br>of 14.00"}
    assert found["gin (500)"] == {"eager, ungraphed": "2.10<br>of 24.00"}
    assert found["gin (9000)"] == {"eager, ungraphed": "1.24<br>of 34.00"}
    mean, bound = (3.17 * 2.105 * 37.3 / 30) ** (1 / 3), math.exp(sum(map(math.log, (14, 24, 34))) / 3)
    assert list(found)[-1] == "geometric mean"
    assert found["geometric mean"] == {"eager, ungraphed": f"{mean:.2f}<br>of {bound:.2f}"}


def test_graphed_and_ungraphed_rows_stand_in_columns_and_means_of_their_own():
    rows = pair(10.0, baselines={"eager": 777.0, "max-autotune": 555.0}, **GRAPH)
    rows += pair(20.0, baselines={"eager": 30.0, "compile": 24.0, "max-autotune-no-cudagraphs": 22.0})
    rows += pair(5.0, baselines={"eager": 15.0}, workload="gin", **GRAPH)
    found = cells(tables.training_table(machine(), rows))
    assert found["notes-mlp (64)"] == {
        "eager, ungraphed": "1.50",
        "compile, ungraphed": "1.20",
        "max-autotune-no-cudagraphs, ungraphed": "1.10",
        "eager, in a CUDA graph": "77.70",
        "max-autotune, in a CUDA graph": "55.50",
    }
    assert {column for column, cell in found["gin (64)"].items() if cell != "-"} == {"eager, in a CUDA graph"}
    assert found["geometric mean"]["eager, ungraphed"] == "1.50"
    assert found["geometric mean"]["eager, in a CUDA graph"] == f"{math.sqrt(77.7 * 3):.2f}"


def test_dtypes_share_a_cell_in_order_and_a_slower_one_is_bold():
    rows = [*pair(10.0, baselines={"eager": 9.0}, dtype="tf32"), *pair(10.0, baselines={"eager": 25.0}, dtype="bf16")]
    rows += pair(10.0, baselines={"eager": 11.0}, dtype="fp32", workload="gin")
    lines = tables.training_table(machine(), rows)
    assert "fp32 / TF32 / bf16" in lines[0]
    assert cells(lines)["notes-mlp (64)"] == {"eager, ungraphed": "- / **0.90** / 2.50"}
    assert cells(lines)["gin (64)"] == {"eager, ungraphed": "1.10 / - / -"}


def test_only_an_mlps_whole_training_step_is_in_the_training_table():
    rows = [
        *pair(1.0, baselines={"eager": 2.0}, feature="block"),
        *pair(1.0, baselines={"eager": 2.0}, feature="mlp", phase="forward"),
    ]
    assert tables.training_table(machine(), rows) == []


def test_optimizer_table_is_the_mean_over_optimizers_beside_the_worst_with_clipping_apart():
    step = {"feature": "optimizer", "phase": "step", "workload": "mlp-60", "tensors": 60, "batch": None}
    rows = [
        *pair(10.0, baselines={"foreach": 45.0, "fused": 12.0}, optimizer="AdamW", **step),
        *pair(10.0, baselines={"foreach": 20.0}, optimizer="NAdam", **step),
        *pair(10.0, baselines={"foreach": 80.0}, optimizer="NAdam", **step, **GRAPH),
        *pair(10.0, baselines={"foreach": 70.0}, optimizer="none", **step | {"feature": "clipping"}),
    ]
    lines = tables.optimizer_table(machine(), rows)
    assert "AdamW, NAdam that" in lines[0]
    assert cells(lines) == {
        "mlp-60 (60 tensors)": {
            "foreach, ungraphed": "3.00<br>worst 2.00",
            "fused, ungraphed": "1.20<br>worst 1.20",
            "foreach clip_grad_norm_, ungraphed": "7.00<br>worst 7.00",
            "foreach, in a CUDA graph": "8.00<br>worst 8.00",
        }
    }


def test_a_counted_figure_is_a_row_with_a_number_for_each_case_and_equal_ones_together():
    rows = [counted("accesses of it", plan, value) for plan, value in (("a", 8), ("b", 8), ("c", 11))]
    rows += [counted("accesses of it", plan, 21, "eager") for plan in "ab"]
    rows += [counted("launches", name, 1, unit="launches") for name in "abcde"]
    rows += [counted("spills", name, 0 if name < "e" else 3, unit="spills") for name in "abcde"]
    rows += [counted("saved", "one", 1_500_000, unit="bytes"), counted("saved", "two", 12, unit="bytes")]
    assert cells(tables.counted_table(machine(), rows)) == {
        "accesses of it: a, b / c": {"fastnn": "8 / 11", "eager, at least": "21 / -"},
        "launches: all 5 cases": {"fastnn": "1", "eager, at least": ""},
        "spills: a and 3 more / e": {"fastnn": "0 / 3", "eager, at least": ""},
        "saved: one / two": {"fastnn": "1.5 MB / 12 bytes", "eager, at least": ""},
    }


def test_many_cases_are_one_row_of_the_worst_for_each_architecture():
    values = [50, 90, 60, 80, 70, 100, 65, 95]
    cases = [f"kernel {i}, {'sm_80' if i % 2 else 'sm_90'}" for i in range(len(values))]
    rows = [counted("registers", case, value, unit="registers") for case, value in zip(cases, values, strict=True)]
    rows += [
        counted("16-byte accesses", case, value, unit="%", better="higher")
        for case, value in zip(cases, values, strict=True)
    ]
    assert cells(tables.counted_table(machine(), rows)) == {
        "registers: worst of 8 cases": {"fastnn": "70 (sm_90), 100 (sm_80)", "eager, at least": ""},
        "16-byte accesses: worst of 8 cases": {"fastnn": "50 % (sm_90), 80 % (sm_80)", "eager, at least": ""},
    }


def test_many_cases_with_eagers_beside_are_one_row_of_the_mean_ratio_and_the_worst():
    ratios = [0.2, 0.25, 0.3, 0.4, 0.5, 0.8, 0.1]
    rows = [counted("saved", f"case {i}", ratio * (i + 1)) for i, ratio in enumerate(ratios)]
    rows += [counted("saved", f"case {i}", 1.0 * (i + 1), "eager") for i in range(len(ratios))]
    label = "saved: geometric mean of 7 cases relative to eager"
    mean = math.prod(ratios) ** (1 / 7)
    numbers = {"fastnn": f"{mean:.2f} (worst 0.80)", "eager, at least": "1"}
    assert cells(tables.counted_table(machine(), rows)) == {label: numbers}


def test_plans_are_a_line_for_each_block_with_regret_where_they_were_timed():
    rows = [plan("moco"), plan("moco", what="sums", plan="columns"), plan("moco", dtype="fp32"), plan("gin", batch=500)]
    lines = tables.plan_table(machine(), rows)
    forward, both = "whole_batch 2.0", "whole_batch 2.0, columns 4.0"
    assert cells(lines) == {
        "moco (64), 784 x 100": {"fp32": forward, "bf16": both},
        "gin (500), 784 x 100": {"fp32": "-", "bf16": forward},
    }
    assert "regret" not in lines[0]
    lines = tables.plan_table(machine(), [plan("moco", regret=1.0), plan("gin", regret=1.21)])
    assert cells(lines)["gin (64), 784 x 100"] == {"bf16": "whole_batch 2.0 (regret 1.21)"}
    assert "geometric mean 1.100 (worst 1.21)" in lines[0]
    assert tables.plan_table(machine(), [counted("accesses", "a", 8)]) == []


def test_host_rows_are_ratios_without_a_microsecond():
    rows = [host(60, "fused", 987.0), host(60, "fastnn", 123.0, ratios={"fused": 987 / 123, "foreach": 0.5})]
    lines = tables.host_table(machine(), rows)
    assert cells(lines) == {f"{made_up.HOST}: Adam, 60 tensors": {"fused": "8.02", "foreach": "**0.50**"}}
    assert "987" not in "".join(lines)
    assert "123.0" not in "".join(lines)
    assert "Made-Up CPU" in lines[-2]


def test_every_table_says_below_it_where_its_numbers_are_from():
    lines = report.section(*made_up.with_gpu(), {})
    ends = [i for i, line in enumerate(lines) if line.startswith("|") and not lines[i + 1].startswith("|")]
    assert len(ends) == 5
    for i in ends:
        assert lines[i + 1] == ""
        versions = "torch 2.13.0, Triton 3.9.0, Python 3.12.1, 2001-02-03, commit 0123abc: pytest bench"
        assert re.fullmatch(rf"<sub>Made-Up .*, {re.escape(versions)}</sub>", lines[i + 2])
    assert "pytest bench --full" in tables.provenance(machine(selection="full"))


@pytest.mark.parametrize("run", [made_up.with_gpu(), made_up.without_gpu()], ids=["GPU", "no GPU"])
def test_a_readers_eye_meets_25_lines_of_tables_at_most(run):
    shown = "\n".join(report.section(*run, {})).split("<details>")[0]
    assert 5 <= sum(line.startswith("|") for line in shown.splitlines()) <= 25


def test_what_nobody_timed_is_awaited():
    (sentence, _) = report.awaited([made_up.without_gpu()])
    assert "No timing has been taken on a GPU" in sentence
    assert all(words in sentence for words in report.FEATURES.values())
    rows = [timed("fastnn", 1.0), timed("fastnn", 1.0, feature="block"), timed("fastnn", 1.0, feature="optimizer")]
    (sentence, _) = report.awaited([(machine(), rows), made_up.without_gpu()])
    assert sentence == f"Not timed on a GPU yet: {report.FEATURES['clipping']}."
    assert report.awaited([made_up.with_gpu()]) == []


@pytest.fixture
def folder(tmp_path):
    results.save(tmp_path / "made-up-gpu.json", *SMALL)
    results.save(tmp_path / "no-gpu.json", *made_up.without_gpu())
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def run(folder, *files: str) -> None:
    paths = [str(folder / file) for file in files]
    main([*paths, "--readme", str(folder / "README.md"), "--figures", str(folder / "figures")])


def test_the_command_writes_figures_and_the_block_between_the_markers(folder, capsys, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", folder)
    main(["--readme", str(folder / "README.md"), "--figures", str(folder / "figures")])  # every file of the folder
    written = capsys.readouterr().out.splitlines()
    figures = sorted((folder / "figures").iterdir())
    assert len(figures) == 9
    assert sorted(written) == sorted(map(str, [*figures, folder / "README.md"]))
    text = (folder / "README.md").read_text()
    before, _, rest = text.partition(f"{report.BEGIN}\n")
    block, _, after = rest.partition(f"{report.END}\n")
    assert (before, after) == ("# Title\n\nBefore.\n\n", "\nAfter.\n")
    assert "\nold\n" not in text
    assert "\n".join(tables.training_table(*SMALL)) in block
    for figure in figures:
        assert f"](figures/{figure.name})" in block


def test_the_same_results_make_the_same_bytes(folder):
    contents = []
    for _ in range(2):
        run(folder, "no-gpu.json")
        written = [*(folder / "figures").iterdir(), folder / "README.md"]
        contents.append({path.name: path.read_bytes() for path in written})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 4


def written_text(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "files", "message"),
    [
        (lambda folder: None, ["missing.json"], "missing.json"),
        (written_text("no-gpu.json", "not json"), ["no-gpu.json"], "holds no results"),
        (written_text("no-gpu.json", "[1, 2]"), ["no-gpu.json"], "holds no results"),
        (written_text("no-gpu.json", '{"machine": {}, "rows": []}'), ["no-gpu.json"], "no rows"),
        (written_text("no-gpu.json", '{"machine": {}, "rows": [{"kind": "timed"}]}'), ["no-gpu.json"], "incomplete"),
        (written_text("no-gpu.json", json.dumps({"machine": {}, "rows": [3]})), ["no-gpu.json"], "incomplete"),
        (lambda folder: None, ["no-gpu.json", "no-gpu.json"], "two files"),
        (written_text("README.md", "no markers\n"), ["no-gpu.json"], f"'{report.BEGIN}'"),
        (written_text("README.md", f"{report.BEGIN}\n"), ["no-gpu.json"], f"'{report.END}'"),
        (written_text("README.md", f"{report.END}\n{report.BEGIN}\n"), ["no-gpu.json"], "once each"),
        (written_text("README.md", README + README), ["no-gpu.json"], "once each"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(folder, spoil, files, message):
    spoil(folder)
    before = (folder / "README.md").read_text()
    with pytest.raises(SystemExit) as stopped:
        run(folder, *files)
    assert stopped.value.code.startswith("python -m bench: error: ")
    assert message in stopped.value.code
    assert "\n" not in stopped.value.code
    assert (folder / "README.md").read_text() == before
    assert not (folder / "figures").exists()


def test_without_any_results_it_says_what_makes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match="run pytest bench first"):
        main([])


def test_it_is_a_command_of_the_repository_root(tmp_path):
    command = [sys.executable, "-m", "bench", str(tmp_path / "missing.json")]
    done = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "missing.json" in line


def test_readme_and_its_figures_are_what_the_committed_results_make(tmp_path):
    readme = results.ROOT / "README.md"
    copy = tmp_path / "README.md"
    copy.write_text(readme.read_text())
    main(["--readme", str(copy), "--figures", str(tmp_path / "bench" / "results" / "figures")])
    assert copy.read_text() == readme.read_text(), "run python -m bench"
    drawn = {path.name for path in (tmp_path / "bench" / "results" / "figures").iterdir()}
    assert drawn == {path.name for path in (results.FOLDER / "figures").iterdir()}
