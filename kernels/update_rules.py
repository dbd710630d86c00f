"""One update per optimizer: torch.optim's algorithms, element by element, in fp32.

A rule is two device functions:

- `name_coefficients(row, step, product)`: what a program needs once, from its group's hyperparameters (`row`), the
  number of this step (from 1) and, for NAdam, the product of all momenta so far; a tuple of fp32 scalars.
- `name(p, g, states, coefficients, PRESENT)`: new parameter and states. `g` already holds maximize, weight decay and
  l1, `p` decoupled weight decay. Bit i of PRESENT says whether the i-th state exists; an absent one is passed through.

Formulas follow the documentation of torch.optim, whose sources they name; symbols are its arguments.
"""

import triton
import triton.language as tl

# Columns of a group's row of hyperparameters: the same five for every optimizer, then its own.
COLUMNS = tl.constexpr(9)
LR = tl.constexpr(0)
WEIGHT_DECAY = tl.constexpr(1)
L1 = tl.constexpr(2)
SIGN = tl.constexpr(3)  # -1 to maximize
DECOUPLED = tl.constexpr(4)  # weight decay beside the gradient, as in AdamW
OWN = tl.constexpr(5)


@triton.jit
def hyperparameter(row, column):
    """A hyperparameter in fp64: the host's number or, where there is an address, the fp32 tensor that lies there."""
    values_ptr, addresses_ptr = row
    address = tl.load(addresses_ptr + column)
    tensor = tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=0.0)
    number = tl.load(values_ptr + column).to(tl.float64, bitcast=True)
    return tl.where(address != 0, tensor.to(tl.float64), number)


@triton.jit
def smoothing(row, column):
    """(beta, 1 - beta) in fp32. The difference is taken in fp64: 1 - 0.999 in fp32 is off by 5e-5 of itself."""
    beta = hyperparameter(row, column)
    return beta.to(tl.float32), (1 - beta).to(tl.float32)


@triton.jit
def root(x):
    """The square root also of subnormals, which the instruction flushes to 0: with eps = 0, a division by 0."""
    return tl.where(x < 1e-30, tl.sqrt(x * 16777216.0) * 0.000244140625, tl.sqrt(x))  # 2^24, 2^-12


@triton.jit
def lerp(mean, g, beta, rest):
    """beta · mean + rest · g, in torch.lerp's form, which rounds only once where beta is near 1."""
    return tl.where(rest < 0.5, mean + rest * (g - mean), g - beta * (g - mean))


@triton.jit
def one_minus_power(rest, exponent):
    """1 - (1 - rest)^exponent, to a few units in the last place; rest in (0, 1], exponent >= 1.

    -expm1(exponent · log1p(-rest)) in fp32, which 1 - beta**step is not: near 1 it loses what it subtracts. The
    logarithm is the series of -2·atanh(s), s <= 0.18; what it leaves out is 3e-9 of it.
    """
    s = rest / (2 - rest)
    q = s * s
    series = -2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9)))))
    x = exponent * tl.where(rest < 0.3, series, tl.log(1 - rest))
    taylor = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8))))))
    return tl.where(x > -0.5, -x * taylor, 1 - tl.exp(x))


@triton.jit
def sgd_coefficients(row, step, product):
    momentum = hyperparameter(row, OWN).to(tl.float32)
    _, gain = smoothing(row, OWN + 1)  # 1 - dampening
    first = step == 1  # when the buffer becomes the gradient, undamped
    lr = hyperparameter(row, LR).to(tl.float32)
    nesterov = hyperparameter(row, OWN + 2) != 0
    return lr, momentum, tl.where(first, 1.0, gain), nesterov


@triton.jit
def sgd(p, g, states, coefficients, PRESENT: tl.constexpr):
    lr, momentum, gain, nesterov = coefficients
    buffer, s1, s2 = states
    if PRESENT & 1:
        buffer = momentum * buffer + gain * g  # zero before the first step
        g = tl.where(nesterov, g + momentum * buffer, buffer)
    return p - lr * g, (buffer, s1, s2)


@triton.jit
def adam_coefficients(row, step, product):
    beta1, rest1 = smoothing(row, OWN)
    beta2, rest2 = smoothing(row, OWN + 1)
    step_size = hyperparameter(row, LR).to(tl.float32) / one_minus_power(rest1, step)
    eps = hyperparameter(row, OWN + 2).to(tl.float32)
    return step_size, beta1, rest1, beta2, rest2, eps, tl.sqrt(one_minus_power(rest2, step))


