"""Compiles what the launchers launch, without a GPU; prints a JSON row per launch. Run by test_compile.py and bench.

    python -m tests.kernels.compile_launches CAPABILITY [representative]

Each row: kernel, case, shape, dtype, resources. Launchers get CPU tensors of the real shapes, untouched and so never
resident. `representative`: one launch of each kernel for a case, what bench_compiled.py shows.
"""

import json
import sys
from functools import partial

import torch
from support.ahead_of_time import MULTIPROCESSORS, describe, stand_in_driver

from fastnn import dispatch, plans
from fastnn.activations import ACTIVATIONS
from fastnn.dispatch import Machine
from fastnn.kernels import tiles
from fastnn.kernels.launch import (
    Epilogue,
    Norm,
    backward_columns,
    backward_linear,
    backward_split,
    forward_apply,
    forward_columns,
    forward_linear,
    forward_linear_statistics,
    forward_split,
    forward_whole_batch,
)

# (M, N): a column in registers, small and at its limit; streamed; rows that no 16-byte access fits.
COLUMNS_SHAPES = ((64, 100), (1024, 1024), (10_000, 4096), (1024, 501))
# Few rows of a tail; the most chunks, so the largest table of partials.
SPLIT_SHAPES = ((64, 100), (380_000, 512))
LINEAR_SHAPES = ((64, 100, 784), (512, 101, 343), (10_000, 501, 343), (10_000, 500, 500), (2048, 2048, 2048))
# Tiles of full height; a last tile that ends within sixteen rows; tiles that leave multiprocessors idle.
EPILOGUE_SHAPES = ((80_000, 1024, 128), (80_001, 1024, 128), (2048, 400, 400))
# What plans.product_precision finds on a GPU; TF32 first, of which bench_compiled.py shows the first.
PRECISIONS = {torch.float32: ("tf32", "bf16x6"), torch.bfloat16: ("ieee",)}
# The smallest and largest tiles of whole_batch_tiles; the larger ones also where no row of K is aligned.
SMALL_SHAPES = ((64, 100, 784), (256, 104, 400), (256, 501, 343), (512, 501, 343), (512, 104, 784))


def norm_of(mode: str, N: int) -> Norm:
    column = torch.empty(N)
    return Norm(mode, column, column, column, column, torch.zeros((), dtype=torch.int64))


def activations() -> tuple[Epilogue, Epilogue]:
    """The cheapest and the most expensive, with dropout."""
    seed = torch.zeros((), dtype=torch.int64)
    return Epilogue("relu", p=0.5, seed=seed), Epilogue("gelu", p=0.5, seed=seed)


def train(tiles_of, forward, backward, M: int, N: int, dtype: torch.dtype, gpu: Machine) -> tuple:
    """Forward and backward with ReLU and dropout."""
    relu, _ = activations()
    z, stats = torch.empty((M, N), dtype=dtype), torch.empty((2, N))
    shape = tiles_of(M, N, z.element_size(), gpu.multiprocessors)
    forward(z, norm_of("batch", N), relu, shape)
    backward(z, z, stats, norm_of("batch", N), relu, stats[0], shape)
    return z, stats, shape


train_by_columns = partial(train, tiles.columns_tiles, forward_columns, backward_columns)
train_by_split = partial(train, tiles.split_tiles, forward_split, backward_split)


def launch_columns(M: int, N: int, dtype: torch.dtype, gpu: Machine) -> None:
    relu, gelu = activations()
    z, stats, shape = train_by_columns(M, N, dtype, gpu)
    if M == 64:
        forward_columns(z, norm_of("batch", N)._replace(momentum=None), relu, shape)
    if M == 1024 and N == 1024:
        forward_columns(z, norm_of("batch", N), Epilogue("relu"), shape)
    if M > 1024:
        backward_columns(z, z, stats, norm_of("running", N), relu, stats[0], shape)
        backward_columns(z, z, None, Norm("none"), gelu, stats[0], shape)


def launch_split(M: int, N: int, dtype: torch.dtype, gpu: Machine) -> None:
    relu, gelu = activations()
    z, stats, shape = train_by_split(M, N, dtype, gpu)
    if M > 100_000:
        forward_apply(z, norm_of("running", N), relu, shape)
        forward_apply(z, Norm("none"), gelu, shape)
        backward_split(z, z, stats, norm_of("running", N), relu, stats[0], shape)
        backward_split(z, z, None, Norm("none"), gelu, stats[0], shape)


def descriptors_serve(x: torch.Tensor, weight: torch.Tensor, gpu: Machine) -> bool:
    return gpu.copies_tiles and dispatch.copies_tiles(x, weight)


def launch_linear(M: int, N: int, K: int, dtype: torch.dtype, gpu: Machine) -> None:
    relu, _ = activations()
    x, weight, bias = torch.empty((M, K), dtype=dtype), torch.empty((N, K), dtype=dtype), torch.empty(N, dtype=dtype)
    plain, folded = (
        tiles.linear_tiles(M, N, K, x.element_size(), fold, descriptors_serve(x, weight, gpu), gpu.multiprocessors)
        for fold in (False, True)
    )
    for precision in PRECISIONS[dtype][: None if M * N * K <= plans.SPLIT_PRODUCT else 1]:
        forward_linear(x, weight, bias, Norm("none"), relu, plain, precision, True)
        forward_linear(x, weight, None, norm_of("running", N), relu, folded, precision, False)


