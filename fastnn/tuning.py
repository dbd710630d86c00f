"""fastnn.tune: measures the plans of a model's runs on this device, once, and lets the rules take the fastest."""

import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import costs, dispatch, plan_table, plans
from .calls import Call
from .explanation import Explanation, explanation_of
from .functional import BatchNorm, linear_batch_norm_act_dropout
from .observation import observe
from .plan_table import Times
from .plans import Problem

WARM_UPS, ROUNDS = 3, 15
HEAD_START_CYCLES = 2_000_000  # 1 ms at 2 GHz, in which the host enqueues a call, so that its launches wait for none
SEED = 0
DTYPES = {2: torch.bfloat16, 4: torch.float32}  # by bytes; fp16 takes what bf16 does
SYNC_BATCH_NORM = "Nothing was measured: the ranks of a SyncBatchNorm must take one plan, by the rule."
DETERMINISTIC = "Nothing was measured: under torch.use_deterministic_algorithms the rule alone decides."
NOT_SERVED = "Nothing was measured: no run takes the kernels on a GPU."

Plans = dict[str, Callable[[], Any]]  # what runs a problem by that plan


def tune(model: Any, *inputs: Any) -> Explanation:
    """Measures, for every fused run of the model, which plan of kernels is fastest on this device, and takes it.

    Opt-in, as torch.backends.cudnn.benchmark is: without it the plan is a fixed rule's, the same in every process. The
    runs are learned as ``fastnn.explain`` does; then every plan that can run a problem, the library's products among
    them, is timed forward and backward, on tensors and a generator of its own. A problem is a bucket of rows (up to the
    next power of two) with features, dtype, precision, BatchNorm's mode, and whether a gradient is asked for. What is
    known already, from this process or from disk, is not measured again. A plan never changes a dropout mask.

    Times are kept in ``$FASTNN_CACHE_DIR``, else ``$XDG_CACHE_HOME/fastnn``, else ``~/.cache/fastnn``, by device and
    versions, and read by ``tune`` alone. A file or folder that cannot be used is left alone, with a warning.

    Nothing is measured where no kernel serves (on a CPU), with SyncBatchNorm in the model, or under
    ``torch.use_deterministic_algorithms``, where what was measured before is not taken either; the explanation says so.

    Args:
        model: any torch.nn.Module.
        inputs: what it is called with; within ``torch.autocast`` or ``torch.no_grad()``, that is what is measured.

    Returns:
        The explanation, by what is known now.

    Raises:
        RuntimeError: during the capture of a CUDA graph.
        TypeError, ValueError: as ``fastnn.explain``.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("fastnn.tune measures and waits for the device: call it before the capture of a CUDA graph")
    calls, _ = observe(model, inputs)
    served = [call for call in calls if call.path.name == "triton"]
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        return explanation_of(calls, (SYNC_BATCH_NORM,))
    if torch.are_deterministic_algorithms_enabled():
        return explanation_of(calls, (DETERMINISTIC,))
    if not served:
        return explanation_of(calls, (NOT_SERVED,))
    notes: list[str] = []
    for device in dict.fromkeys(call.device for call in served):
        notes += _tune_device(device, [call for call in served if call.device == device])
    return explanation_of(calls, tuple(notes))


def _tune_device(device: torch.device, calls: list[Call]) -> list[str]:
    """Measures what neither this process nor its file knows, and returns notes of what it could not."""
    problems = _problems(calls)
    if all(plans.is_measured(device, problem) for problem in problems):
        return []
    machine, measured, notes = plan_table.identity(device), {}, []
    known, complaint = plan_table.load(machine)
    plans.learn(device, known)
    for problem, rows in problems.items():
        if not plans.is_measured(device, problem):
            try:
                measured[problem] = measure(problem, rows, device)
            except torch.OutOfMemoryError:
                notes.append(f"Not measured, for want of memory: {problem.rule} of {rows} rows.")
    if measured:
        plans.learn(device, measured)
        complaint = plan_table.store(machine, measured) or complaint
    if complaint:
        warnings.warn(f"fastnn.tune: {complaint}", stacklevel=3)
    return notes


def _problems(calls: list[Call]) -> dict[Problem, int]:
    """Every problem with more than one candidate, and the rows it first came with."""
    found: dict[Problem, int] = {}
    for call in calls:
        for choice in call.choices().values():
            if len(costs.candidates(choice.problem, dispatch.machine(call.device))) > 1:
                found.setdefault(choice.problem, call.M)
    return found


def measure(problem: Problem, rows: int, device: torch.device) -> Times:
    """Microseconds of every plan that can run the problem, with so many rows of its bucket."""
    names = costs.candidates(problem, dispatch.machine(device))
    with _own_settings(device):
        work = WORK[problem.rule](problem, rows, device)
        return clock({name: partial(work, name) for name in names}, device)


def clock(calls: Plans, device: torch.device) -> Times:
    """Microseconds of each call's kernels: the median of rounds, in each of which all take their turn.

    Before a call L2 is filled with something else, and the device kept busy until the host has enqueued all of it.
    """
    beyond_l2 = torch.ones(dispatch.machine(device).l2_bytes, dtype=torch.float32, device=device)  # four times L2
    for call in calls.values():  # which compiles
        for _ in range(WARM_UPS):
            call()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            beyond_l2.sum()
            torch.cuda._sleep(HEAD_START_CYCLES)
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize(device)
    return {
        name: round(1e3 * statistics.median(start.elapsed_time(end) for start, end in pairs), 3)
        for name, pairs in events.items()
    }


@contextmanager
def _own_settings(device: torch.device) -> Iterator[None]:
    """Whatever the caller's autocast, grad mode and current device."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def _drawn(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Random tensors of a generator of its own."""
    generator = torch.Generator(device).manual_seed(SEED)

    def draw(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_(grad)

    return draw


def _batch_norm(N: int, mode: str, device: torch.device, grad: bool) -> BatchNorm:
    mean, var = torch.zeros(N, device=device), torch.ones(N, device=device)
    gamma, beta = (torch.ones(N, device=device, requires_grad=grad) for _ in range(2))
    return BatchNorm(mean, var, gamma, beta, training=mode == "batch")


def _statistics(problem: Problem, rows: int, device: torch.device) -> Callable[[str], Any]:
    """Forward and backward of BatchNorm and ReLU."""
    draw = _drawn(device, DTYPES[problem.itemsize])
    z, g = draw(rows, problem.N), draw(rows, problem.N, grad=False)
    norm = _batch_norm(problem.N, "batch", device, True)
    leaves = [tensor for tensor in (z, norm.weight, norm.bias) if tensor is not None]

    def work(plan: str) -> Any:
        with plans.forced_plan(plan):
            out = linear_batch_norm_act_dropout(z, batch_norm=norm, activation="relu")
            return torch.autograd.grad(out, leaves, g)

    return work


def _forward(problem: Problem, rows: int, device: torch.device) -> Callable[[str], Any]:
    """A Linear and what follows it."""
    draw, save = _drawn(device, DTYPES[problem.itemsize]), problem.save
    x, weight = draw(rows, problem.K, grad=save), draw(problem.N, problem.K, grad=save)
    norm = None if problem.norm == "none" else _batch_norm(problem.N, problem.norm, device, save)

    def work(plan: str) -> Any:
        with plans.forced_plan(plan):
            return linear_batch_norm_act_dropout(x, weight, batch_norm=norm, activation="relu")

    return work


def _linear_backward(problem: Problem, rows: int, device: torch.device) -> Callable[[str], Any]:
    """Both gradients of a Linear alone."""
    draw = _drawn(device, DTYPES[problem.itemsize])
    x, weight, g = draw(rows, problem.K), draw(problem.N, problem.K), draw(rows, problem.N, grad=False)
    outputs: dict[str, Tensor] = {}  # a forward's plan is its backward's, too

    def work(plan: str) -> Any:
        with plans.forced_plan(plan):
            if plan not in outputs:
                outputs[plan] = linear_batch_norm_act_dropout(x, weight)
            return torch.autograd.grad(outputs[plan], (x, weight), g, retain_graph=True)

    return work


WORK: dict[str, Callable[[Problem, int, torch.device], Callable[[str], Any]]] = {
    "statistics": _statistics,
    "batch_norm": _forward,
    "linear": _forward,
    "linear_backward": _linear_backward,
}
