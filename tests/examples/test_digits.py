"""examples/digits.py: torch.nn and fastnn beside each other, every optimizer, a step as one graph, its report."""

import re
from itertools import pairwise

import digits
import matplotlib.image
import pytest
import torch
import tune
from arguments import make_parser, parse
from recipe import SCHEDULES, load
from runs import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fastnn

ROW = r"(torch\.nn|fastnn\.nn) +([\d.]+)"  # of the table: implementation, test accuracy in per cent
SMALL = ["--hidden", "8", "--batch-size", "314", "--device", "cpu"]


def parsed(*arguments):
    return parse(make_parser(""), [*SMALL, *arguments])


def test_digits_reaches_97_percent_with_both_and_draws_the_report(call, eager, tmp_path):
    code, output, _ = call(digits, "--device", "cpu")
    assert code == 0
    accuracies = dict(re.findall(rf"^{ROW}", output, re.MULTILINE))
    assert accuracies.keys() == {"torch.nn", "fastnn.nn"}
    assert min(map(float, accuracies.values())) >= 97
    pixels = matplotlib.image.imread(tmp_path / "digits.png")
    assert pixels.shape[0] >= 600
    assert pixels.std() > 0.05  # curves, not a blank page


def test_digits_on_the_cpu_is_torch_itself(call, eager):
    """The eager path draws torch's own masks: equal loss to the last digit shown, with all that can be asked for."""
    more = ["--schedule", "onecycle", "--clip-norm", "1", "--l1", "1e-4", "--noise", "0.1", "--shift", "1"]
    _, output, _ = call(digits, *SMALL, "--epochs", "3", "--hidden", "32", "16", *more)
    rows = re.findall(rf"^{ROW} +([\d.]+)", output, re.MULTILINE)
    assert len(rows) == 2
    assert rows[0][1:] == rows[1][1:]


@pytest.mark.parametrize(("interpreted", "dropout", "tolerance"), [(False, "0.3", 0), (True, "0", 5e-4)])
def test_digits_trains_alike_with_each_optimizer_of_both(call, take_path, interpreted, dropout, tolerance):
    """Equal on the eager path; in Triton's interpreter up to rounding, where no dropout draws other masks."""
    take_path(interpreted)
    code, output, _ = call(digits, "--optimizer", "all", "--epochs", "1", *SMALL, "--dropout", dropout)
    assert code == 0
    assert ("interpreter" in output) == interpreted
    rows = re.findall(rf"^(\w+) +{ROW} +([\d.]+)", output, re.MULTILINE)
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
    elif schedule == "onecycle":  # by batch: up, then down
        assert max(rates) > 2 * rates[0]
        assert rates[-1] < max(rates) / 5
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
    assert type(trained.model) is fastnn.nn.Sequential
    digits.train(trained, load(0), [])
    grads = torch.cat([parameter.grad.flatten() for parameter in trained.model.parameters()])
    found = grads.norm() if largest == "norm" else grads.abs().max()
    torch.testing.assert_close(found, torch.tensor(0.01), rtol=1e-4, atol=0)  # and were larger


def test_digits_logs_scalars_and_histograms(call, eager, tmp_path):
    assert call(digits, "--epochs", "2", *SMALL, "--log", "log")[0] == 0
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
def test_digits_refuses_a_wrong_argument_in_one_line(argument, value, call, tmp_path):
    code, output, (line,) = call(digits, argument, value)
    assert (code, output) == (2, "")
    assert f"argument {'--checkpoint' if argument == '--resume' else argument}: " in line
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("module", [digits, tune])
def test_help_says_what_each_argument_is_and_its_default(call, module):
    code, output, error = call(module, "--help")
    assert (code, error) == (0, [])
    options = re.split(r"\n  (?=--)", output)[1:]
    assert len(options) >= 8
    for option in options:
        assert "default: " in option or option.startswith(("--graph", "--resume")), option
    assert "None" not in output
    assert "[" not in re.sub(r"\[N(AME)? \.\.\.\]", "", output)  # no list as Python writes it
