"""The device that rows are timed on: its clocks, rates and graphs.

Under TRITON_INTERPRET=1 it is the CPU and every row a rehearsal: in miniature and in Triton's interpreter, to see that
it runs and passes its gate. A rehearsal measures nothing and its results are not kept.
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

REHEARSAL = triton.knobs.runtime.interpret
AVAILABLE = torch.cuda.is_available() and not REHEARSAL
DEVICE = torch.device("cuda" if AVAILABLE else "cpu")
DTYPES = ("fp32", "tf32", "bf16")

# Longer than the host takes to enqueue any row, so that its launches never wait for the host: 2 ms at 2 GHz.
HEAD_START_CYCLES = 4_000_000
ROUND_SECONDS, ROW_SECONDS = 0.01, 0.4  # of one round, and of all rounds of a row together
MIN_ROUNDS, MAX_ROUNDS, MAX_ITERATIONS = 7, 30, 1000


class Instant:
    """A moment in the device's queue. The difference of two waits for both and is in seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Instant") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def device_clock() -> "Instant | float":
    """The device's own time: with `head_start` before it, that of kernels alone, without the host's."""
    return Instant() if AVAILABLE else time.perf_counter()


def wall_clock() -> float:
    """The host's time once the device has finished: what a training loop takes."""
    synchronize()
    return time.perf_counter()


def synchronize() -> None:
    if AVAILABLE:
        torch.cuda.synchronize()


@functools.cache
def _beyond_l2() -> Tensor:
    """Four times the L2 cache: reading it leaves nothing else there, and nothing dirty either."""
    return torch.ones(4 * torch.cuda.get_device_properties(0).L2_cache_size // 4, device=DEVICE)


def head_start() -> None:
    """Empties L2 of all that a row will read, then keeps the device busy while the host enqueues the row."""
    if AVAILABLE:
        _beyond_l2().sum()
        torch.cuda._sleep(HEAD_START_CYCLES)


def rotated(make: Callable[[], Tensor], limit: int = 16) -> list[Tensor]:
    """Tensors for steps that each take the next one: as many as lie beyond L2 together, at most `limit`."""
    first = make()
    if not AVAILABLE:
        return [first]
    size = first.numel() * first.element_size()
    return [first, *(make() for _ in range(min(limit, 1 + _beyond_l2().nbytes // size) - 1))]


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """fp32 and tf32 set what float32 products may do, bf16 is autocast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        # Without autocast's cache: a row's steps share one context, and would share the first step's weights.
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bf16", cache_enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def capture(step: Callable[[], object]) -> Callable[[], None]:
    """The step as one CUDA graph; a rehearsal has none and calls the step."""
    if not AVAILABLE:
        return lambda: (step(), None)[1]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def rounds_of(call: Callable[[], object]) -> tuple[int, int]:
    """(rounds, iterations a round) of a warm call that keep a row short and a round long enough to be timed."""
    start = wall_clock()
    call()
    seconds = max(wall_clock() - start, 1e-6)
    iterations = 1 if REHEARSAL else min(max(round(ROUND_SECONDS / seconds), 1), MAX_ITERATIONS)
    rounds = 1 if REHEARSAL else min(max(round(ROW_SECONDS / (iterations * seconds)), MIN_ROUNDS), MAX_ROUNDS)
    return rounds, iterations


def seconds(call: Callable[[], object], rounds: int = 20) -> float:
    """Median time of the call's kernels."""
    times = []
    for _ in range(3 if REHEARSAL else rounds):
        head_start()
        start = device_clock()
        call()
        times.append(device_clock() - start)  # type: ignore[operator]
    return statistics.median(times)


@functools.cache
def copy_rate() -> float:
    """Bytes per second, read and written, of a device-to-device copy of 1 GiB."""
    elements = (1 << 10) if REHEARSAL else (1 << 28)
    source, target = (torch.randn(elements, device=DEVICE) for _ in range(2))
    return 2 * 4 * elements / seconds(lambda: target.copy_(source))


@functools.cache
def gemm_rate(dtype: str) -> float:
    """FLOP per second of the library's product of two 8192 x 8192 matrices of random numbers."""
    size = 32 if REHEARSAL else 8192
    a, b = (torch.randn(size, size, device=DEVICE) for _ in range(2))
    if dtype == "bf16":
        a, b = a.bfloat16(), b.bfloat16()
    with precision("tf32" if dtype == "tf32" else "fp32"):
        return 2 * size**3 / seconds(lambda: torch.mm(a, b), rounds=10)


def launches(call: Callable[[], object]) -> int | None:
    """Kernels, copies and fills that one call runs on the device; None where the profiler sees none."""
    if not AVAILABLE:
        return None
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        synchronize()
    # The names that optimizers give their steps are on the device's timeline, too.
    work = [event for event in profile.events() if not getattr(event, "is_user_annotation", False)]
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in work) or None


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes that one call allocates at most beyond what was there before; a graph's are its own all the time."""
    if not AVAILABLE:
        return None
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    synchronize()
    return torch.cuda.max_memory_allocated() - before
