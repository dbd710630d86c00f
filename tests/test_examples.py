"""The examples as a user runs them: in a process of their own, on the path of the device at hand."""

import argparse
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

import fastnn

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "examples" / "digits.py"
ROW = r"(torch\.nn|fastnn\.nn) +([\d.]+)"  # of the table: implementation, test accuracy in per cent
NO_WARNINGS = [
    "-W", "error",
    "-W", "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning",  # Triton 3.6's interpreter
]  # fmt: skip


def run(*arguments: str, interpret: str = "0") -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120", "TRITON_INTERPRET": interpret}
    command = [sys.executable, *NO_WARNINGS, str(DIGITS), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_digits_reaches_96_percent_with_both_and_draws_the_curves(tmp_path):
    figure = tmp_path / "digits.png"
    done = run("--figure", str(figure))
    assert done.returncode == 0, done.stderr
    accuracies = dict(re.findall(rf"^{ROW}", done.stdout, re.MULTILINE))
    assert accuracies.keys() == {"torch.nn", "fastnn.nn"}
    assert min(map(float, accuracies.values())) >= 96
    assert figure.read_bytes().startswith(b"\x89PNG")
    pixels = matplotlib.image.imread(figure)
    assert pixels.shape[0] >= 600
    assert pixels.std() > 0.05  # curves, not a blank page


def test_digits_on_the_cpu_is_torch_itself(tmp_path):
    """The eager path draws torch's own masks: equal loss to the last digit shown."""
    done = run("--device", "cpu", "--epochs", "3", "--hidden", "32", "16", "--figure", str(tmp_path / "digits.png"))
    rows = re.findall(rf"^{ROW} +([\d.]+)", done.stdout, re.MULTILINE)
    assert len(rows) == 2
    assert rows[0][1:] == rows[1][1:]


@pytest.mark.parametrize(("interpret", "dropout", "tolerance"), [("0", "0.3", 0), ("1", "0", 5e-4)])
def test_digits_trains_alike_with_each_optimizer_of_both(tmp_path, interpret, dropout, tolerance):
    """Equal on the eager path; in Triton's interpreter up to rounding, where no dropout draws other masks."""
    short = ["--epochs", "1", "--hidden", "8", "--batch-size", "314", "--dropout", dropout, "--device", "cpu"]
    done = run("--optimizer", "all", *short, "--figure", str(tmp_path / "digits.png"), interpret=interpret)
    assert done.returncode == 0, done.stderr
    assert ("interpreter" in done.stdout) == (interpret == "1")
    rows = re.findall(rf"^(\w+) +{ROW} +([\d.]+)", done.stdout, re.MULTILINE)
    names = ["sgd", "adam", "adamw", "nadam", "rmsprop", "adagrad", "adadelta"]
    assert [row[:2] for row in rows] == [(name, library) for name in names for library in ("torch.nn", "fastnn.nn")]
    losses = [float(loss) for *_, loss in rows]
    assert losses[::2] == pytest.approx(losses[1::2], rel=0, abs=tolerance)


@pytest.mark.parametrize(("library", "name"), [(torch, "sgd"), (torch, "adagrad"), (fastnn, "nadam")])
def test_digits_in_a_graph_trains_as_it_does_step_by_step(library, name, recorded):
    """Two steps of five are replays. torch's capturable optimizers want a GPU, its fused ones do not."""
    digits = runpy.run_path(str(DIGITS))
    runs = []
    for graph in (False, True):
        args = argparse.Namespace(
            seed=0, hidden=[8], dropout=0.0, device="cpu", batch_size=251, epochs=2, graph=graph, lr=0.02
        )
        parts = digits["load"](args.seed, args.device)
        losses, _, row = digits["train"](*digits["prepare"](library, name, args), parts, args, "")
        runs.append([*losses, *map(float, row[:2])])
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)
    assert runs[0][1] < runs[0][0]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--epochs", "0"), ("--dropout", "1.5"), ("--batch-size", "1"), ("--hidden", "0"), ("--lr", "nan"),
        ("--device", "toaster"), ("--device", "cuda:99"), ("--figure", "curves.txt"), ("--figure", "/no/such/a.png"),
        ("--optimizer", "adamax"), ("--graph", "--device=cpu"),
    ],
)  # fmt: skip
def test_digits_refuses_a_wrong_argument_in_one_line(argument, value, monkeypatch, capsys):
    """In this process: each of its own would take 5 s, all of it imports."""
    monkeypatch.setattr(sys, "argv", [str(DIGITS), argument, value])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(DIGITS), run_name="__main__")
    assert exited.value.code == 2
    done = capsys.readouterr()
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert f"argument {argument}: " in line
