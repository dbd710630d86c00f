"""Fifty steps of every optimizer with every combination of flags, by the float64 rule, against each path of torch's."""

from statistics import geometric_mean

import pytest
import torch
from support.numerics import MEAN_RATIO, judge_tensor
from support.optimizers import (
    FLAGS,
    HAS_CAPTURABLE,
    HAS_FUSED,
    LR,
    copies,
    flag_combinations,
    ours,
    parameters,
    set_gradients,
    state_tensors,
    theirs,
)  # fmt: skip

STEPS = 50
PATHS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def grouped(params, combinations, **more):
    """A group per combination of flags, each with a learning rate of its own."""
    return [
        {"params": [param], "lr": more["lr"] * (1 + i / len(params)), **flags}
        for i, (param, flags) in enumerate(zip(params, combinations, strict=True))
    ]


def build(factory, name, params, combinations, **settings):
    lr = LR.get(name, 1e-2)
    groups = grouped(params, combinations, lr=lr)
    if name == "SGD":  # its constructor looks at the defaults, not at the groups
        settings |= {"momentum": 0.9}
    if name == "Adagrad":  # its state is made from the defaults
        for group in groups:
            group.pop("initial_accumulator_value")
        settings |= {"initial_accumulator_value": 0.5}
    return factory(name)(groups, lr=lr, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FLAGS)
def test_fifty_steps_with_every_combination_of_flags(name, dtype):
    """All combinations are groups of one optimizer. Gradients are given, so that errors are the steps' alone."""
    combinations = list(flag_combinations(name))
    params = parameters([(3, 5)] * (len(combinations) - 1) + [(1030,)], dtype)
    mine = copies(params)
    exact = copies(params, torch.float64)
    eps = {"eps": 1e-3} if dtype == torch.float16 and name != "SGD" else {}  # torch's 1e-8 is 0 there
    optimizers = {"ours": (build(ours, name, mine, combinations, **eps), mine)}
    optimizers["float64"] = (build(theirs, name, exact, combinations, foreach=False, **eps), exact)
    for path, settings in PATHS.items():
        if path == "fused" and name not in HAS_FUSED:
            continue
        own = copies(params)
        optimizers[path] = (build(theirs, name, own, combinations, **settings, **eps), own)
    runs = [params for _, params in optimizers.values()]
    for step in range(STEPS):
        set_gradients(step, *runs)
        for optimizer, _ in optimizers.values():
            optimizer.step()
    assert not optimizers["ours"][0]._plan.eager_params
    results = {path: state_tensors(*both) for path, both in optimizers.items()}
    mine, exact = results.pop("ours"), results.pop("float64")
    assert mine.keys() == results["for-loop"].keys()
    ratios = []
    for key in mine:
        eager = [result[key] for result in results.values()]
        if key.endswith("step"):
            assert mine[key].item() == STEPS
        elif key.endswith("mu_product"):
            torch.testing.assert_close(mine[key], eager[0], rtol=2e-5, atol=0)
        else:
            flags = combinations[int(key.split(".")[0])]
            ratios.append(judge_tensor(f"{key} {flags}", mine[key], exact[key], *eager))
    assert geometric_mean(ratios) <= MEAN_RATIO


@pytest.mark.parametrize("flag", ["capturable", "fused"])
@pytest.mark.parametrize("name", FLAGS)
def test_counts_on_the_device_give_the_same_bits(name, flag):
    """capturable=True and fused=True keep step (and NAdam's mu_product) where the parameter is."""
    if name not in (HAS_CAPTURABLE if flag == "capturable" else HAS_FUSED):
        pytest.skip(f"torch.optim.{name} has no {flag}")
    params = parameters([(33,), (3, 4)])
    mine, plain = copies(params), copies(params)
    optimizers = ours(name)(mine, **{flag: True}), ours(name)(plain)
    for step in range(5):
        set_gradients(step, mine, plain)
        for optimizer in optimizers:
            optimizer.step()
    on_device, on_host = (state_tensors(o, p) for o, p in zip(optimizers, (mine, plain), strict=True))
    assert on_device.keys() == on_host.keys()
    for key, tensor in on_device.items():
        if key.endswith("mu_product"):  # moved on by the kernel in fp32, or on the host in fp64
            torch.testing.assert_close(tensor, on_host[key], rtol=1e-6, atol=0)
        else:
            assert torch.equal(tensor, on_host[key]), key
