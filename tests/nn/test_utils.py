"""clip_grad_norm_ is torch's: the norm, its dtype, the gradients left, and the errors."""

import math

import pytest
import torch
from support.optimizers import copies, parameters, set_gradients
from torch import nn

from fastnn.nn.utils import clip_grad_norm_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 2])
@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0])
def test_norm_and_gradients_are_torchs(max_norm, norm_type, dtype):
    empty = [] if norm_type == math.inf else [(0,)]  # of which torch finds no largest value
    params = parameters([(3, 5), (1030,), (), (2100,), *empty], dtype)
    exact = copies(params, torch.float64)
    set_gradients(0, params, exact)
    norm = clip_grad_norm_(iter(params), max_norm, norm_type)
    truth = nn.utils.clip_grad_norm_(exact, max_norm, norm_type)
    eps = torch.finfo(dtype).eps
    assert norm.dtype == dtype
    assert norm.shape == ()
    torch.testing.assert_close(norm.double(), truth, rtol=eps, atol=0)
    for a, b in zip(params, exact, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=2 * eps, atol=eps * 1e-3)


def test_dtypes_mixed():
    params = [*parameters([(40,)]), *parameters([(9,)], torch.bfloat16)]
    plain = copies(params)
    set_gradients(0, params, plain)
    norm, expected = clip_grad_norm_(params, 0.7), nn.utils.clip_grad_norm_(plain, 0.7)
    assert norm.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(norm, expected, rtol=5e-3, atol=0)  # torch rounds the bf16 part's norm to bf16
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_norms_that_are_not_finite(norm_type, bad):
    params = parameters([(6,), (1100,)])
    plain = copies(params)
    set_gradients(0, params, plain)
    params[1].grad[1050] = plain[1].grad[1050] = bad
    norm, expected = clip_grad_norm_(params, 1.0, norm_type), nn.utils.clip_grad_norm_(plain, 1.0, norm_type)
    torch.testing.assert_close(norm, expected, equal_nan=True)
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, equal_nan=True)
    before = [param.grad.clone() for param in params]
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True)
    for param, grad in zip(params, before, strict=True):
        torch.testing.assert_close(param.grad, grad, equal_nan=True, rtol=0, atol=0)


def test_what_torch_clips_itself():
    """No gradient, one tensor, other norms, float64, gradients listed twice, with gaps, or not of one dense block."""
    single, plain = torch.zeros(5, requires_grad=True), torch.zeros(5, requires_grad=True)
    assert clip_grad_norm_(single, 1.0) == 0.0
    for norm_type in (2.0, 3.0, 0.0):
        for dtype in (torch.float32, torch.float64):
            single, plain = parameters([(5,)], dtype), parameters([(5,)], dtype)
            set_gradients(0, single, plain)
            assert clip_grad_norm_(single[0], 0.1, norm_type) == nn.utils.clip_grad_norm_(plain[0], 0.1, norm_type)
            torch.testing.assert_close(single[0].grad, plain[0].grad)
    params, plain = parameters([(4, 4), (9,)]), parameters([(4, 4), (9,)])
    for own in (params, plain):
        own[0].grad = torch.arange(32.0).reshape(4, 8)[:, ::2]
        own[1].grad = torch.ones(9)
    params, plain = [params[0], params[1], params[1]], [plain[0], plain[1], plain[1]]
    torch.testing.assert_close(clip_grad_norm_(params, 1.0), nn.utils.clip_grad_norm_(plain, 1.0))
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_an_empty_generator_is_warned_of_as_torch_does():
    for clip in (clip_grad_norm_, nn.utils.clip_grad_norm_):
        with pytest.warns(UserWarning, match="empty generator"):
            assert clip((parameter for parameter in ()), 1.0) == 0
        assert clip([], 1.0) == 0  # which neither warns of


def test_transposed_gradients_and_new_addresses():
    """Tables are kept while gradients come back to their addresses, and only then."""
    for step in range(4):
        params, plain = parameters([(6, 4), (8,)]), parameters([(6, 4), (8,)])
        set_gradients(step, params, plain)
        for own in (params, plain):
            own[0].grad = own[0].grad.t().contiguous().t()
        torch.testing.assert_close(clip_grad_norm_(params, 1.0), nn.utils.clip_grad_norm_(plain, 1.0))
        for a, b in zip(params, plain, strict=True):
            torch.testing.assert_close(a.grad, b.grad)
