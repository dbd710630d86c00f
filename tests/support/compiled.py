"""What the compilers for sm_80, sm_90 and sm_100 make of the kernels, as figures.

The rows come from the scripts that compile the launches, tests/kernels/compile_launches.py and compile_steps.py.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from support.figures import Row, counted
from support.processes import without_interpreter

KERNELS = Path(__file__).parent.parent / "kernels"
SCRIPTS = (KERNELS / "compile_launches.py", KERNELS / "compile_steps.py")
CAPABILITIES = (80, 90, 100)
PRODUCTS = (
    "linear_forward_kernel", "linear_statistics_kernel", "whole_batch_forward_kernel", "linear_backward_kernel",
)  # fmt: skip
PROCESSES = 2  # at a time: a compiler takes a core


def streaming_loops(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that move whole tiles, 16 bytes at a time: neither what a program does once nor what fills no tile.

    The loops of an apply launch that store nothing read partials, once.
    """
    moving = [loop for loop in row["loops"] if loop["loads"].get("128")]
    return [loop for loop in moving if loop["stores"] or row["kernel"] != "apply_kernel"]


def instructions_per_element(row: dict[str, Any]) -> float:
    """Instructions as they stand in the code / elements of a tile that a thread handles.

    Of a kernel that streams tiles, one turn of each streaming loop. Else the whole kernel, which runs from top to
    bottom once: reductions, column parameters and addresses are part of it. It means nothing for products, whose loops
    handle operands, nor for kernels without a tile.
    """
    return sum(code["instructions"] for code in streaming_loops(row) or [row]) / row["elements"]


def wide_share(row: dict[str, Any]) -> float | None:
    """Per cent of the streaming loops' loads and stores in global memory that are 16 bytes wide; None without a loop.

    A kernel of one tile mixes them with accesses to column parameters; test_compile.py bounds what is narrow there.
    """
    widths = [widths for code in streaming_loops(row) for widths in (code["loads"], code["stores"])]
    return 100 * sum(of.get("128", 0) for of in widths) / sum(sum(of.values()) for of in widths) if widths else None


def case_of(row: dict[str, Any], capability: int) -> str:
    bits = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "4": "fp32", "2": "bf16"}
    if row["kernel"] == "step_kernel":
        return f"step_kernel, {row['rule']}, {bits[str(row['dtypes'][0])]}, sm_{capability}"
    return f"{row['kernel']}, {row['case']}, {bits[row['dtype']]}, sm_{capability}"


def figures_of(row: dict[str, Any], capability: int) -> list[Row]:
    case = case_of(row, capability)
    found = counted("registers per thread", case, "registers", row["registers"])
    found += counted("bytes spilled per thread", case, "bytes", row["stack"])
    if row["elements"] and row["kernel"] not in PRODUCTS:
        found += counted("instructions per element", case, "instructions", round(instructions_per_element(row), 2))
    share = wide_share(row)
    if share is not None:
        found += counted("16-byte accesses in loops", case, "%", round(share, 1), better="higher")
    return found


def rows() -> list[Row]:
    """Of one launch of each kernel for a case; a minute on two cores."""
    jobs = list(product(SCRIPTS, CAPABILITIES))
    with ThreadPoolExecutor(PROCESSES) as pool:
        compiled = pool.map(lambda job: without_interpreter(job[0], str(job[1]), "representative"), jobs)
    found = [figures_of(row, capability) for (_, capability), of in zip(jobs, compiled, strict=True) for row in of]
    return sorted((row for of in found for row in of), key=lambda row: row["figure"])
