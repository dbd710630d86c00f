"""Launches of the blocks' kernels: a plan as the kernels it runs, with everything settled but tensors and seed.

A launch is made once for a problem and then run for every call of it. Tensors are contiguous, on one device, not
empty, and of dtypes dispatch.py lets through; the current device is theirs. Nothing here reads device memory on the
host.
"""

from functools import reduce
from operator import itemgetter, or_
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import activations, batch_norm, batch_norm_backward, linear, linear_backward, linear_statistics, whole_batch
from .casts import INTERPRETED
from .dropout import threshold_and_scale
from .tiles import (
    ACCESS_BYTES,
    LAUNCH_OPTIONS,
    LinearTiles,
    StripTiles,
    Tiles,
    access_width,
    power_of_two_at_least,
    row_multiple,
)

NORM_MODES = {"none": batch_norm.NORM_NONE, "batch": batch_norm.NORM_BATCH, "running": batch_norm.NORM_RUNNING}
# What launches are given at each call: tensors or their addresses; of z and stats too; then the seed as a number.
FORWARD = (
    "x", "weight", "bias", "gamma", "beta", "running_mean", "running_var", "batches", "seed_ptr", "partials", "out",
    "z", "stats", "seed",
)  # fmt: skip
BACKWARD = (
    "g", "x", "weight", "gamma", "beta", "seed_ptr", "partials", "dz", "dgamma", "dbeta", "dbias", "dx", "dweight",
    "dz_sum", "z", "stats", "seed",
)  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")

_compiled: dict[Any, Any] = {}  # by all that a kernel is compiled for: a launch for other row counts finds it here


class Launch:
    """One kernel with its grid and all arguments but those of a call, which come first in its signature.

    Triton's dispatch takes the host 6 to 8 µs. It is asked once for arguments of a form; from then on the kernel it
    compiled is launched by addresses alone, in 1 µs, where 16 divides all of them.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], call: tuple[str, ...], values: dict[str, Any]):
        given = [name for name in kernel.arg_names if name not in values]
        places = [call.index(name if name in call else name.removesuffix("_ptr")) for name in given]
        self._pick = itemgetter(*places) if len(places) > 1 else lambda arguments: (arguments[places[0]],)
        self._kernel, self._grid, self._call = kernel, (*grid, 1, 1)[:3], call
        self._settled = tuple(values[name] for name in kernel.arg_names[len(given) :])
        self._options = {name: values[name] for name in OPTIONS if name in values}
        self._compiled = self._run = self._function = self._metadata = None

    @property
    def is_compiled(self) -> bool:
        return self._compiled is not None

    def by_triton(self, arguments: tuple, keep: bool) -> None:
        """With tensors; keep: 16 divides the addresses of all, and later calls may be by address."""
        given = self._pick(arguments)
        if INTERPRETED or not keep:
            self._kernel[self._grid](*given, *self._settled, **self._options)
            return
        key = self._key(given)
        compiled = _compiled.get(key)
        if compiled is None:
            compiled = _compiled[key] = self._kernel[self._grid](*given, *self._settled, **self._options)
        else:
            compiled[self._grid](*given, *self._settled)
        self._compiled, self._run = compiled, compiled.run
        self._function, self._metadata = compiled.function, compiled.packed_metadata

    def run(self, seed: int = 0, **given: torch.Tensor | None) -> None:
        """With tensors by name, by address as soon as that is settled, on the current device and stream."""
        tensors = tuple(given.get(name) for name in self._call[:-1])
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        aligned = reduce(or_, addresses) % ACCESS_BYTES == 0
        if self.is_compiled and aligned:
            by_address([self], (*addresses, seed))
        else:
            self.by_triton((*tensors, seed), keep=aligned)

    def _key(self, given: tuple) -> tuple:
        """All that Triton compiles by: of numbers, none of which are specialised on, the type."""
        settled = zip(self._kernel.params[len(given) :], self._settled, strict=True)
        flags = (value if parameter.is_constexpr else type(value) for parameter, value in settled)
        return self._kernel, *map(_form, given), *flags, *self._options.values()

    def by_address(self, arguments: tuple, stream: int) -> None:
        self._run(  # type: ignore[misc]
            *self._grid, stream, self._function, self._metadata, None, None, None,
            *self._pick(arguments), *self._settled,
        )  # fmt: skip

    def observed(self, arguments: tuple, stream: int) -> None:
        """By address, with the hooks that profilers set on Triton's launches."""
        self._compiled[self._grid](*self._pick(arguments), *self._settled, stream=stream)  # type: ignore[index]


