"""Bytes per parameter, each value read and written once; launches; one result whatever order programs run in."""

import pytest
import torch
from support.interpreter import count_accesses, shuffled_grid
from support.optimizers import copies, ours, parameters, set_gradients, state_tensors
from support.step_traffic import ELEMENTS, SHAPES, count_launches, count_step, our_step
from torch import nn

from fastnn.nn.utils import clip_grad_norm_

# (optimizer, flags, bytes per fp32 parameter: parameter and states read and written, gradient read)
FLOOR = [
    ("SGD", {}, 12),
    ("SGD", {"weight_decay": 0.1}, 12),
    ("SGD", {"momentum": 0.9, "nesterov": True}, 20),
    ("Adam", {}, 28),
    ("Adam", {"amsgrad": True}, 36),
    ("AdamW", {}, 28),
    ("NAdam", {}, 28),
    ("RMSprop", {}, 20),
    ("RMSprop", {"momentum": 0.9}, 28),
    ("RMSprop", {"momentum": 0.9, "centered": True}, 36),
    ("Adagrad", {}, 20),
    ("Adadelta", {}, 28),
]


@pytest.mark.parametrize(("name", "flags", "floor"), FLOOR, ids=str)
def test_every_value_is_read_and_written_once_in_one_launch(name, flags, floor):
    step = our_step(name, **flags)
    assert step.per_parameter == floor
    assert step.read - step.written == 4 * ELEMENTS  # the gradient alone is only read
    assert step.rereads == 0
    assert step.launches == ["step_kernel"]


def test_groups_share_a_launch_dtypes_do_not_clipping_takes_one_more_each():
    params = parameters(SHAPES)
    optimizer = ours("Adam")([{"params": [param], "lr": 0.1 * i, "maximize": i == 2} for i, param in enumerate(params)])
    set_gradients(0, params)
    optimizer.step()
    assert count_step(optimizer, params).launches == ["step_kernel"]
    optimizer.max_grad_norm = 1.0
    step = count_step(optimizer, params)
    assert step.launches == ["norm_kernel", "step_kernel"]
    assert step.per_parameter == 28 + 4
    mixed = [*copies(params), nn.Parameter(torch.randn(9).bfloat16())]
    optimizer = ours("Adam")(mixed)
    set_gradients(0, mixed)
    optimizer.step()
    assert count_step(optimizer, mixed).launches == ["step_kernel"] * 2


def test_low_precision_bytes():
    """bf16 parameters: 14 bytes, 22 with fp32 state. Scaled gradients are written back, and not touched on overflow."""
    for settings, floor in (({}, 14), ({"state_dtype": torch.float32}, 22), ({"stochastic_rounding": True}, 14)):
        step = our_step("Adam", torch.bfloat16, **settings)
        assert (step.per_parameter, step.rereads) == (floor, 0)
    params = parameters(SHAPES)
    optimizer = ours("Adam")(params, fused=True)
    set_gradients(0, params)
    optimizer.step()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    assert count_step(optimizer, params).per_parameter == 32
    optimizer.found_inf = torch.tensor(1.0)
    assert count_step(optimizer, params).per_parameter == 0


def test_missing_gradients_leave_their_parameters_untouched():
    params = parameters(SHAPES)
    optimizer = ours("Adam")(params)
    set_gradients(0, params)
    optimizer.step()
    params[2].grad = None
    with count_accesses({"param": params[2], "state": optimizer.state[params[2]]["exp_avg"]}) as counted:
        optimizer.step()
    assert [(b.read, b.written) for name in ("param", "state") for b in counted.of(name)] == [(0, 0)] * 2


def test_clip_grad_norm_takes_two_launches_and_twelve_bytes():
    params = parameters(SHAPES)
    set_gradients(0, params)
    gradients = {str(i): param.grad for i, param in enumerate(params)}
    clipping = count_launches(gradients, lambda: clip_grad_norm_(params, 1.0))
    assert clipping.launches == ["norm_kernel", "clip_kernel"]
    assert (clipping.per_parameter, clipping.rereads) == (12, 0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SGD", {"momentum": 0.9, "dampening": 0.5, "max_grad_norm": 1.0}), ("Adam", {"fused": True}),
        ("NAdam", {"capturable": True}), ("NAdam", {}), ("Adam", {"stochastic_rounding": True}),
    ],
    ids=str,
)  # fmt: skip
def test_programs_in_any_order_give_the_same_bits(name, settings):
    """The last program to arrive counts the steps: in the interpreter's own order a race would not show."""
    dtype = torch.bfloat16 if "stochastic_rounding" in settings else torch.float32
    runs = []
    for seed in (None, 1, 2):
        torch.manual_seed(0)
        params = parameters(SHAPES, dtype)
        optimizer = ours(name)(params, lr=0.1, **settings)
        for step in range(3):
            set_gradients(step, params)
            if seed is None:
                optimizer.step()
            else:
                with shuffled_grid(10 * seed + step):
                    optimizer.step()
        runs.append(state_tensors(optimizer, params))
    for run in runs[1:]:
        for key, tensor in runs[0].items():
            assert torch.equal(run[key], tensor), key


def test_norms_in_any_order_give_the_same_bits():
    norms = []
    for seed in (1, 2):
        params = parameters([(1030,)] * 5)
        set_gradients(0, params)
        with shuffled_grid(seed):
            norms.append(clip_grad_norm_(params, 1.0))
    assert torch.equal(*norms)
