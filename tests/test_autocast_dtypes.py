"""Under autocast every tensor has the dtype that torch's layers give it, at every boundary, and what raises raises."""

import contextlib
import copy
import functools
import itertools

import pytest
import torch
from support.optimizers import DEVICE
from torch import nn

import fastnn
from fastnn.activations import ACTIVATIONS

DTYPES = (torch.bfloat16, torch.float16)
OTHER = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}
NORMS = ("fp32", "half", "no affine", "none")
WIDTH, ROWS = 6, 8


def block(activation, linear, norm, dtype):
    """Layers of one run; norm: with parameters and buffers in fp32 or in that dtype, without parameters, or none."""
    layers = [nn.Linear(WIDTH, WIDTH)] if linear else []
    if norm != "none":
        layers.append(nn.BatchNorm1d(WIDTH, affine=norm != "no affine").to(dtype if norm == "half" else None))
    kind = functools.partial(nn.GELU, "tanh") if activation == "gelu_tanh" else ACTIVATIONS[activation].module
    return [*layers, kind(), nn.Dropout(0.0)]


def outcome(parts, x, contexts):
    """Of parts one after another, each in its context: outputs, their gradients, those of all leaves, and buffers.

    What raises is an outcome too: the type of the exception, after the outputs that there are.
    """
    leaf = x.clone().requires_grad_()
    out, outputs = leaf, []
    for part, context in zip(parts, contexts, strict=True):
        with context:
            try:
                out = part(out)
            except RuntimeError as error:
                return {f"output {i}": t for i, t in enumerate(outputs)}, type(error)
        out.retain_grad()
        outputs.append(out)
    weights = torch.arange(1.0, out.numel() + 1).cos().view(out.shape)
    (out * weights.to(out.dtype)).sum().backward()
    model = nn.Sequential(*parts)
    found = {f"output {i}": tensor for i, tensor in enumerate(outputs)}
    found |= {f"gradient of output {i}": tensor.grad for i, tensor in enumerate(outputs)}
    found |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {**found, "gradient of x": leaf.grad, **dict(model.named_buffers())}, None


def compare(layers, x, contexts, noise):
    """Asserts what a step in training mode gives, and then one in eval; returns what they raised.

    noise: what need not be near in training mode, as the gradient of a bias before BatchNorm, which is zero.
    """
    ours = [fastnn.nn.Sequential(*of) for of in layers]
    theirs = [nn.Sequential(*copy.deepcopy(of)) for of in layers]
    errors = []
    for train in (True, False):
        for part in (*ours, *theirs):
            part.train(train).zero_grad()
        (found, error), (expected, their_error) = (outcome(parts, x, contexts()) for parts in (ours, theirs))
        assert error == their_error
        assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in expected.items()}
        for name in expected.keys() - (noise if train else ()):
            bound = 0.1 * float(expected[name].detach().abs().max()) + 0.01
            torch.testing.assert_close(
                found[name], expected[name], rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}"
            )
        errors.append(error)
    return errors


def autocast(dtype, enabled=True):
    return torch.autocast(DEVICE, dtype, enabled=enabled)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dtypes_are_eagers_at_every_boundary(activation, dtype):
    for linear, norm, given in itertools.product((True, False), NORMS, (torch.float32, dtype)):
        layers = [block(activation, linear, norm, dtype), [nn.Linear(WIDTH, 3)]]
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(given)
        noise = {"gradient of 0.0.bias"} if linear and norm != "none" else set()
        errors = compare(layers, x, lambda: [autocast(dtype), autocast(dtype)], noise)
        # torch's batch_norm takes no narrower parameters than its input.
        expected = RuntimeError if (linear, norm, given) == (False, "half", torch.float32) else None
        assert errors == [expected, expected]


WITHIN = {  # autocast around the second of three parts, which is around all of them
    "off": lambda dtype: autocast(dtype, enabled=False),
    "of another dtype": lambda dtype: autocast(OTHER[dtype]),
    "off and on again": lambda dtype: both(autocast(dtype, enabled=False), autocast(dtype)),
}


@contextlib.contextmanager
def both(first, second):
    with first, second:
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", ["fp32", "half"])
@pytest.mark.parametrize("within", WITHIN)
def test_dtypes_are_eagers_under_autocast_within_autocast(within, parameters, dtype):
    """Where it is off, what the part before left may not fit fp32 parameters: torch's error."""
    raised = []
    for first, second, norm in itertools.product((True, False), (True, False), ("fp32", "none")):
        layers = [block("silu", first, norm, dtype), block("tanh", second, norm, dtype), [nn.Linear(WIDTH, 3)]]
        if parameters == "half":
            layers[1] = [layer.to(dtype) for layer in layers[1]]
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
        noise = {f"gradient of {i}.0.bias" for i, linear in enumerate((first, second)) if linear and norm != "none"}

        def contexts():
            return [autocast(dtype), both(autocast(dtype), WITHIN[within](dtype)), autocast(dtype)]

        raised += compare(layers, x, contexts, noise)
    assert (RuntimeError in raised) == (within == "off" or parameters == "half")
    assert None in raised
