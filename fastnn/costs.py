"""What the plans of a problem cost, by a model: launches, bytes, FLOPs and how many multiprocessors are at work.

Of each launch the longest of these counts, and a plan takes the sum of its launches:

    a launch that does nothing;  bytes from device memory, and all bytes through L2, at the bandwidth that its programs
    draw;  FLOPs at the rate of their multiprocessors;  steps that wait for their loads one after another

The seconds are for telling plans apart, not for telling how long one takes: nothing here is measured, the rates are
vendors' figures as of November 2026, and fastnn.tune is for what the model gets wrong. `pytest bench -k plans` measures
what it gets wrong on a GPU: the regret of each choice.
"""

import math
from typing import NamedTuple

from .dispatch import Machine, tiles

LAUNCH_SECONDS = 2e-6  # of a kernel that has nothing to do
STEP_SECONDS = 0.5e-6  # of a loop without a pipeline: L2's latency, shared memory and the product in turn
# One multiprocessor draws so many times its share of the bandwidth: half of all saturate device memory; of L2's, which
# is 42 GB/s for each of an H100's 132, one can take 64 bytes a clock, 112 GB/s.
DRAM_SHARES, L2_SHARES = 2, 2.5
# Parts of the vendor's rate: what the library's products are known to reach, and ours, which nobody has tuned yet, in
# general and in tiles of 64 x 32.
LIBRARY, OURS, OURS_SMALL = 0.8, 0.6, 0.3
SPLIT_PRODUCTS = 6  # bf16 products for one of full fp32 (plans.product_precision)
LIBRARY_TILE, LIBRARY_DEPTH = 64, 256  # of its small products, which split K where tiles are few


class Rates(NamedTuple):
    """Bytes a second of device memory and L2; FLOP a second of dense 16-bit and TF32 tensor cores, and of fp32 FMA."""

    dram: float
    l2: float
    half: float
    tf32: float
    fp32: float


# By compute capability, from the vendor's data sheets, 16-bit products with fp32 sums: A100 80 GB, RTX 3090, RTX 4090,
# H100 SXM, B200, RTX 5090. Of L2's rates only the A100's is published (5120 bytes a clock, of which two thirds are
# taken here and for the H100); the others are assumed.
RATES = {
    (8, 0): Rates(2.0e12, 4.8e12, 312e12, 156e12, 19.5e12),
    (8, 6): Rates(0.94e12, 2.5e12, 71e12, 36e12, 36e12),
    (8, 9): Rates(1.01e12, 5.0e12, 165e12, 83e12, 83e12),
    (9, 0): Rates(3.35e12, 5.5e12, 989e12, 494e12, 67e12),
    (10, 0): Rates(8.0e12, 9.0e12, 2250e12, 1125e12, 75e12),
    (12, 0): Rates(1.8e12, 7.0e12, 210e12, 105e12, 105e12),
}


class Problem(NamedTuple):
    """What a plan is chosen for: by one rule, sizes (M a bucket of rows), numbers, and what is asked.

    arithmetic: "half" (of fp16 or bf16), "tf32" or "ieee" (full fp32); norm as in launch.Settings; save: a backward
    follows. K is 0 where there is no product.
    """

    rule: str  # of candidates()
    M: int
    N: int
    K: int
    itemsize: int
    arithmetic: str
    norm: str = "batch"
    save: bool = True

    @property
    def activation(self) -> int:
        return self.M * self.N * self.itemsize

    @property
    def operands(self) -> int:
        return self.K * (self.M + self.N) * self.itemsize


class Launch(NamedTuple):
    """Bytes, FLOPs, and the FLOP a second of all multiprocessors; `accesses` of [M, N] are among dram's bytes."""

    name: str
    accesses: int
    dram: float
    programs: int
    l2: float = 0.0  # bytes that are read again
    flops: float = 0.0
    rate: float = math.inf
    steps: int = 0


Plan = tuple[Launch, ...]


def rates(machine: Machine) -> Rates:
    """Of that capability, or of the nearest below it."""
    return RATES[max(known for known in RATES if known <= machine.capability)]


def launch_seconds(launch: Launch, machine: Machine) -> float:
    of, share = rates(machine), min(1.0, launch.programs / machine.multiprocessors)
    return max(
        LAUNCH_SECONDS,
        launch.dram / (of.dram * min(1.0, DRAM_SHARES * share)),
        (launch.dram + launch.l2) / (of.l2 * min(1.0, L2_SHARES * share)),
        launch.flops / (launch.rate * share),
        launch.steps * STEP_SECONDS,
    )


def microseconds(plan: Plan, machine: Machine) -> float:
    """To the nanosecond, so that what differs by rounding is a tie."""
    return round(1e6 * sum(launch_seconds(launch, machine) for launch in plan), 3)


def candidates(problem: Problem, machine: Machine) -> dict[str, Plan]:
    """Every plan that can run, with its launches; of equal ones the first is the better."""
    if problem.rule == "statistics":
        forward, backward = forward_passes(problem, machine), backward_passes(problem, machine)
        return {name: forward[name] + plan for name, plan in backward.items()}
    rules = {"batch_norm": _batch_norm, "linear": _linear, "linear_backward": _linear_backward}
    return rules[problem.rule](problem, machine)


def _library(problem: Problem, machine: Machine, rows: int, cols: int, depth: int) -> Launch:
    """A product of the library, one of whose matrices is [M, N]."""
    of = rates(machine)
    rate = LIBRARY * {"half": of.half, "tf32": of.tf32, "ieee": of.fp32}[problem.arithmetic]
    programs = math.ceil(rows / LIBRARY_TILE) * math.ceil(cols / LIBRARY_TILE) * math.ceil(depth / LIBRARY_DEPTH)
    moved = problem.itemsize * (rows * cols + depth * (rows + cols))
    return Launch("library product", 1, moved, programs, 0, 2.0 * rows * cols * depth, rate)


