"""Which plan of kernels a call takes, and why: a rule over shape, dtype and machine, the same on every rank and run.

The plan is the cheapest by the model of costs.py, within what is known to serve. Batch sizes enter by their bucket
alone. A forced plan (forced_plan, FASTNN_PLAN) and what fastnn.tune has measured go before the model, in this order.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from . import costs, dispatch
from .costs import Problem
from .dispatch import tiles

# Our product of split operands (product_precision) is neither tuned nor measured yet, and by the model twice as fast as
# the library's fp32. It is not taken on the model's word where it takes statistics of a product deeper than
EPILOGUE_DEPTH = 512  # or where columns would do, nor where it takes none and makes more multiply-adds than
SPLIT_PRODUCT = 1 << 27

PLANS = {
    "batch_norm": ("whole_batch", "columns", "split", "epilogue"),
    "statistics": ("split", "columns"),
    "linear": ("epilogue", "apply"),
    "linear_backward": ("grouped", "library"),
}
NAMES = tuple(dict.fromkeys(name for names in PLANS.values() for name in names))
MODEL, FORCED, MEASURED = "by the cost model", "forced", "measured by fastnn.tune"

# Of whatever is not an argument of the rules below, but for torch's own settings (fp32 precision, deterministic
# algorithms): who keeps a plan keeps it for one generation.
generation = 0


class Choice(NamedTuple):
    """A plan, what chose it (MODEL, FORCED or MEASURED), and the microseconds of every candidate by model or clock.

    untrusted: candidates that the model does not choose, with the reason. They serve where forced or measured.
    """

    plan: str
    by: str
    microseconds: dict[str, float]
    untrusted: dict[str, str]
    problem: Problem


def _checked(names: tuple[str, ...], argument: str) -> tuple[str, ...]:
    for name in names:
        if name not in NAMES:
            raise ValueError(f"{argument} must name plans of {', '.join(NAMES)}, got {name!r}")
    return names


def _from_environment(value: str) -> tuple[str, ...]:
    return _checked(tuple(name.strip() for name in value.split(",") if name.strip()), "FASTNN_PLAN")


_forced_plans = _from_environment(os.environ.get("FASTNN_PLAN", ""))
_measured: dict[tuple[str, Problem], dict[str, float]] = {}  # microseconds by (device, problem)


def forced_plan(*names: str) -> contextlib.AbstractContextManager[None]:
    """Within it, plans of these names are taken wherever they serve, in place of the rule's; for tests and benchmarks.

    Where several serve, the first; where none does, the rule's. FASTNN_PLAN, the same names with commas between them,
    does so for a whole process, and is not asked within this context.

    Args:
        names: of "whole_batch", "columns", "split", "epilogue", "apply", "grouped", "library" (kernels/README.md).

    Raises:
        ValueError: another name.
    """
    return _forcing(_checked(names, "names"))


@contextlib.contextmanager
def _forcing(names: tuple[str, ...]) -> Iterator[None]:
    global _forced_plans, generation
    before, _forced_plans = _forced_plans, names
    generation += 1
    try:
        yield
    finally:
        _forced_plans = before
        generation += 1


def state(device: torch.device) -> tuple:
    """What plans depend on beside the arguments of the rules: equal states, equal plans."""
    autocast = torch.get_autocast_dtype(device.type) if torch._C._is_any_autocast_enabled() else None
    return generation, fp32_precision(), autocast, torch._C._get_deterministic_algorithms()


def learn(device: torch.device, measured: dict[Problem, dict[str, float]]) -> None:
    """Lets the rules take the fastest of these, {problem: {plan: microseconds}}, on devices of that name."""
    global generation
    if measured:
        name = dispatch.machine(device).name
        _measured.update({(name, problem): times for problem, times in measured.items()})
        generation += 1


def is_measured(device: torch.device, problem: Problem) -> bool:
    return (dispatch.machine(device).name, problem) in _measured


def bucket(M: int) -> int:
    """What the rules know of M rows: the least power of two that is no smaller."""
    return tiles.power_of_two_at_least(M)


@functools.lru_cache(maxsize=4096)
def _model(problem: Problem, machine: dispatch.Machine) -> dict[str, float]:
    found = costs.candidates(problem, machine)
    return {name: costs.microseconds(plan, machine) for name, plan in found.items()}


def _choose(problem: Problem, device: torch.device, untrusted: dict[str, str], without: str = "") -> Choice:
    """The forced plan, the measured best or the model's, of the problem's candidates but for `without`."""
    machine = dispatch.machine(device)
    model = {name: us for name, us in _model(problem, machine).items() if name != without}
    for name in _forced_plans:
        if name in model:
            return Choice(name, FORCED, model, untrusted, problem)
    if not torch.are_deterministic_algorithms_enabled():
        times = _measured.get((machine.name, problem), {})
        measured = {name: times[name] for name in model if name in times}
        if measured:
            return Choice(min(measured, key=lambda name: measured[name]), MEASURED, measured, {}, problem)
    plan = min((name for name in model if name not in untrusted), key=lambda name: model[name])
    return Choice(plan, MODEL, model, untrusted, problem)


def _arithmetic(dtype: torch.dtype) -> str:
    return "half" if dtype.itemsize == 2 else fp32_precision()


def statistics_choice(M: int, N: int, itemsize: int, device: torch.device) -> Choice:
    return _choose(Problem("statistics", bucket(M), N, 0, itemsize, "none"), device, {})


def statistics_plan(M: int, N: int, itemsize: int, device: torch.device) -> str:
    """The plan of kernels that need sums over rows, forward and backward: "columns" or "split".

    Columns moves 3/5 of split's bytes in the backward (2/3 in the forward) with half its launches, where its second
    pass finds in registers or in L2 what the first has read, and where columns are enough to draw the bandwidth.
    """
    return statistics_choice(M, N, itemsize, device).plan


def batch_norm_choice(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, save: bool = True) -> Choice:
    other = {"columns": "split", "split": "columns"}[statistics_plan(M, N, dtype.itemsize, device)]
    untrusted = {}
    if K * dtype.itemsize % tiles.ACCESS_BYTES:
        untrusted["epilogue"] = f"rows of {K * dtype.itemsize} bytes are no multiple of {tiles.ACCESS_BYTES}"
    elif splits(dtype) and (K > EPILOGUE_DEPTH or other == "split"):
        untrusted["epilogue"] = "unmeasured in full fp32"
    problem = Problem("batch_norm", bucket(M), N, K, dtype.itemsize, _arithmetic(dtype), "batch", save)
    return _choose(problem, device, untrusted, other)


def batch_norm_plan(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> str:
    """The forward's plan of a Linear with training-mode BatchNorm: our product, or the library's and statistics_plan's.

    "whole_batch" takes one launch for two and moves one access less, but its programs read x once each, from L2, and
    use no more multiprocessors than there are column tiles. "epilogue" takes the statistics where "split" would read z
    once more, with a product that is slower than the library's.
    """
    return batch_norm_choice(M, N, K, dtype, device).plan


def splits(dtype: torch.dtype) -> bool:
    """Whether a product computed in dtype splits its operands (product_precision), which takes registers."""
    return dtype == torch.float32 and fp32_precision() == "ieee"


def linear_choice(
    M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, norm: str = "running", save: bool = False
) -> Choice:
    untrusted, rows = {}, bucket(M)
    if splits(dtype) and rows * N * K > SPLIT_PRODUCT:
        untrusted["epilogue"] = "unmeasured in full fp32"
    return _choose(Problem("linear", rows, N, K, dtype.itemsize, _arithmetic(dtype), norm, save), device, untrusted)


def linear_plan(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> str:
    """The plan of a Linear whose output needs no sums: "epilogue" (our product) or "apply" (the library's, a pass)."""
    return linear_choice(M, N, K, dtype, device).plan


def forward_choice(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, norm: str, save: bool) -> Choice:
    if norm == "batch":
        return batch_norm_choice(M, N, K, dtype, device, save)
    return linear_choice(M, N, K, dtype, device, norm, save)


def forward_plan(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, norm: str, save: bool) -> str:
    """The plan of a Linear and what follows it; norm as in launch.Settings, save: whether a backward follows."""
    return forward_choice(M, N, K, dtype, device, norm, save).plan


def linear_backward_choice(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> Choice:
    problem = Problem("linear_backward", bucket(M), N, K, dtype.itemsize, _arithmetic(dtype))
    return _choose(problem, device, {})


def linear_backward_plan(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> str:
    """The plan of several gradients of a Linear: "grouped" (ours, in one launch) or "library" (a launch each)."""
    return linear_backward_choice(M, N, K, dtype, device).plan if dispatch.HAS_KERNELS else "library"


def rounds_operands(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, norm: str, save: bool) -> bool:
    """Whether our kernels read a Linear's operands of other dtypes as they are, for no cast to be launched.

    Where its product is ours each way. A large one is worth its casts: 16-bit operands are copied to tensor cores
    asynchronously, and are half the bytes of each of its rereads. So is a traced one: Inductor fuses casts, and the
    answer would be guarded on the batch size.
    """
    if dispatch.is_traced() or linear_backward_plan(M, N, K, dtype, device) != "grouped":
        return False
    one_launch = "whole_batch" if norm == "batch" else "epilogue"
    return forward_plan(M, N, K, dtype, device, norm, save) == one_launch


def product_precision(dtype: torch.dtype) -> str:
    """input_precision of tl.dot for a product computed in dtype.

    Where torch's settings ask for full fp32, tensor cores sum six of the nine products of two numbers split into three
    bf16 parts each. By a model of the tensor cores of an A100 and an H100 (normal and positive operands, K from 16 to
    8192 in steps of 32) that is at most 0.89 times as far from float64 as a chain of fused multiply-adds; three
    products of TF32 parts are up to 2.8 times as far.
    """
    if dtype == torch.float32 and fp32_precision() == "tf32":
        return "tf32"
    return "bf16x6" if dtype == torch.float32 and not dispatch.INTERPRETED else "ieee"


def fp32_precision() -> str:
    """What torch's settings ask of float32 matrix products on CUDA: "tf32" or "ieee"."""
    asked = _setting("cuda", "matmul")
    if asked == "none":
        asked = _setting("generic", "all")
    return "tf32" if asked == "tf32" else "ieee"


def _property(backend: str, op: str) -> str:
    return (torch.backends.cuda.matmul if backend == "cuda" else torch.backends).fp32_precision


# What those properties return, in a fifth of their 0.7 µs.
_setting = getattr(torch._C, "_get_fp32_precision_getter", _property)
