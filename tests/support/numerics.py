"""Judges a fused result by the error that eager torch itself makes on the same problem.

The truth is eager torch in float64 on the stored inputs; errors are Frobenius norms against it, per tensor. E
are the errors of eager torch in the stored dtype under random permutations of rows and features: orders of
summation that are all equally right. f is eps * norm / 16: eps of the stored dtype, norm of the truth.
"""

import math
from collections.abc import Callable
from statistics import geometric_mean

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Function = Callable[[Tensors], Tensors]

# Rounding a tensor to nearest once costs about eps * norm / 5: 1 / sqrt(12) of a unit in the last place, with
# mantissas spread over [1, 2). Truncating costs twice that. A tensor of one number is the hardest to judge.
DRAWS = 64  # log|error| of one number scatters by 1.14, its mean over 64 draws by 0.14
PERMUTATIONS = 8  # the rms of 8 errors of one number scatters by 25 %: no draw rests on one lucky order
MEAN_RATIO = 1.25  # (err + f) / (rms E + f): 1 if as good as eager, 0.57 for one number, 5.5 scatters below
WORST_RATIO = 4.0  # err / max E: of one number with normal errors, 1 draw in 7400 is above
WORST_ULPS = 1.0  # added to that bound, in eps * norm: five roundings, for where eager happens to make none
FLOOR_ULPS = 1 / 16  # f: a third of one rounding, so that the ratio means something where eager is exact
DRIFT = 1 / 16  # of E, how far the truth may move with the order: float64 is 2**29 times finer than float32
TINY = torch.finfo(torch.float64).tiny  # makes the ratio of a tensor of exact zeros 1, not 0 / 0


def judge(
    ours: Function,
    eager: Function,
    draw: Callable[[torch.Generator], Tensors],
    axes: dict[str, str],
    *,
    draws: int = DRAWS,
    permutations: int = PERMUTATIONS,
    floor: dict[str, float] | None = None,
) -> None:
    """Asserts that `ours` is as accurate as `eager` on average over draws, and near it in every single one.

    Both map inputs to outputs by name and may write to their inputs, which are dense copies. `draw` makes the
    inputs from a CPU generator seeded with the number of the draw. `axes` names each dimension of an input or
    output by a letter ("x": "MK"): axes of one letter are permuted alike, a tensor not in it stays as it is.
    `floor` is a norm per output, in its unit, that adds to f and the single bound: the mean may be a quarter.
    """
    found = []
    for number in range(draws):
        generator = torch.Generator().manual_seed(number)
        inputs = draw(generator)
        runs = _runs(ours, eager, inputs, axes, _orders(inputs, axes, permutations, generator))
        found.append(_ratios(runs, floor or {}, f"draw {number}"))
    for name in found[0]:
        ratios = [one[name] for one in found]
        mean, most = geometric_mean(ratios), f"{max(ratios):.3g} in draw {ratios.index(max(ratios))}"
        assert mean <= MEAN_RATIO, f"{name}: mean ratio {mean:.3g}, limit {MEAN_RATIO}, highest {most}"


def judge_once(
    ours: Function,
    eager: Function,
    inputs: Tensors,
    axes: dict[str, str],
    *,
    permutations: int = PERMUTATIONS,
    floor: dict[str, float] | None = None,
) -> None:
    """Asserts the bound that `judge` sets a single draw; the arguments are those of `judge`."""
    orders = _orders(inputs, axes, permutations, torch.Generator().manual_seed(0))
    _ratios(_runs(ours, eager, inputs, axes, orders), floor or {}, "the given inputs")


def judge_tensor(label: str, mine: Tensor, exact: Tensor, *eager: Tensor, floor: float = 0.0) -> float:
    """Asserts that bound on one tensor, E being the errors of eager's own variants; returns the ratio to their rms."""
    return _ratio(label, floor, mine, eager[0], exact, exact, *eager)


def _orders(inputs: Tensors, axes: dict[str, str], count: int, generator: torch.Generator) -> list[Tensors]:
    """`count` random permutations of each letter of the inputs."""
    sizes: dict[str, int] = {}
    for name in (name for name in inputs if name in axes):
        for letter, size in zip(axes[name], inputs[name].shape, strict=False):
            assert sizes.setdefault(letter, size) == size, f"{name}: {letter} is {size}, or {sizes[letter]}"
    return [{k: torch.randperm(sizes[k], generator=generator) for k in sorted(sizes)} for _ in range(count)]