def _form(argument: Any) -> Any:
    """What Triton compiles by of an argument of a call."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.device
    return tuple(argument.block_shape) if isinstance(argument, TensorDescriptor) else argument is None


def forget_compiled() -> None:
    """For who puts another device in the place of one."""
    _compiled.clear()


def by_address(launches: list[Launch], arguments: tuple) -> None:
    """All of them, compiled, on the current device and stream."""
    device = driver.active
    stream = device.get_current_stream(device.get_current_device())
    if _are_observed():
        for launch in launches:
            launch.observed(arguments, stream)
    else:
        for launch in launches:
            launch.by_address(arguments, stream)


def _are_observed() -> bool:
    """Whether a profiler has set hooks on Triton's launches."""
    runtime = triton.knobs.runtime
    try:
        return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
    except AttributeError:  # a function in place of the chain of them, or None
        return runtime.launch_enter_hook is not None or runtime.launch_exit_hook is not None


class Settings(NamedTuple):
    """What follows the Linear of a run.

    norm: "none", "batch" (statistics of z, training) or "running" (eval); momentum None averages over all batches.
    activation: a name in activations.py, with its parameters a and b; p: of dropout.
    """

    norm: str = "none"
    momentum: float | None = 0.1
    eps: float = 1e-5
    activation: str = "identity"
    a: float = 0.0
    b: float = 0.0
    p: float = 0.0

    @property
    def is_linear_alone(self) -> bool:
        """Whether nothing follows the Linear: its output is the block's, and its gradient the block's."""
        return self.norm == "none" and self.activation == "identity" and self.p == 0

    def values(self, M: int, N: int, K: int, itemsize: int, counts: bool) -> dict[str, Any]:
        """Arguments of the kernels by name; counts: whether there is a number of batches to average over."""
        threshold, keep_scale = threshold_and_scale(self.p)
        return {
            # torch, too, moves nothing where it cannot count the batches.
            "M": M, "N": N, "K": K, "momentum": float(self.momentum or 0), "eps": float(self.eps),
            "act_a": float(self.a), "act_b": float(self.b), "threshold": threshold, "keep_scale": keep_scale,
            "NORM": NORM_MODES[self.norm], "CUMULATIVE": self.momentum is None and counts, "DROPOUT": self.p > 0,
            "ACTIVATION": getattr(activations, self.activation),
            "ACTIVATION_BACKWARD": getattr(activations, self.activation + "_backward"),
            "VEC": access_width(N, itemsize), "VEC_K": access_width(K, itemsize), "VEC_M": row_multiple(M),
            **LAUNCH_OPTIONS,
        }  # fmt: skip


def tile_values(tiles: Tiles) -> dict[str, Any]:
    return {
        "ROWS": tiles.rows, "COLS": tiles.cols, "ONE_TILE": tiles.one_tile, "chunks": tiles.chunks,
        "rows_per_chunk": tiles.rows_per_chunk, "num_warps": tiles.num_warps,
    }  # fmt: skip


def _product_values(tiles: LinearTiles, precision: str) -> dict[str, Any]:
    return {
        "PRECISION": precision, "DESCRIPTORS": tiles.descriptors, "ROWS": tiles.rows, "COLS": tiles.cols,
        "DEPTH": tiles.depth, "num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "maxnreg": tiles.registers,
    }  # fmt: skip


def descriptors(x: torch.Tensor, weight: torch.Tensor, tiles: LinearTiles) -> tuple[Any, Any]:
    """x and weight as product_tile takes them where tiles.descriptors."""
    x_part, weight_part = [tiles.rows, tiles.depth], [tiles.cols, tiles.depth]
    strides = [x.shape[1], 1]  # not the tensors' own, of which that of a dimension of 1 may be anything
    return (
        TensorDescriptor(x, [*x.shape], strides, x_part),
        TensorDescriptor(weight, [*weight.shape], strides, weight_part),
    )


def grid_of(values: dict[str, Any], tiles: Tiles) -> tuple[int, int]:
    return triton.cdiv(values["N"], tiles.cols), tiles.chunks


