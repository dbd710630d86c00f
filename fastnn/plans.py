"""Which plan of kernels a call takes, and why: a rule over shape, dtype and machine, the same on every rank and run."""

import contextlib
import math
from collections.abc import Iterator

import torch

from . import dispatch
from .dispatch import tiles

# Costs of the whole-batch plan that are about a launch's 2 µs, by the figures of an H100; not yet measured.
WHOLE_BATCH_REREAD = 8 << 20  # bytes of x from L2, at 5 TB/s
WHOLE_BATCH_SPLIT = 1 << 17  # multiply-adds a column of split operands, of which a multiprocessor makes 400 a ns
# Up to that depth an access of z (4.8 TB/s) pays for a product at three quarters of the library's rate (0.8 PFLOP/s
# of 16 bits, 0.4 of TF32; of full fp32 the library's has no tensor cores), by the figures of an H200; not yet measured.
EPILOGUE_DEPTH = 512
GROUPED_PRODUCT = 1 << 24  # multiply-adds of one
SPLIT_PRODUCT = 1 << 27  # of full fp32, up to which our product serves without sums: it is not tuned, nor yet measured

generation = 0  # of whatever is not an argument of the rules below: who keeps a plan keeps it for one generation
_forced_plans: tuple[str, ...] = ()


@contextlib.contextmanager
def forced_plan(*names: str) -> Iterator[None]:
    """Takes these plans (names that the rules below return), the first that serves; for tests and benchmarks."""
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


def _pick(*candidates: str) -> str:
    """The first forced plan that is a candidate, or the first candidate."""
    return next((name for name in _forced_plans if name in candidates), candidates[0])


def statistics_plan(M: int, N: int, itemsize: int, device: torch.device) -> str:
    """The plan of kernels that need sums over rows: "columns" or "split".

    Columns moves 3/5 of split's bytes in the backward (2/3 in the forward) with half its launches:
    - always where the column stays in registers;
    - else if its second pass finds in L2 what its first has read: the g and z of all programs that run at once;
    - and if at least a third of the multiprocessors have a program, as one can draw about three times its share of
      the bandwidth.
    """
    here = dispatch.machine(device)
    shape = tiles.columns_tiles(M, N, itemsize, here.multiprocessors)
    programs = math.ceil(N / shape.cols)
    reread = 2 * min(programs, here.multiprocessors) * M * shape.cols * itemsize
    if shape.one_tile or (3 * programs >= here.multiprocessors and reread <= here.l2_bytes):
        return _pick("columns", "split")
    return _pick("split", "columns")


def batch_norm_plan(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> str:
    """The plan of a Linear with training-mode BatchNorm: our product, or the library's and one of the other two.

    "whole_batch" takes one launch for two and moves one access less, but its programs read x once each, from L2, and
    use no more multiprocessors than there are column tiles: it serves where that costs less than a launch. "epilogue"
    takes the statistics where "split" would read z once more, with a product that is slower than the library's: where
    it is shallow, its operands are copied 16 bytes at a time, and splitting them pays.
    """
    rest, split = statistics_plan(M, N, dtype.itemsize, device), splits(dtype)
    gains = K <= EPILOGUE_DEPTH and K * dtype.itemsize % tiles.ACCESS_BYTES == 0
    gains = gains and rest == "split" and (dispatch.machine(device).splits_pay or not split)
    general = _pick("epilogue", rest) if gains else _pick(rest, "epilogue")
    if tiles.whole_batch_rows(split) < M:
        return general
    reread = math.ceil(N / tiles.whole_batch_tiles(M, K, dtype.itemsize, split).cols) * M * K * dtype.itemsize
    fits = reread <= WHOLE_BATCH_REREAD and (not split or M * K <= WHOLE_BATCH_SPLIT)
    return _pick("whole_batch", "columns", "split", "epilogue") if fits else _pick(general, "whole_batch")


def splits(dtype: torch.dtype) -> bool:
    """Whether a product computed in dtype splits its operands (product_precision), which takes registers."""
    return dtype == torch.float32 and fp32_precision() == "ieee"


def linear_plan(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> str:
    """The plan of a Linear whose output needs no sums: "epilogue" (our product) or "apply" (the library's, a pass)."""
    if not splits(dtype) or M * N * K <= SPLIT_PRODUCT:
        return _pick("epilogue", "apply")
    return _pick("apply", "epilogue")


def forward_plan(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, norm: str, save: bool) -> str:
    """The plan of a Linear and what follows it; norm as in launch.Norm, save: whether a backward follows."""
    if norm == "batch":
        return batch_norm_plan(M, N, K, dtype, device)
    return "apply" if norm == "running" and save else linear_plan(M, N, K, dtype, device)


def linear_backward_plan(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> str:
    """The plan of several gradients of a Linear: "grouped" (ours, in one launch) or "library" (a launch each)."""
    return _pick("grouped", "library") if M * N * K <= GROUPED_PRODUCT else _pick("library", "grouped")


def rounds_operands(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, norm: str, save: bool) -> bool:
    """Whether our kernels read a Linear's operands of other dtypes as they are, for no cast to be launched.

    Where its product is ours each way. A large one is worth its casts: 16-bit operands are copied to tensor cores
    asynchronously, and are half the bytes of each of its rereads. So is a traced one: Inductor fuses casts, and the
    answer would be guarded on the batch size.
    """
    if torch.compiler.is_compiling() or linear_backward_plan(M, N, K, dtype, device) != "grouped":
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
    # torch.backends.cuda.matmul.fp32_precision, else torch.backends.fp32_precision, in a fifth of their 0.7 µs.
    asked = torch._C._get_fp32_precision_getter("cuda", "matmul")
    if asked == "none":
        asked = torch._C._get_fp32_precision_getter("generic", "all")
    return "tf32" if asked == "tf32" else "ieee"
