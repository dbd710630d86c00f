"""Activations as pairs of device functions: the value at y, and the gradient by y given the gradient of the value.

    name(y, a, b)              value
    name_backward(g, y, a, b)  g · name'(y)

y and g are fp32 tiles; a and b are the activation's parameters (`parameters` of the row in
fastnn/activations.py; unused by most). A NaN in y gives what torch gives: NaN in the value, and g through
the gate of a ReLU. No intermediate of a finite y overflows but where the result does.
"""

import triton
import triton.language as tl


@triton.jit
def _expm1_nonpositive(y):
    """exp(y) - 1 for y <= 0 without cancellation near 0: (w - 1)·y/log(w) at w = exp(y) (Kahan)."""
    w = tl.exp(y)
    near_zero = w == 1.0
    vanished = w < 1e-7  # exp(y) - 1 rounds to -1
    corrected = (w - 1.0) * y / tl.log(tl.where(near_zero | vanished, 0.5, w))
    return tl.where(near_zero, y, tl.where(vanished, -1.0, corrected))


@triton.jit
def _log1p_unit(u):
    """log(1 + u) for 0 <= u <= 1 without losing small u: log(w)·u/(w - 1) at w = 1 + u (Kahan)."""
    w = 1.0 + u
    tiny = w == 1.0
    return tl.where(tiny, u, tl.log(w) * u / tl.where(tiny, 1.0, w - 1.0))


@triton.jit
def _sigmoid(y):
    e = tl.exp(-tl.abs(y))
    return tl.where(y < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _tanh(y):
    """Odd polynomial below 0.6 (1.3 · 2^-24 relative, least-squares fit), 1 - 2e/(1 + e), e = exp(-2|y|), above."""
    s = tl.where(tl.abs(y) < 0.6, y * y, 0.0)
    p = -0.005883233 * s + 0.020785148
    p = p * s - 0.0537803994
    p = p * s + 0.133318803
    p = p * s - 0.333332962
    e = tl.exp(-2.0 * tl.abs(y))
    far = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(tl.abs(y) < 0.6, y + y * s * p, tl.where(y < 0, -far, far))


@triton.jit
def identity(y, a, b):
    return y


@triton.jit
def identity_backward(g, y, a, b):
    return g


@triton.jit
def relu(y, a, b):
    return tl.where(y <= 0, 0.0, y)


@triton.jit
def relu_backward(g, y, a, b):
    return tl.where(y <= 0, 0.0, g)


@triton.jit
def leaky_relu(y, a, b):
    return tl.where(y > 0, y, y * a)


@triton.jit
def leaky_relu_backward(g, y, a, b):
    return tl.where(y > 0, g, g * a)


@triton.jit
def elu(y, a, b):
    return tl.where(y > 0, y, a * _expm1_nonpositive(tl.where(y > 0, 0.0, y)))


@triton.jit
def elu_backward(g, y, a, b):
    return tl.where(y <= 0, g * a * tl.exp(tl.where(y <= 0, y, 0.0)), g)


@triton.jit
def sigmoid(y, a, b):
    return _sigmoid(y)


@triton.jit
def sigmoid_backward(g, y, a, b):
    s = _sigmoid(y)
    return g * (s * (1.0 - s))


@triton.jit
def silu(y, a, b):
    return y * _sigmoid(y)


@triton.jit
def silu_backward(g, y, a, b):
    s = _sigmoid(y)
    return g * (s * (1.0 + y * (1.0 - s)))


@triton.jit
def tanh(y, a, b):
    return _tanh(y)


@triton.jit
def tanh_backward(g, y, a, b):
    t = _tanh(y)
    return g * (1.0 - t * t)


@triton.jit
def softplus(y, a, b):
    """log(1 + exp(a·y)) / a, linear where a·y > b (a is torch's beta, b its threshold)."""
    t = y * a
    log_term = tl.where(t < 0, 0.0, t) + _log1p_unit(tl.exp(-tl.abs(t)))
    return tl.where(t > b, y, log_term / a)


@triton.jit
def softplus_backward(g, y, a, b):
    t = y * a
    return tl.where(t > b, g, g * _sigmoid(t))


@triton.jit
def gelu(y, a, b):
    return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))


@triton.jit
def gelu_backward(g, y, a, b):
    cdf = 0.5 * (1.0 + tl.erf(y * 0.7071067811865476))
    pdf = 0.3989422804014327 * tl.exp(-0.5 * y * y)
    return g * (cdf + y * pdf)


@triton.jit
def _gelu_inner_tanh(y):
    """tanh(sqrt(2/pi) (y + 0.044715 y³)) (Hendrycks & Gimpel 2016)."""
    return _tanh(0.7978845608028654 * (y + 0.044715 * y * y * y))


@triton.jit
def gelu_tanh(y, a, b):
    return 0.5 * y * (1.0 + _gelu_inner_tanh(y))


@triton.jit
def gelu_tanh_backward(g, y, a, b):
    t = _gelu_inner_tanh(y)
    inner_derivative = 0.7978845608028654 * (1.0 + 0.134145 * y * y)
    return g * (0.5 * (1.0 + t) + 0.5 * y * (1.0 - t * t) * inner_derivative)