def count_before(values: dict[str, Any], call: tuple[str, ...] = FORWARD) -> list[Launch]:
    """A launch of its own where the cumulative average reads the count in every program of the next."""
    if not values["CUMULATIVE"]:
        return []
    return [Launch(batch_norm.count_batch_kernel, (1,), call, {**LAUNCH_OPTIONS, "num_warps": 1})]


def forward_columns(values: dict[str, Any], tiles: Tiles) -> list[Launch]:
    """Training-mode BatchNorm in one launch; two for the cumulative average."""
    kernel, values = batch_norm.columns_forward_kernel, values | tile_values(tiles)
    return [*count_before(values), Launch(kernel, grid_of(values, tiles), FORWARD, values)]


def forward_split(values: dict[str, Any], tiles: Tiles) -> list[Launch]:
    """Training-mode BatchNorm in two launches, by partials (chunks, 3, N)."""
    statistics = values | tile_values(tiles) | {"maxnreg": 128}  # for two programs of 8 warps a multiprocessor
    kernel = batch_norm.split_statistics_kernel
    return [Launch(kernel, grid_of(values, tiles), FORWARD, statistics), *forward_apply(values, tiles)]


def forward_apply(values: dict[str, Any], tiles: Tiles) -> list[Launch]:
    """One launch where no statistics are taken: partials given, running statistics or no BatchNorm."""
    values = values | tile_values(tiles) | {"CHUNKS": min(32, power_of_two_at_least(tiles.chunks))}
    return [Launch(batch_norm.apply_kernel, grid_of(values, tiles), FORWARD, values)]


def forward_linear(values: dict[str, Any], tiles: LinearTiles, precision: str) -> list[Launch]:
    """Linear and what follows it without statistics in one launch; precision is tl.dot's."""
    grid = triton.cdiv(values["M"], tiles.rows) * triton.cdiv(values["N"], tiles.cols)
    kernel, values = linear.linear_forward_kernel, values | _product_values(tiles, precision)
    return [Launch(kernel, (grid,), FORWARD, values)]


def forward_linear_statistics(values: dict[str, Any], tiles: StripTiles, precision: str) -> list[Launch]:
    """Linear and training-mode BatchNorm in two launches: product with statistics, then apply."""
    own = {"lanes": tiles.lanes, "rows_per_strip": tiles.apply.rows_per_chunk}
    statistics = values | _product_values(tiles.product, precision) | own
    kernel, grid = linear_statistics.linear_statistics_kernel, tiles.lanes * tiles.apply.chunks
    return [Launch(kernel, (grid,), FORWARD, statistics), *forward_apply(values, tiles.apply)]


def forward_whole_batch(values: dict[str, Any], tiles: LinearTiles, precision: str) -> list[Launch]:
    """Linear and training-mode BatchNorm in one launch; two for the cumulative average."""
    kernel, own = whole_batch.whole_batch_forward_kernel, values | _product_values(tiles, precision)
    return [*count_before(values), Launch(kernel, (triton.cdiv(own["N"], tiles.cols),), FORWARD, own)]


def backward_columns(values: dict[str, Any], tiles: Tiles) -> list[Launch]:
    """Gradients by z, gamma, beta and, where it is asked for, the Linear's bias, in one launch."""
    kernel, values = batch_norm_backward.columns_backward_kernel, values | tile_values(tiles)
    return [Launch(kernel, grid_of(values, tiles), BACKWARD, values)]


def backward_split(values: dict[str, Any], tiles: Tiles) -> list[Launch]:
    """The same in two launches, by partials (chunks, 2, N)."""
    values = values | tile_values(tiles) | {"CHUNKS": power_of_two_at_least(tiles.chunks), "total_ptr": None}
    kernels = batch_norm_backward.split_sums_kernel, batch_norm_backward.split_dz_kernel
    return [Launch(kernel, grid_of(values, tiles), BACKWARD, values) for kernel in kernels]


def backward_linear(values: dict[str, Any], tiles: LinearTiles, precision: str, needs_input: bool) -> list[Launch]:
    """Gradients of x Wᵀ + bias by weight and, where they are asked for, input and bias (dz_sum), in one launch."""
    rows = triton.cdiv(values["N"], tiles.rows) + (triton.cdiv(values["M"], tiles.rows) if needs_input else 0)
    grid, values = rows * triton.cdiv(values["K"], tiles.cols), values | _product_values(tiles, precision)
    return [Launch(linear_backward.linear_backward_kernel, (grid,), BACKWARD, values)]