def launch_epilogue(M: int, N: int, K: int, dtype: torch.dtype, gpu: Machine) -> None:
    relu, _ = activations()
    x, weight, bias = torch.empty((M, K), dtype=dtype), torch.empty((N, K), dtype=dtype), torch.empty(N, dtype=dtype)
    descriptors = descriptors_serve(x, weight, gpu)
    for precision in PRECISIONS[dtype]:
        split = precision == "bf16x6"
        shape = tiles.linear_statistics_tiles(M, N, x.element_size(), split, descriptors, gpu.multiprocessors)
        forward_linear_statistics(x, weight, bias, norm_of("batch", N), relu, shape, precision)


def launch_small(M: int, N: int, K: int, dtype: torch.dtype, gpu: Machine) -> None:
    relu, _ = activations()
    x, weight, z, bias = (torch.empty(shape, dtype=dtype) for shape in ((M, K), (N, K), (M, N), N))
    for precision in PRECISIONS[dtype]:
        split = precision == "bf16x6"
        if tiles.whole_batch_rows(split) >= M:
            shape = tiles.whole_batch_tiles(M, K, x.element_size(), split)
            forward_whole_batch(x, weight, bias, norm_of("batch", N), relu, shape, precision, True)
    if M == 64:
        for precision in PRECISIONS[dtype]:
            shape = tiles.linear_backward_tiles(x.element_size())
            backward_linear(z, x, weight, bias, True, shape, precision)


def launch_autocast(M: int, N: int, K: int, dtype: torch.dtype, gpu: Machine) -> None:
    """The same of a product computed in dtype: all operands fp32, as in a first layer, or the weight and bias alone."""
    relu, _ = activations()
    weight, bias, g = torch.empty((N, K)), torch.empty(N), torch.empty((M, N), dtype=dtype)
    for x in (torch.empty((M, K)), torch.empty((M, K), dtype=dtype)):
        shape = tiles.whole_batch_tiles(M, K, x.element_size(), False)
        forward_whole_batch(x, weight, bias, norm_of("batch", N), relu, shape, "ieee", True, dtype)
        if M == 512:
            continue  # the others' tiles are those of fewer rows
        for norm in ("none", "running"):
            shape = tiles.linear_tiles(M, N, K, weight.element_size(), norm == "running", False, gpu.multiprocessors)
            forward_linear(x, weight, bias, norm_of(norm, N), relu, shape, "ieee", norm == "none", dtype)
        backward_linear(g, x, weight, bias, True, tiles.linear_backward_tiles(weight.element_size()), "ieee")


def launch_eval(M: int, N: int, K: int, dtype: torch.dtype, gpu: Machine) -> None:
    """BatchNorm folded into the GEMM; in fp32 by TF32, as without it the library's GEMM serves."""
    x, weight = torch.empty((M, K), dtype=dtype), torch.empty((N, K), dtype=dtype)
    descriptors = descriptors_serve(x, weight, gpu)
    shape = tiles.linear_tiles(M, N, K, x.element_size(), True, descriptors, gpu.multiprocessors)
    precision = "tf32" if dtype == torch.float32 else "ieee"
    forward_linear(x, weight, None, norm_of("running", N), Epilogue("relu"), shape, precision, False)


class SeedOnDevice(Epilogue):
    """Its seed is read from device memory, as under graph capture."""

    def seed_arguments(self) -> tuple[torch.Tensor | None, int]:
        return self.seed, 0


def launch_every_activation(M: int, N: int, dtype: torch.dtype, gpu: Machine) -> None:
    z = torch.empty((M, N), dtype=dtype)
    shape = tiles.columns_tiles(M, N, z.element_size(), gpu.multiprocessors)
    for name in ACTIVATIONS:
        epilogue = SeedOnDevice(name, p=0.5, seed=torch.zeros((), dtype=torch.int64))
        forward_apply(z, Norm("none"), epilogue, shape)
        backward_columns(z, z, None, Norm("none"), epilogue, None, shape)


CASES = [
    *(("columns", launch_columns, shape) for shape in COLUMNS_SHAPES),
    *(("split", launch_split, shape) for shape in SPLIT_SHAPES),
    *(("linear", launch_linear, shape) for shape in LINEAR_SHAPES),
    *(("epilogue", launch_epilogue, shape) for shape in EPILOGUE_SHAPES),
    *(("small", launch_small, shape) for shape in SMALL_SHAPES),
]
EVERY_ACTIVATION = ("activations", launch_every_activation, (64, 64))
REPRESENTATIVE = [
    ("columns in registers", train_by_columns, (1024, 1024)),
    ("columns streamed", train_by_columns, (10_000, 4096)),
    ("split", train_by_split, (380_000, 512)),
    ("eval", launch_eval, (2048, 2048, 2048)),
    ("epilogue", launch_epilogue, (80_000, 1024, 128)),
    ("whole batch", launch_small, (512, 104, 784)),
]


def cases(capability: int, selection: list[str]) -> list[tuple]:
    if selection == ["representative"]:
        return [(*case, dtype) for dtype in (torch.float32, torch.bfloat16) for case in REPRESENTATIVE]
    every = [(*case, dtype) for dtype in (torch.float32, torch.bfloat16) for case in CASES]
    every += [("autocast", launch_autocast, shape, torch.bfloat16) for shape in SMALL_SHAPES]
    return every + [(*EVERY_ACTIVATION, torch.float32)] * (capability == 90)


def main(capability: int, *selection: str) -> None:
    rows, seen = [], set()
    gpu = dispatch.H100._replace(multiprocessors=MULTIPROCESSORS[capability], capability=divmod(capability, 10))
    with stand_in_driver(capability) as launches:
        for case, launch, shape, dtype in cases(capability, [*selection]):
            launch(*shape, dtype, gpu)
            for one in launches:
                if id(one.compiled) not in seen:
                    seen.add(id(one.compiled))
                    rows.append({"case": case, "shape": shape, "dtype": str(dtype), **describe(one)})
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