@triton.jit
def adam(p, g, states, coefficients, PRESENT: tl.constexpr):
    """Kingma & Ba, arXiv:1412.6980; AMSGrad of Reddi et al. (ICLR 2018) where its state is present."""
    step_size, beta1, rest1, beta2, rest2, eps, correction = coefficients
    m, v, highest = states
    m = lerp(m, g, beta1, rest1)
    v = beta2 * v + rest2 * g * g
    second = v
    if PRESENT & 4:
        highest = tl.maximum(highest, v, propagate_nan=tl.PropagateNan.ALL)
        second = highest
    return p - step_size * (m / (root(second) / correction + eps)), (m, v, highest)


@triton.jit
def nadam_momentum(row, step):
    """mu of a step: beta1 · (1 - 0.96^(step · momentum_decay) / 2)."""
    decay = hyperparameter(row, OWN + 3).to(tl.float32)
    power = tl.exp2(step * decay * -0.05889368905356862)  # log2(0.96)
    return hyperparameter(row, OWN).to(tl.float32) * (1 - 0.5 * power)


@triton.jit
def nadam_coefficients(row, step, product):
    beta1, rest1 = smoothing(row, OWN)
    beta2, rest2 = smoothing(row, OWN + 1)
    mu, following = nadam_momentum(row, step), nadam_momentum(row, step + 1)
    product = product * mu
    lr = hyperparameter(row, LR).to(tl.float32)
    eps = hyperparameter(row, OWN + 2).to(tl.float32)
    of_g, of_m = lr * (1 - mu) / (1 - product), lr * following / (1 - product * following)
    return of_g, of_m, beta1, rest1, beta2, rest2, eps, one_minus_power(rest2, step)


@triton.jit
def nadam(p, g, states, coefficients, PRESENT: tl.constexpr):
    """Dozat, "Incorporating Nesterov momentum into Adam", 2016."""
    of_g, of_m, beta1, rest1, beta2, rest2, eps, correction = coefficients
    m, v, s2 = states
    m = lerp(m, g, beta1, rest1)
    v = beta2 * v + rest2 * g * g
    return p - (of_g * g + of_m * m) / (root(v / correction) + eps), (m, v, s2)


@triton.jit
def rmsprop_coefficients(row, step, product):
    alpha, rest = smoothing(row, OWN)
    lr = hyperparameter(row, LR).to(tl.float32)
    return lr, alpha, rest, hyperparameter(row, OWN + 1).to(tl.float32), hyperparameter(row, OWN + 2).to(tl.float32)


@triton.jit
def rmsprop(p, g, states, coefficients, PRESENT: tl.constexpr):
    """Hinton's lecture notes; centered, where the gradient's mean is kept: Graves, arXiv:1308.0850."""
    lr, alpha, rest, eps, momentum = coefficients
    square, mean, buffer = states
    square = alpha * square + rest * g * g
    variance = square
    if PRESENT & 2:
        mean = lerp(mean, g, alpha, rest)
        variance = square - mean * mean
        variance = tl.where(variance < 0, 0.0, variance)  # rounding of a constant gradient's; NaN stays
    update = g / (root(variance) + eps)
    if PRESENT & 4:
        buffer = momentum * buffer + update
        update = buffer
    return p - lr * update, (square, mean, buffer)


@triton.jit
def adagrad_coefficients(row, step, product):
    decay = 1 + (step - 1) * hyperparameter(row, OWN).to(tl.float32)
    return hyperparameter(row, LR).to(tl.float32) / decay, hyperparameter(row, OWN + 1).to(tl.float32)


@triton.jit
def adagrad(p, g, states, coefficients, PRESENT: tl.constexpr):
    """Duchi, Hazan & Singer, JMLR 12 (2011)."""
    lr, eps = coefficients
    total, s1, s2 = states
    total += g * g
    return p - lr * (g / (root(total) + eps)), (total, s1, s2)


@triton.jit
def adadelta_coefficients(row, step, product):
    rho, rest = smoothing(row, OWN)
    return hyperparameter(row, LR).to(tl.float32), rho, rest, hyperparameter(row, OWN + 1).to(tl.float32)


@triton.jit
def adadelta(p, g, states, coefficients, PRESENT: tl.constexpr):
    """Zeiler, arXiv:1212.5701."""
    lr, rho, rest, eps = coefficients
    square, moved, s2 = states
    square = rho * square + rest * g * g
    delta = root(moved + eps) / root(square + eps) * g
    moved = rho * moved + rest * delta * delta
    return p - lr * delta, (square, moved, s2)
