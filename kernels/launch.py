"""Launchers: torch tensors in, one plan's kernels launched, torch tensors out.

Tensors are contiguous, on one device, not empty, and of dtypes dispatch.py lets through; the current device is
theirs. Nothing here reads device memory on the host.
"""

from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import activations, batch_norm, batch_norm_backward, linear, linear_backward, linear_statistics, whole_batch
from .dropout import threshold_and_scale
from .tiles import LAUNCH_OPTIONS, LinearTiles, StripTiles, Tiles, access_width, power_of_two_at_least, row_multiple

NORM_MODES = {"none": batch_norm.NORM_NONE, "batch": batch_norm.NORM_BATCH, "running": batch_norm.NORM_RUNNING}


class Norm(NamedTuple):
    """BatchNorm of a run. mode: "none", "batch" (statistics of z) or "running"; momentum None is the average."""

    mode: str
    gamma: torch.Tensor | None = None  # (N,)
    beta: torch.Tensor | None = None  # (N,)
    running_mean: torch.Tensor | None = None  # (N,)
    running_var: torch.Tensor | None = None  # (N,)
    num_batches_tracked: torch.Tensor | None = None  # () int64
    momentum: float | None = 0.1
    eps: float = 1e-5

    @property
    def cumulative(self) -> bool:
        return self.momentum is None and self.num_batches_tracked is not None

    @property
    def factor(self) -> float:
        """What the kernel multiplies by; torch, too, moves nothing where it cannot count the batches."""
        return 0.0 if self.momentum is None else self.momentum


class Epilogue(NamedTuple):
    """Activation (a name in activations.py, with its parameters) and dropout of a run; seed () int64 where p > 0."""

    activation: str = "identity"
    a: float = 0.0
    b: float = 0.0
    p: float = 0.0
    seed: torch.Tensor | None = None

    def seed_arguments(self) -> tuple[torch.Tensor | None, int]:
        """A seed on the host goes to the kernel as a value, one on the device (tracing, capture) by its address."""
        if self.p == 0 or self.seed is None:
            return None, 0
        if self.seed.is_cpu:
            return None, self.seed.item()
        return self.seed, 0

    def scalars(self) -> tuple[float, float, int, float]:
        return self.a, self.b, *threshold_and_scale(self.p)

    def forward_constants(self) -> dict:
        return {"ACTIVATION": getattr(activations, self.activation), "DROPOUT": self.p > 0}

    def backward_constants(self) -> dict:
        return {"ACTIVATION_BACKWARD": getattr(activations, self.activation + "_backward"), "DROPOUT": self.p > 0}


class Gradients(NamedTuple):
    dz: torch.Tensor  # (M, N)
    dgamma: torch.Tensor | None  # (N,)
    dbeta: torch.Tensor | None  # (N,)
    dbias: torch.Tensor | None  # (N,)


def _tile_options(z: torch.Tensor, tiles: Tiles) -> dict:
    return {
        "VEC": access_width(z.shape[1], z.element_size()),
        "ROWS": tiles.rows,
        "COLS": tiles.cols,
        "num_warps": tiles.num_warps,
        **LAUNCH_OPTIONS,
    }


def _linear_options(out: torch.Tensor, K: int, tiles: LinearTiles, precision: str) -> dict:
    return {
        "PRECISION": precision,
        "VEC": access_width(out.shape[1], out.element_size()),
        "VEC_K": access_width(K, out.element_size()),
        "ROWS": tiles.rows,
        "COLS": tiles.cols,
        "DEPTH": tiles.depth,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        **LAUNCH_OPTIONS,
        "maxnreg": tiles.registers,
    }


def _operands(x: torch.Tensor, weight: torch.Tensor, tiles: LinearTiles) -> tuple[Any, Any]:
    """x and weight as product_tile takes them."""
    if not tiles.descriptors:
        return x, weight
    x_part, weight_part = [tiles.rows, tiles.depth], [tiles.cols, tiles.depth]
    strides = [x.shape[1], 1]  # not the tensors' own, of which that of a dimension of 1 may be anything
    return (
        TensorDescriptor(x, [*x.shape], strides, x_part),
        TensorDescriptor(weight, [*weight.shape], strides, weight_part),
    )


def _count_before(norm: Norm) -> None:
    """A launch of its own where the cumulative average reads the count in every program of the next."""
    if norm.cumulative:
        batch_norm.count_batch_kernel[(1,)](norm.num_batches_tracked, num_warps=1, **LAUNCH_OPTIONS)


