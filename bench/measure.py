"""Times a call that has passed its gate and makes a row of it."""

from collections.abc import Callable
from typing import Any

from bench import gpu, results, roofline
from bench.results import Row
from bench.roofline import Kernel


def timed_row(
    benchmark: Any,
    labels: Row,
    call: Callable[..., object],
    work: dict[str, list[Kernel]],
    rate: str = "fp32",
    prepare: Callable[[], Any] | None = None,
) -> Row:
    """Times `call` and returns its row, which is the benchmark's extra_info.

    Labels with "clock": "device" time the kernels alone: L2 emptied and the host ahead, one call a round, of what
    `prepare` returns. "wall" times whole rounds of calls, the host's part included. Bytes and FLOP are those of
    work["fastnn"] for every implementation, so that GB/s compare; each bound is the model's time of a baseline over the
    model's time of ours. `rate` is the dtype whose measured GEMM rate is the ceiling.
    """

    def arguments() -> tuple[tuple, dict]:
        prepared = new()
        gpu.head_start()
        return prepared, {}

    def new() -> tuple:
        return prepare() if prepare is not None else ()

    def once() -> None:
        call(*new())

    for _ in range(1 if gpu.REHEARSAL else 5):
        once()
    rounds, iterations = gpu.rounds_of(once)
    if labels["clock"] == "device":
        benchmark.pedantic(call, setup=arguments, rounds=gpu.MAX_ROUNDS if rounds > gpu.MIN_ROUNDS else rounds)
    else:
        benchmark.pedantic(call, rounds=rounds, iterations=iterations)
    stats = benchmark.stats.stats
    flops, size = (sum(getattr(kernel, unit) for kernel in work["fastnn"]) for unit in ("flops", "bytes"))
    copy, gemm = gpu.copy_rate(), gpu.gemm_rate(rate)
    floors = {name: roofline.floor(kernels, copy, gemm, roofline.LAUNCH_SECONDS) for name, kernels in work.items()}
    prepared, next_prepared = new(), new()
    row: Row = benchmark.extra_info
    row |= {
        "kind": "timed",
        **labels,
        "median_us": round(stats.median * 1e6, 3),
        "iqr_us": round(stats.iqr * 1e6, 3),
        "rounds": stats.rounds,
        "bytes": size,
        "gb_s": round(size / stats.median / 1e9, 2),
        "copy_percent": round(100 * size / stats.median / copy, 1),
        "flops": flops,
        "tflop_s": round(flops / stats.median / 1e12, 3),
        "gemm_percent": round(100 * flops / stats.median / gemm, 1) if flops else None,
        "launches": gpu.launches(lambda: call(*prepared)),
        "peak_memory_bytes": None if labels["graphed"] else gpu.peak_memory(lambda: call(*next_prepared)),
        "model_us": round(roofline.floor(work["fastnn"], copy, gemm) * 1e6, 3),
    }
    if labels["implementation"] == "fastnn":
        row["bounds"] = {name: round(floor / floors["fastnn"], 3) for name, floor in floors.items() if name != "fastnn"}
    return row


def with_ratios(rows: list[Row]) -> list[Row]:
    """The rows, each timed one of ours with every baseline's time over it, of rows that differ in nothing else."""
    baselines: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["kind"] == "timed" and row["implementation"] != "fastnn":
            baselines.setdefault(results.setting(row), {})[row["implementation"]] = row["median_us"]

    def completed(row: Row) -> Row:
        if row["kind"] != "timed" or row["implementation"] != "fastnn":
            return row
        medians = baselines.get(results.setting(row), {})
        ratios = {name: round(median / row["median_us"], 3) for name, median in medians.items()}
        return row | {
            "ratios": ratios,
            "bounds": {name: row["bounds"][name] for name in ratios if name in row["bounds"]},
        }

    return [completed(row) for row in rows]