def _runs(
    ours: Function, eager: Function, inputs: Tensors, axes: dict[str, str], orders: list[Tensors]
) -> dict[str, list[Tensor]]:
    """Each output of ours, eager, float64, float64 permuted, and eager under each of the permutations."""
    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    runs = [_run(ours, inputs, axes, {}), _run(eager, inputs, axes, {}), _run(eager, wide, axes, {})]
    runs += [_run(eager, wide, axes, orders[0]), *(_run(eager, inputs, axes, order) for order in orders)]
    assert runs[0].keys() == runs[1].keys(), f"outputs {sorted(runs[0])}, eager has {sorted(runs[1])}"
    assert axes.keys() <= inputs.keys() | runs[1].keys(), f"axes name no input or output: {sorted(axes)}"
    return {name: [run[name] for run in runs] for name in runs[1]}


def _run(function: Function, inputs: Tensors, axes: dict[str, str], order: Tensors) -> Tensors:
    copies = {name: t.detach().clone() for name, t in _permute(inputs, axes, order).items()}
    outputs = {name: t.detach() for name, t in function(copies).items()}
    return _permute(outputs, axes, {letter: places.argsort() for letter, places in order.items()})


def _permute(tensors: Tensors, axes: dict[str, str], order: Tensors) -> Tensors:
    result = dict(tensors)
    for name in tensors.keys() & axes.keys() if order else ():
        assert len(axes[name]) == result[name].dim(), f"{name}: {axes[name]!r}, shape {result[name].shape}"
        for axis, letter in enumerate(axes[name]):
            if letter in order:
                result[name] = result[name].index_select(axis, order[letter].to(result[name].device))
    return result


def _ratios(runs: dict[str, list[Tensor]], floor: dict[str, float], where: str) -> dict[str, float]:
    """Asserts the bound on one draw; returns (err + f) / (rms E + f) per floating output, no unit."""
    assert floor.keys() <= runs.keys(), f"floor names no output: {sorted(floor.keys() - runs.keys())}"
    ratios = {}
    for name, (mine, plain, *others) in runs.items():
        label = f"{name}, {where}"
        assert mine.shape == plain.shape, f"{label}: shape {tuple(mine.shape)}, eager {tuple(plain.shape)}"
        assert mine.dtype == plain.dtype, f"{label}: dtype {mine.dtype}, eager {plain.dtype}"
        if plain.is_floating_point():
            ratios[name] = _ratio(label, floor.get(name, 0.0), mine, plain, *others)
        else:
            assert torch.equal(mine, plain), f"{label}: {plain.dtype} values differ from eager's"
    return ratios


def _ratio(label: str, floor: float, mine: Tensor, plain: Tensor, exact: Tensor, *others: Tensor) -> float:
    assert exact.dtype == torch.float64, f"{label}: eager makes {exact.dtype} of float64 inputs"
    # Where the truth is finite and only the stored dtype too narrow, eager says what overflow looks like.
    kind = torch.where(exact.isfinite(), _kind(plain), _kind(exact))
    for place in (_kind(mine) != kind).nonzero().tolist()[:1]:
        found, eagers, truth = (float(t[tuple(place)]) for t in (mine, plain, exact))
        raise AssertionError(f"{label}: {found} at {place}, eager {eagers}, float64 {truth}")
    err, drift, *errors = (_error(t, exact, kind == 0) for t in (mine, *others))
    most, rms = max(errors), math.sqrt(sum(e * e for e in errors) / len(errors))
    ulp = torch.finfo(plain.dtype).eps * _error(torch.zeros_like(exact), exact, kind == 0)
    f = FLOOR_ULPS * ulp + floor + TINY
    ratio, limit = (err + f) / (rms + f), WORST_RATIO * most + WORST_ULPS * ulp + floor
    steady = plain.dtype == torch.float64 or drift <= DRIFT * most + f
    assert steady, f"{label}: wrong axes, or undetermined: float64 moves by {drift:.3g}, E is {most:.3g}"
    assert err <= limit, f"{label}: error {err:.3g}, limit {limit:.3g} (ratio {ratio:.3g} to eager's error)"
    return ratio


def _kind(tensor: Tensor) -> Tensor:
    """0 where finite, 1 or -1 where infinite, 2 where NaN."""
    return torch.where(tensor.isnan(), 2.0, torch.where(tensor.isinf(), tensor.sign(), 0.0)).float()


def _error(result: Tensor, exact: Tensor, keep: Tensor) -> float:
    """Frobenius norm of the difference over `keep`, less what overflows in `result` alone; tensor's unit."""
    return float(torch.linalg.vector_norm((result.double() - exact)[keep & result.isfinite()]))