def _grid(N: int, tiles: Tiles) -> tuple[int, int]:
    return triton.cdiv(N, tiles.cols), tiles.chunks


def _partials(z: torch.Tensor, tiles: Tiles, parts: int) -> torch.Tensor:
    return z.new_empty((tiles.chunks, parts, z.shape[1]), dtype=torch.float32)


def forward_columns(z: torch.Tensor, norm: Norm, epilogue: Epilogue, tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, stats) of training-mode BatchNorm in one launch; two for the cumulative average."""
    M, N = z.shape
    out, stats = torch.empty_like(z), z.new_empty((2, N), dtype=torch.float32)
    _count_before(norm)
    batch_norm.columns_forward_kernel[_grid(N, tiles)](
        z, out, norm.gamma, norm.beta, stats, norm.running_mean, norm.running_var, norm.num_batches_tracked,
        *epilogue.seed_arguments(), M, N, norm.factor, norm.eps, *epilogue.scalars(),
        CUMULATIVE=norm.cumulative, ONE_TILE=tiles.one_tile,
        **epilogue.forward_constants(), **_tile_options(z, tiles),
    )  # fmt: skip
    return out, stats


def forward_split(z: torch.Tensor, norm: Norm, epilogue: Epilogue, tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, stats) of training-mode BatchNorm in two launches."""
    M, N = z.shape
    partials = _partials(z, tiles, 3)
    options = _tile_options(z, tiles) | {"maxnreg": 128}  # for two programs of 8 warps a multiprocessor
    batch_norm.split_statistics_kernel[_grid(N, tiles)](
        z, partials, norm.num_batches_tracked, M, N, tiles.rows_per_chunk, **options
    )
    return forward_apply(z, norm, epilogue, tiles, partials)


def forward_apply(
    z: torch.Tensor, norm: Norm, epilogue: Epilogue, tiles: Tiles, partials: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, stats) in one launch where no statistics are taken: partials given, running statistics or no BatchNorm."""
    M, N = z.shape
    out = torch.empty_like(z)
    stats = z.new_empty((0 if norm.mode == "none" else 2, N), dtype=torch.float32)
    batch_norm.apply_kernel[_grid(N, tiles)](
        z, out, norm.gamma, norm.beta, stats if norm.mode != "none" else None, partials,
        norm.running_mean, norm.running_var, norm.num_batches_tracked, *epilogue.seed_arguments(),
        M, N, tiles.chunks, tiles.rows_per_chunk, norm.factor, norm.eps, *epilogue.scalars(),
        NORM=NORM_MODES[norm.mode], CUMULATIVE=norm.cumulative, CHUNKS=min(32, power_of_two_at_least(tiles.chunks)),
        **epilogue.forward_constants(), **_tile_options(z, tiles),
    )  # fmt: skip
    return out, stats


def forward_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: Norm, epilogue: Epilogue,
    tiles: LinearTiles, precision: str, keep_z: bool, dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(out, z or None) in one launch; norm.mode is "running" or "none", precision is tl.dot's.

    dtype: of out and z, and what x, weight and bias are rounded to; None is x's.
    """
    (M, K), N = x.shape, weight.shape[0]
    out = x.new_empty((M, N), dtype=dtype)
    z = torch.empty_like(out) if keep_z else None
    linear.linear_forward_kernel[(triton.cdiv(M, tiles.rows) * triton.cdiv(N, tiles.cols),)](
        *_operands(x, weight, tiles), bias, z, out, norm.gamma, norm.beta, norm.running_mean, norm.running_var,
        *epilogue.seed_arguments(), M, N, K, norm.eps, *epilogue.scalars(),
        NORM=NORM_MODES[norm.mode], DESCRIPTORS=tiles.descriptors,
        **_linear_options(out, K, tiles, precision), **epilogue.forward_constants(),
    )  # fmt: skip
    return out, z