def _our_rate(problem: Problem, machine: Machine, part: float) -> float:
    """Narrower rows than 16-byte multiples are copied by as many more instructions."""
    of = rates(machine)
    rate = {"half": of.half, "tf32": of.tf32, "ieee": of.half / SPLIT_PRODUCTS}[problem.arithmetic]
    return rate * part * tiles.access_width(problem.K, problem.itemsize) * problem.itemsize / tiles.ACCESS_BYTES


def _columns(name: str, problem: Problem, machine: Machine, reads: int) -> Plan:
    """Each program reads its columns twice unless they stay in registers, and writes once.

    What all programs at work read is found in L2 again where it and what they write fit there; nothing of it where
    that is twice as much as fits.
    """
    shape = tiles.columns_tiles(problem.M, problem.N, problem.itemsize, machine.multiprocessors)
    programs, size = math.ceil(problem.N / shape.cols), problem.activation
    again = 0 if shape.one_tile else reads * size
    at_work = min(programs, machine.multiprocessors) * problem.M * shape.cols * problem.itemsize
    found = min(1.0, max(0.0, 2 - (reads + 1) * at_work / machine.l2_bytes))
    return (Launch(name, reads + 1, (reads + 1) * size + (1 - found) * again, programs, found * again),)


def _rows(name: str, problem: Problem, machine: Machine, accesses: int) -> Launch:
    """A pass by chunks of rows; partial sums (at most 128 rows of N) are not counted."""
    shape = tiles.split_tiles(problem.M, problem.N, problem.itemsize, machine.multiprocessors)
    return Launch(name, accesses, accesses * problem.activation, math.ceil(problem.N / shape.cols) * shape.chunks)


def forward_passes(problem: Problem, machine: Machine) -> dict[str, Plan]:
    """From z to the output; "apply" is for what needs no sums over rows."""
    apply = _rows("apply", problem, machine, 2)
    columns = _columns("columns forward", problem, machine, 1)
    return {"split": (_rows("statistics", problem, machine, 1), apply), "columns": columns, "apply": (apply,)}


def backward_passes(problem: Problem, machine: Machine) -> dict[str, Plan]:
    """From the gradient of the output to that of z."""
    split = (_rows("sums", problem, machine, 2), _rows("dz", problem, machine, 3))
    return {"split": split, "columns": _columns("columns backward", problem, machine, 2)}


def _batch_norm(problem: Problem, machine: Machine) -> dict[str, Plan]:
    """In whole batch every program, of 16 columns, reads all of x."""
    _, M, N, K, itemsize, arithmetic, *_ = problem
    split, forward = arithmetic == "ieee", forward_passes(problem, machine)
    rate, moved = _our_rate(problem, machine, OURS), problem.operands + problem.activation
    found: dict[str, Plan] = {}
    if tiles.whole_batch_rows(split) >= M:
        cols = tiles.whole_batch_tiles(M, K, itemsize, split).cols
        programs = math.ceil(N / cols)
        again, flops = (programs - 1) * M * K * itemsize, 2.0 * M * programs * cols * K
        found["whole_batch"] = (
            Launch("whole batch", 2, moved + problem.activation, programs, again, flops, rate),
        )  # fmt: skip
    product = _library(problem, machine, M, N, K)
    found["columns"], found["split"] = (product, *forward["columns"]), (product, *forward["split"])
    strips = tiles.linear_statistics_tiles(M, N, itemsize, split, machine.copies_tiles, machine.multiprocessors)
    programs = strips.lanes * strips.apply.chunks
    ours = Launch("product with statistics", 1, moved, programs, 0, 2.0 * M * N * K, rate)
    return found | {"epilogue": (ours, *forward["apply"])}


def _linear(problem: Problem, machine: Machine) -> dict[str, Plan]:
    """Tiles are taken as wide as they are with BatchNorm folded in. z is kept beside the output for a backward."""
    _, M, N, K, itemsize, _, norm, save = problem
    library: Plan = (_library(problem, machine, M, N, K), *forward_passes(problem, machine)["apply"])
    if norm == "running" and save:  # no kernel of ours leaves z there
        return {"apply": library}
    shape = tiles.linear_tiles(M, N, K, itemsize, True, False, machine.multiprocessors)
    programs, writes = math.ceil(M / shape.rows) * math.ceil(N / shape.cols), 1 + save
    moved, rate = problem.operands + writes * problem.activation, _our_rate(problem, machine, OURS)
    return {"epilogue": (Launch("product", writes, moved, programs, 0, 2.0 * M * N * K, rate),), "apply": library}


def _linear_backward(problem: Problem, machine: Machine) -> dict[str, Plan]:
    """Grouped: whole tiles of dW, whose depth is M, and of dx, whose depth is N; each reads its operands."""
    _, M, N, K, itemsize, *_ = problem
    shape = tiles.linear_backward_tiles(itemsize)
    of_dw, of_dx = (math.ceil(K / shape.cols) * math.ceil(size / shape.rows) for size in (N, M))
    depth, once = of_dw * M + of_dx * N, problem.operands + problem.activation
    again = max(0, depth * (shape.rows + shape.cols) * itemsize - once)
    flops, rate = 2.0 * depth * shape.rows * shape.cols, _our_rate(problem, machine, OURS_SMALL)
    steps = 0 if shape.num_stages > 1 else math.ceil(max(M, N) / shape.depth)
    grouped = Launch("both gradients", 1, once + problem.operands, of_dw + of_dx, again, flops, rate, steps)
    return {"grouped": (grouped,), "library": tuple(_library(problem, machine, *s) for s in ((M, K, N), (N, K, M)))}
