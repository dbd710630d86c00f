"""Every learning-rate scheduler of torch drives the optimizers unmodified, as numbers and as tensors."""

import math
import warnings

import pytest
import torch
from support.optimizers import copies, ours, parameters, set_gradients, state_tensors, theirs
from torch.optim import lr_scheduler

STEPS = 8
SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + 0.1 * t)),  # the course notes' inverse decay
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, 3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=STEPS),  # cycles momentum or beta1 as well
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS, 2.0),
}
OPTIMIZERS = {"SGD": {"momentum": 0.9}, "AdamW": {}}


def test_no_scheduler_of_torch_is_left_out():
    assert set(SCHEDULERS) == set(lr_scheduler.__all__) - {"LRScheduler"}


@pytest.mark.parametrize("lr_as", ["number", "tensor"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_training_follows_the_schedule(scheduler, name, lr_as):
    params = parameters([(40,), (3, 5)])
    runs, rates = [], []
    for factory in (ours, theirs):
        own = copies(params)
        lr = torch.tensor(0.1) if lr_as == "tensor" else 0.1
        optimizer = factory(name)(
            [{"params": own[:1]}, {"params": own[1:], "weight_decay": 0.1}], lr=lr, **OPTIMIZERS[name]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR and torch 2.13 step the schedulers they are given
            schedule = SCHEDULERS[scheduler](optimizer)
            for step in range(STEPS):
                set_gradients(step, own)
                optimizer.step()
                schedule.step(1.0) if scheduler == "ReduceLROnPlateau" else schedule.step()
                rates.append(float(optimizer.param_groups[0]["lr"]))
        runs.append(state_tensors(optimizer, own))
    assert rates[:STEPS] == rates[STEPS:]
    assert len(set(rates)) > 1
    for key, tensor in runs[0].items():
        torch.testing.assert_close(tensor, runs[1][key], rtol=2e-6, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_averaged_models_and_reset_rates():
    """swa_utils.SWALR takes over from another schedule; a rate set by hand counts at once."""
    params = parameters([(40,)])
    mine, plain = copies(params), copies(params)
    optimizers = [ours("SGD")(mine, lr=0.1), theirs("SGD")(plain, lr=0.1)]
    schedules = [torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=2) for optimizer in optimizers]
    for step in range(4):
        set_gradients(step, mine, plain)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            if step == 2:
                optimizer.param_groups[0]["lr"] = 0.5
    torch.testing.assert_close(*mine, *plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_tensor_rates_and_betas_written_in_place(shape, dtype):
    """Float32 ones are read by the kernel where they lie, others by the host at each step."""
    params = parameters([(40,)])
    mine, plain = copies(params), copies(params)
    lr, beta1, beta2 = (torch.full(shape, value, dtype=dtype) for value in (0.1, 0.8, 0.99))
    optimizer = ours("Adam")(mine, lr=lr, betas=(beta1, beta2))
    reference = theirs("Adam")(plain, lr=0.1, betas=(float(beta1), float(beta2)))
    for step, rate in enumerate((0.1, 0.02, 0.3)):
        lr.fill_(rate)
        reference.param_groups[0]["lr"] = float(lr)
        set_gradients(step, mine, plain)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(*mine, *plain, rtol=1e-5, atol=1e-6)
    assert not math.isnan(mine[0].sum().item())
