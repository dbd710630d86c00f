"""The grammar of a run: what is gathered, what is left alone."""

import timeit

import pytest
import torch
from torch import nn

import fastnn
from fastnn import runs


class MyLinear(nn.Linear):
    pass


def shape_of(*modules):
    """The parts as text: "LBAD" a run, "." a module by itself."""
    letters = {nn.Linear: "L", nn.BatchNorm1d: "B", nn.SyncBatchNorm: "B", nn.Dropout: "D"}
    parts = []
    for part in runs.split(modules):
        if isinstance(part, tuple):
            parts.append("".join(letters.get(type(layer), "A") for layer in part))
        else:
            parts.append(".")
    return " ".join(parts)


L, B, D = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
R, S = nn.ReLU(), nn.SiLU()

GRAMMAR = [
    ([L, B, R, D], "LBAD"),
    ([L, B, R, D, L, B, R, D, L], "LBAD LBAD L"),
    ([L, R], "LA"),
    ([L, D], "LD"),
    ([B, R], "BA"),
    ([B, D], "BD"),
    ([R, D], "AD"),
    ([L], "L"),
    ([R], "."),
    ([D], "."),
    ([L, R, B, D], "LA BD"),
    ([L, L, R], "L LA"),
    ([R, S], ". ."),
    ([D, L], ". L"),
    ([L, B, nn.Softmax(1), R, D], "LB . AD"),
    ([MyLinear(4, 4), B, R], ". BA"),
    ([L, nn.LayerNorm(4), R, D], "L . AD"),
    ([L, nn.SyncBatchNorm(4), R], "LBA"),
    ([nn.ReLU(inplace=True), D], ". ."),  # its input is the caller's
    ([nn.Identity(), D], ". ."),  # as its output is in eval
    ([L, nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)], "LAD"),
    ([L, nn.Identity(), D], "LAD"),
    ([], ""),
]


@pytest.mark.parametrize(("modules", "parts"), GRAMMAR, ids=lambda value: value if isinstance(value, str) else "")
def test_grammar(modules, parts):
    assert shape_of(*modules) == parts


OBSERVERS = {
    "forward hook": lambda m: m.register_forward_hook(lambda *a: None),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda *a: None),
    "backward hook": lambda m: m.register_full_backward_hook(lambda *a: None),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda *a: None),
    "patched forward": lambda m: setattr(m, "forward", m.forward),
    "parametrisation": lambda m: nn.utils.parametrizations.weight_norm(m),
}


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_child_someone_looks_at_is_left_alone(observer):
    linear = nn.Linear(4, 4)
    OBSERVERS[observer](linear)
    assert shape_of(linear, B, R) == ". BA"


def test_removed_hook_fuses_again():
    linear = nn.Linear(4, 4)
    handle = linear.register_forward_hook(lambda *a: None)
    assert shape_of(linear, R) == ". ."
    handle.remove()
    assert shape_of(linear, R) == "LA"


def test_what_a_run_may_be_applied_to():
    with_norm, without = runs.split([L, B, R]), runs.split([L, R])
    assert runs.fits(with_norm[0], torch.ones(2, 4))
    assert not runs.fits(with_norm[0], torch.ones(2, 3, 4))  # BatchNorm1d takes dimension 1 there
    assert runs.fits(without[0], torch.ones(2, 3, 4))
    assert not runs.fits(without[0], torch.ones(4))
    assert not runs.fits(without[0], "not a tensor")
    assert not runs.fits(without[0], torch.eye(4).to_sparse())
    elementwise = runs.split([R, D])
    assert runs.fits(elementwise[0], torch.ones(2, 3, 4))
    assert not runs.fits(elementwise[0], torch.ones(2, 4).t())  # torch keeps such strides
    (alone,) = runs.split([L])
    assert runs.fits(alone, torch.ones(2, 3, 4))
    assert not runs.fits(alone, torch.ones(4))


def test_a_wrong_form_of_gelu_is_torchs_error():
    """torch.nn.GELU takes any word, and refuses it when it is called."""
    layers = nn.Linear(4, 4), nn.GELU(approximate="tan")
    for model in (nn.Sequential(*layers), fastnn.nn.Sequential(*layers)):
        with pytest.raises(RuntimeError, match="approximate"):
            model(torch.ones(2, 4))


def test_gathering_costs_little_against_one_layer():
    """12 children are gathered in half the host time of one eager layer; four times that is allowed to noise."""
    modules = [L, B, R, D] * 3
    linear, x = nn.Linear(4, 4), torch.ones(2, 4)
    gather = min(timeit.repeat(lambda: runs.split(modules), number=200, repeat=7))
    layer = min(timeit.repeat(lambda: linear(x), number=200, repeat=7))
    assert gather < 2 * layer
