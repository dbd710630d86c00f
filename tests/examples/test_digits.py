"""examples/digits.py: torch.nn and fastnn beside each other, every optimizer, a step as one graph, its report."""

import re
import signal
import subprocess
import sys
from itertools import pairwise

import digits
import matplotlib.image
import pytest
import torch
from arguments import make_parser, parse
from recipe import SCHEDULES, load
from runs import Run
from support.examples import NO_WARNINGS, ROOT, environment, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = str(ROOT / "examples" / "digits.py")
ROW = r"(torch\.nn|fastnn\.nn) +([\d.]+)"  # of the table: implementation, test accuracy in per cent
SMALL = ["--hidden", "8", "--batch-size", "314", "--device", "cpu"]


def parsed(*arguments):
    return parse(make_parser(""), [*SMALL, *arguments])


def test_digits_reaches_97_percent_with_both_and_draws_the_report(tmp_path):
    done = run("digits.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    accuracies = dict(re.findall(rf"^{ROW}", done.stdout, re.MULTILINE))
    assert accuracies.keys() == {"torch.nn", "fastnn.nn"}
    assert min(map(float, accuracies.values())) >= 97
    pixels = matplotlib.image.imread(tmp_path / "digits.png")
    assert pixels.shape[0] >= 600
    assert pixels.std() > 0.05  # curves, not a blank page


def test_digits_on_the_cpu_is_torch_itself(tmp_path):
    """The eager path draws torch's own masks: equal loss to the last digit shown, with all that can be asked for."""
    more = ["--schedule", "onecycle", "--clip-norm", "1", "--l1", "1e-4", "--noise", "0.1", "--shift", "1"]
    done = run("digits.py", "--device", "cpu", "--epochs", "3", "--hidden", "32", "16", *more, folder=tmp_path)
    rows = re.findall(rf"^{ROW} +([\d.]+)", done.stdout, re.MULTILINE)
    assert len(rows) == 2
    assert rows[0][1:] == rows[1][1:]


@pytest.mark.parametrize(("interpret", "dropout", "tolerance"), [("0", "0.3", 0), ("1", "0", 5e-4)])
def test_digits_trains_alike_with_each_optimizer_of_both(tmp_path, interpret, dropout, tolerance):
    """Equal on the eager path; in Triton's interpreter up to rounding, where no dropout draws other masks."""
    short = ["--epochs", "1", *SMALL, "--dropout", dropout]
    done = run("digits.py", "--optimizer", "all", *short, folder=tmp_path, interpret=interpret)
    assert done.returncode == 0, done.stderr
    assert ("interpreter" in done.stdout) == (interpret == "1")
    rows = re.findall(rf"^(\w+) +{ROW} +([\d.]+)", done.stdout, re.MULTILINE)
    names = ["sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "nadam", "adamw", "adadelta"]
    assert [row[:2] for row in rows] == [(name, library) for name in names for library in ("torch.nn", "fastnn.nn")]
    losses = [float(loss) for *_, loss in rows]
    assert losses[::2] == pytest.approx(losses[1::2], rel=0, abs=tolerance)


@pytest.mark.parametrize(
    ("library", "name", "schedule"),
    [("torch.nn", "nesterov", "onecycle"), ("torch.nn", "adagrad", "plateau"), ("fastnn.nn", "nadam", "inverse")],
)
def test_digits_in_a_graph_trains_as_it_does_step_by_step(library, name, schedule, recorded):
    """Two steps of five are replays. torch's capturable optimizers want a GPU, its fused ones do not."""
    runs = []
    for graph in (False, True):
        more = ["--batch-size", "251", "--dropout", "0", "--lr", "0.02", "--schedule", schedule]
        args = parsed("--epochs", "2", *more)
        args.graph = graph
        trained = Run(name, library, args)
        digits.train(trained, load(args.seed), [])
        losses = trained.history["loss"]
        runs.append([*losses, *trained.history["lr"], *trained.best[:2]])
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)
    assert runs[0][1] < runs[0][0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_digits_follows_the_schedule(schedule):
    args = parsed("--epochs", "6", "--schedule", schedule, "--lr", "0.01")
    trained = Run("sgd", "torch.nn", args)
    digits.train(trained, load(0), [])
    rates = trained.history["lr"]
    expected = {
        "exponential": [0.01 * 0.01 ** (epoch / 6) for epoch in range(6)],
        "multiplicative": [0.01 * 0.95**epoch for epoch in range(6)],
        "inverse": [0.01 / (1 + 0.1 * epoch) for epoch in range(6)],
        "step": [0.01, 0.01, 0.003, 0.003, 0.0009, 0.0009],
    }
    if schedule in expected:
        assert rates == pytest.approx(expected[schedule])
    elif schedule == "cosine":
        assert all(later < earlier for earlier, later in pairwise(rates))
    elif schedule == "onecycle":  # by batch: up, then down to next to nothing
        assert max(rates) > 2 * rates[0]
        assert rates[-1] < 1e-4 * max(rates)
    else:
        assert rates == [0.01] * 6  # a plateau of four epochs does not come in six that learn


def test_digits_stops_early_and_restores_the_best_weights():
    args = parsed("--epochs", "40", "--patience", "2", "--lr", "0.3", "--batch-size", "64")
    trained, data = Run("adam", "torch.nn", args), load(0)
    digits.train(trained, data, [])
    accuracies = trained.history["accuracy"]
    best = int(trained.best[2])
    assert len(accuracies) == best + 2 < 40
    assert accuracies[best - 1] == max(accuracies)
    accuracy, loss, _ = digits.evaluate(trained.model, *data.validation)
    assert [accuracy, -loss] == trained.best[:2]
    assert loss != trained.history["validation loss"][-1]  # not the last weights


@pytest.mark.parametrize(("argument", "largest"), [("--clip-norm", "norm"), ("--clip-value", "value")])
def test_digits_clips_gradients(argument, largest):
    args = parsed("--epochs", "1", argument, "0.01")
    trained = Run("sgd", "fastnn.nn", args)
    digits.train(trained, load(0), [])
    grads = torch.cat([parameter.grad.flatten() for parameter in trained.model.parameters()])
    found = grads.norm() if largest == "norm" else grads.abs().max()
    torch.testing.assert_close(found, torch.tensor(0.01), rtol=1e-4, atol=0)  # and were larger


def test_digits_logs_scalars_and_histograms(tmp_path):
    done = run("digits.py", "--epochs", "2", *SMALL, "--log", "log", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for library in ("torch.nn", "fastnn.nn"):
        events = EventAccumulator(str(tmp_path / "log" / f"adam-{library}"))
        events.Reload()
        tags = events.Tags()
        assert {"loss", "accuracy", "validation/loss", "lr"} == set(tags["scalars"])
        assert [event.step for event in events.Scalars("loss")] == [1, 2]
        assert {"0.weight/value", "0.weight/gradient", "4.bias/gradient"} <= set(tags["histograms"])


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--epochs", "0"), ("--dropout", "1.5"), ("--batch-size", "1"), ("--hidden", "0"), ("--lr", "nan"),
        ("--device", "toaster"), ("--device", "cuda:99"), ("--figure", "curves.txt"), ("--figure", "/no/such/a.png"),
        ("--optimizer", "adamax"), ("--graph", "--device=cpu"), ("--library", "jax"), ("--activation", "relu6"),
        ("--init", "zeros"), ("--schedule", "warm"), ("--clip-norm", "-1"), ("--clip-value", "inf"), ("--l1", "-1"),
        ("--weight-decay", "nan"), ("--noise", "-1"), ("--shift", "9"), ("--patience", "-1"), ("--seed", "-1"),
        ("--checkpoint", "/no/such/a.pt"), ("--log", __file__), ("--resume", "--epochs=2"),
    ],
)  # fmt: skip
def test_digits_refuses_a_wrong_argument_in_one_line(argument, value, monkeypatch, capsys, tmp_path):
    """In this process: each of its own would take 5 s, all of it imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [SCRIPT, argument, value])
    with pytest.raises(SystemExit) as exited:
        digits.main()
    assert exited.value.code == 2
    done = capsys.readouterr()
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert f"argument {'--checkpoint' if argument == '--resume' else argument}: " in line
    assert not any(tmp_path.iterdir())


def test_ctrl_c_leaves_the_last_whole_epoch_and_says_how_to_go_on(tmp_path):
    """A signal to a process, on the eager path: the same weights to the bit as without it."""
    arguments = [
        "--epochs",
        "12",
        "--device",
        "cpu",
        "--noise",
        "0.1",
        "--schedule",
        "onecycle",
        "--optimizer",
        "adamw",
    ]
    whole = run("digits.py", *arguments, "--checkpoint", "whole.pt", folder=tmp_path)
    command = [sys.executable, *NO_WARNINGS, SCRIPT, *arguments, "--checkpoint", "cut.pt"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), cwd=tmp_path, **pipes) as process:
        while not (tmp_path / "cut.pt").exists():
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert whole.returncode == 0, whole.stderr
    (line,) = error.splitlines()
    assert "cut.pt has the last whole epoch" in line
    again = line.partition("Go on: ")[2].split()
    assert again[0] == "python"
    assert again[-1] == "--resume"
    assert not torch.load(tmp_path / "cut.pt", weights_only=True)["finished"]
    resumed = run("digits.py", *again[2:], folder=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    one, other = (torch.load(tmp_path / name, weights_only=True)["runs"] for name in ("whole.pt", "cut.pt"))
    for name, state in one.items():
        assert all(torch.equal(weight, other[name]["weights"][key]) for key, weight in state["weights"].items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.pt", "digits.png", "whole.pt"]
