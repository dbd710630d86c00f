"""examples/tune.py: a table and a figure of every trial, by each of the three searches."""

import argparse
import re

import numpy as np
import pytest
import tune
from recipe import LIBRARIES
from sklearn.datasets import load_digits
from torch import nn


@pytest.fixture
def main(call, eager):
    return lambda *arguments: call(tune, "--epochs", "1", "--folds", "2", *arguments)


def trials_of(output):
    """{trial: its row of cells}, best first."""
    return {row.split()[0]: row.split()[1:] for row in re.findall(r"^ +\d+ +.*\d$", output, re.MULTILINE)}


def test_a_grid_is_tried_whole(main, tmp_path):
    code, output, _ = main("--search", "grid", "--axes", "lr", "optimizer", "--trials", "50", "--figure", "a.svg")
    assert code == 0
    trials = trials_of(output)
    assert len(trials) == 9
    pairs = {(row[2], row[7]) for row in trials.values()}
    assert pairs == {(lr, name) for lr in ("0.001", "0.003", "0.01") for name in ("nesterov", "adam", "adamw")}
    assert len({tuple(row[3:7]) for row in trials.values()}) == 1  # what is not searched
    figure = (tmp_path / "a.svg").read_text()
    assert all(word in figure for word in ("grid search", ">lr<", ">optimizer<", ">error (%)<", ">best so far<"))


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_a_search_draws_every_setting_and_is_repeated_by_its_seed(main, search):
    code, output, _ = main("--search", search, "--trials", "6", "--figure", "a.png")
    assert code == 0
    trials = trials_of(output)
    assert len(trials) == 6
    columns = list(zip(*trials.values(), strict=True))
    assert sum(len(set(column)) > 1 for column in columns[2:]) >= 6  # of seven; TPE may hold to one
    assert [float(mean) for mean in columns[0]] == sorted(map(float, columns[0]), reverse=True)
    best = next(iter(trials))
    assert re.search(rf"^Trial {best}, trained on the whole training part: test accuracy \d+\.\d\d %$", output, re.M)
    assert trials_of(main("--search", search, "--trials", "1", "--figure", "a.png")[1])["0"] == trials["0"]


def test_optuna_learns_from_its_trials(main):
    """After those at random, the first of which are the same."""
    by_random, by_tpe = (
        trials_of(main("--search", search, "--trials", "6", "--figure", "a.png")[1]) for search in ("random", "optuna")
    )
    assert by_random["0"] == by_tpe["0"]
    assert by_random["5"] != by_tpe["5"]


def test_torch_in_fastnns_place_finds_the_same(main):
    ours, theirs = (
        trials_of(main("--search", "random", "--trials", "2", "--library", library, "--figure", "a.png")[1])
        for library in ("fastnn.nn", "torch.nn")
    )
    assert ours == theirs


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_estimator_is_of_that_library_and_these_settings(library, eager):
    settings = {name: usual for name, (usual, _, _) in tune.AXES.items()} | {"depth": 3, "lr": 0.02}
    args = argparse.Namespace(library=library, epochs=1)
    x, y = load_digits(return_X_y=True)
    net = tune.make_estimator(args, settings).fit(x[:200].astype(np.float32), y[:200])[-1]
    assert type(net.module_) is LIBRARIES[library].nn.Sequential
    assert type(net.optimizer_) is LIBRARIES[library].optim.AdamW
    assert net.optimizer_.param_groups[0]["lr"] == 0.02
    assert [layer.out_features for layer in net.module_ if isinstance(layer, nn.Linear)] == [256, 128, 64, 10]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--search", "bayes"), ("--axes", "seed"), ("--trials", "0"), ("--folds", "1"), ("--epochs", "0"),
        ("--figure", "/no/such/a.png"), ("--library", "jax"), ("--seed", "-1"), ("--trials", "--search=grid"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused_in_one_line(main, tmp_path, argument, value):
    code, output, error = main(*([argument, "8", value] if value.startswith("--") else [argument, value]))
    assert (code, output) == (2, "")
    (line,) = error
    assert f"argument {argument}: " in line
    assert not any(tmp_path.iterdir())