def forward_linear_statistics(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: Norm, epilogue: Epilogue,
    tiles: StripTiles, precision: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out, z, stats) of Linear and training-mode BatchNorm in two launches: product with statistics, then apply."""
    (M, K), N = x.shape, weight.shape[0]
    z = x.new_empty((M, N))
    partials = _partials(z, tiles.apply, 3)
    linear_statistics.linear_statistics_kernel[(tiles.lanes * tiles.apply.chunks,)](
        *_operands(x, weight, tiles.product), bias, z, partials, norm.num_batches_tracked,
        M, N, K, tiles.lanes, tiles.apply.rows_per_chunk, DESCRIPTORS=tiles.product.descriptors,
        VEC_M=row_multiple(M), **_linear_options(z, K, tiles.product, precision),
    )  # fmt: skip
    out, stats = forward_apply(z, norm, epilogue, tiles.apply, partials)
    return out, z, stats


def forward_whole_batch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: Norm, epilogue: Epilogue,
    tiles: LinearTiles, precision: str, keep_z: bool, dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:  # fmt: skip
    """(out, z or None, stats) of Linear and training-mode BatchNorm in one launch; two for the cumulative average.

    dtype: as in forward_linear.
    """
    (M, K), N = x.shape, weight.shape[0]
    out, stats = x.new_empty((M, N), dtype=dtype), x.new_empty((2, N), dtype=torch.float32)
    z = torch.empty_like(out) if keep_z else None
    _count_before(norm)
    whole_batch.whole_batch_forward_kernel[(triton.cdiv(N, tiles.cols),)](
        x, weight, bias, z, out, norm.gamma, norm.beta, stats, norm.running_mean, norm.running_var,
        norm.num_batches_tracked, *epilogue.seed_arguments(), M, N, K, norm.factor, norm.eps, *epilogue.scalars(),
        CUMULATIVE=norm.cumulative, **_linear_options(out, K, tiles, precision), **epilogue.forward_constants(),
    )  # fmt: skip
    return out, z, stats


def _gradients(z: torch.Tensor, norm: Norm, bias: torch.Tensor | None) -> Gradients:
    def like(parameter: torch.Tensor | None) -> torch.Tensor | None:
        return None if parameter is None else torch.empty_like(parameter)

    return Gradients(torch.empty_like(z), like(norm.gamma), like(norm.beta), like(bias))


def backward_columns(
    g: torch.Tensor, z: torch.Tensor, stats: torch.Tensor | None, norm: Norm, epilogue: Epilogue,
    bias: torch.Tensor | None, tiles: Tiles,
) -> Gradients:  # fmt: skip
    """Gradients by z, gamma, beta and, where bias (N,) is given, by the Linear's bias, in one launch."""
    M, N = z.shape
    grads = _gradients(z, norm, bias)
    batch_norm_backward.columns_backward_kernel[_grid(N, tiles)](
        g, z, grads.dz, stats, norm.gamma, norm.beta, grads.dgamma, grads.dbeta, grads.dbias,
        *epilogue.seed_arguments(), M, N, *epilogue.scalars(),
        NORM=NORM_MODES[norm.mode], ONE_TILE=tiles.one_tile,
        **epilogue.backward_constants(), **_tile_options(z, tiles),
    )  # fmt: skip
    return grads


def backward_split(
    g: torch.Tensor, z: torch.Tensor, stats: torch.Tensor | None, norm: Norm, epilogue: Epilogue,
    bias: torch.Tensor | None, tiles: Tiles,
) -> Gradients:  # fmt: skip
    """The same in two launches."""
    M, N = z.shape
    grads, partials = _gradients(z, norm, bias), _partials(z, tiles, 2)
    options = {"NORM": NORM_MODES[norm.mode], **epilogue.backward_constants(), **_tile_options(z, tiles)}
    batch_norm_backward.split_sums_kernel[_grid(N, tiles)](
        g, z, stats, norm.gamma, norm.beta, partials, *epilogue.seed_arguments(),
        M, N, tiles.rows_per_chunk, *epilogue.scalars(), **options,
    )  # fmt: skip
    batch_norm_backward.split_dz_kernel[_grid(N, tiles)](
        g, z, grads.dz, stats, norm.gamma, norm.beta, partials, grads.dgamma, grads.dbeta, grads.dbias,
        *epilogue.seed_arguments(), M, N, tiles.chunks, tiles.rows_per_chunk, *epilogue.scalars(),
        CHUNKS=power_of_two_at_least(tiles.chunks), **options,
    )  # fmt: skip
    return grads


def backward_linear(
    g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, needs_input: bool,
    tiles: LinearTiles, precision: str,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(dx or None, dweight, dbias or None) of x Wᵀ + bias in one launch, each in its tensor's dtype."""
    (M, N), K = g.shape, x.shape[1]
    dx = torch.empty_like(x) if needs_input else None
    dweight, dbias = torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
    row_tiles = triton.cdiv(N, tiles.rows) + (triton.cdiv(M, tiles.rows) if needs_input else 0)
    linear_backward.linear_backward_kernel[(row_tiles * triton.cdiv(K, tiles.cols),)](
        g, x, weight, dx, dweight, dbias, M, N, K, **_linear_options(g, K, tiles, precision)
    )
    return dx, dweight, dbias
