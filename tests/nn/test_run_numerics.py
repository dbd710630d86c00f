"""Where a run's numbers are not those of its layers, bit by bit: rounding, masks, zeros; both sides of each."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.sequential_pair import TOLERANCES, cost, drawn, pair
from torch import nn

import fastnn
from fastnn import dispatch, plans

HALF = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, in the interpreter's casts


def models(*layers, path="kernels"):
    return pair(path, copy.deepcopy(list(layers)))


# Dropout


def test_masks_are_other_draws(path):
    """Of one seed, where the kernels draw them; torch's own where they do not serve."""
    found = []
    for model in models(nn.ReLU(), nn.Dropout(0.5), path=path):
        torch.manual_seed(3)
        found.append(model(torch.ones(16, 16, dtype=torch.float64 if path == "float64" else torch.float32)))
    assert torch.equal(*found) == (path != "kernels")


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_the_generator_moves_otherwise(p, device):
    """Where the kernels serve: what is drawn next is another number, at p = 1 as well, where torch draws nothing.

    A GPU's generator moves by a mask's four draws in both, as long as torch has a thread for each four elements.
    """
    following = []
    for model in models(nn.ReLU(), nn.Dropout(p)):
        torch.manual_seed(3)
        model(torch.ones(4, 4))
        following.append(torch.rand(4))
    assert torch.equal(*following) == (p == 0 or (p == 0.5 and device.type == "cuda"))
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), following[1]) == (p in (0, 1))


def test_rates_are_rounded_to_16_bits():
    """At 1e-6 nothing is dropped nor scaled; torch drops about four of four million."""
    torch.manual_seed(0)
    ours, theirs = models(nn.ReLU(), nn.Dropout(1e-6))
    assert torch.equal(ours(torch.ones(64, 64)), torch.ones(64, 64))
    found = theirs(torch.ones(1 << 22))
    assert 0 < (found == 0).sum() < 20
    assert found.max() > 1


# Precision


def test_last_bits_differ():
    ours, theirs = models(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.GELU())
    x = drawn("kernels", 33, 64)
    found, expected = ours(x), theirs(x)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=TOLERANCES["kernels"], atol=TOLERANCES["kernels"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_last_bits_depend_on_whether_a_gradient_is_asked_for(dtype):
    """Which decides the plan, and whether z is stored: rounded, in 16 bits."""
    same = []
    for model in models(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.GELU()):
        model.to(dtype).eval()
        x = drawn("kernels", 33, 64).to(dtype)
        with torch.no_grad():
            alone = model(x)
        same.append(torch.equal(model(x), alone))
        torch.testing.assert_close(model(x), alone, rtol=1.6e-2, atol=1e-2)
    assert same == [False, True]


@HALF
def test_nothing_is_rounded_between_the_layers_of_a_run():
    """-1e5 is beyond float16, and a thousandth of it is not."""
    norm = nn.BatchNorm1d(1, affine=False, track_running_stats=False)
    norm.weight = nn.Parameter(torch.full((1,), 1e5))
    x = torch.tensor([[-1.0], [1.0]]).half()
    for kind, expected in ((fastnn.nn.Sequential, -100), (nn.Sequential, -torch.inf)):
        assert kind(norm, nn.LeakyReLU(1e-3))(x)[0] == expected


@HALF
def test_without_gradients_the_linears_output_is_not_rounded():
    results = []
    for model in models(nn.Linear(4, 3, bias=False), nn.LeakyReLU(1e-3)):
        model.half()[0].weight.data.fill_(-1.0)
        x = torch.full((2, 4), 3e4).half()
        with torch.no_grad():
            results.append(model(x)[0, 0])
        assert model(x)[0, 0] == -torch.inf
    assert results == [-120, -torch.inf]


def test_autocast_rounds_no_gradient_of_a_weight(device):
    gradients = []
    for model in models(nn.Linear(4, 3), nn.Tanh()):
        with torch.autocast(device.type, torch.bfloat16):
            out = model(drawn("kernels", 12, 4))
        cost(out.float()).backward()
        gradients.append(model[0].weight.grad)
    rounded = [torch.equal(gradient, gradient.bfloat16().float()) for gradient in gradients]
    assert rounded == [False, True]
    assert gradients[0].dtype == gradients[1].dtype == torch.float32


def test_a_gradient_beyond_float16_is_finite_in_float32(device):
    """So that GradScaler finds no overflow where torch's product in float16 has one."""
    for model, finite in zip(models(nn.Linear(4, 3), nn.Identity()), (True, False), strict=True):
        with torch.autocast(device.type, torch.float16):
            out = model(torch.full((12, 4), 100.0))
        out.backward(torch.full_like(out, 6e3))
        assert model[0].weight.grad.isfinite().all() == finite


def test_a_weight_that_changes_within_autocast_is_seen(device):
    """torch keeps its cast copy until the context ends."""
    for model, seen in zip(models(nn.Linear(4, 3), nn.Tanh()), (True, False), strict=True):
        x = drawn("kernels", 12, 4)
        with torch.autocast(device.type, torch.bfloat16):
            before = model(x)
            with torch.no_grad():
                model[0].weight.zero_()
            assert torch.equal(model(x), before) != seen


def test_sums_are_in_float32_whatever_torch_may_reduce_in():
    """A float16 sum of 1 and 512 times 2**-19 is 1, also of 128 of these at a time."""
    model = fastnn.nn.Sequential(nn.Linear(513, 1, bias=False), nn.ReLU()).half()
    model[0].weight.data.fill_(2.0**-19)
    model[0].weight.data[0, 0] = 1.0
    settings, found = torch.backends.cuda.matmul, []
    x = torch.ones(16, 513, dtype=torch.float16)
    for reduced in (False, True):
        before = settings.allow_fp16_accumulation
        settings.allow_fp16_accumulation = reduced
        try:
            with torch.no_grad(), plans.forced_plan("epilogue"):
                found.append(model(x))
        finally:
            settings.allow_fp16_accumulation = before
    assert torch.equal(*found)
    assert (found[0] == 1 + 2**-10).all()


def test_a_zero_from_a_relu_has_no_sign():
    signs = []
    for model in models(nn.ReLU(), nn.Dropout(0.0)):
        signs.append(torch.signbit(model(torch.tensor([[-0.0, -1.0]]))).tolist())
    assert signs[0] == [[False, False]]
    assert torch.signbit(F.relu(torch.tensor([[-0.0, -1.0]]))).tolist() == signs[1] == [[True, False]]


# BatchNorm


def test_adam_moves_no_bias_before_batch_statistics():
    """Its gradient is zero; torch's is what rounding leaves, which Adam brings to the size of any other."""
    moved = []
    for model in models(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()):
        before = model[0].bias.detach().clone()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            cost(model(drawn("kernels", 12, 4, seed=step))).backward()
            optimizer.step()
        moved.append((model[0].bias - before).abs().max().item())
    assert moved[0] == 0
    assert moved[1] > 0.01


def test_the_gradient_is_noise_where_no_kernel_serves(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_KERNELS", False)
    ours, theirs = models(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh())
    for model in (ours, theirs):
        cost(model(drawn("kernels", 12, 4))).backward()
        assert model[0].bias.grad.any()
