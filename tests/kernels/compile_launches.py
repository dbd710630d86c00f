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
from fastnn.kernels import synchronised, tiles
from fastnn.kernels.launch import (
    BACKWARD,
    FORWARD,
    Launch,
    Settings,
    backward_columns,
    backward_linear,
    backward_split,
    descriptors,
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


RELU = Settings("batch", activation="relu", p=0.5)  # the cheapest activation, and
GELU = Settings("none", activation="gelu", p=0.5)  # the most expensive


def compile_all(launches: list[Launch], **tensors: torch.Tensor | None) -> None:
    """With the tensors given by the names in FORWARD and BACKWARD, None for the others; the seed is a number."""
    names = FORWARD if "out" in tensors else BACKWARD
    for launch in launches:
        launch.by_triton((*(tensors.get(name) for name in names[:-1]), 0), keep=False)


def columns_of(norm: str, N: int) -> dict[str, torch.Tensor]:
    """Parameters, statistics and buffers."""
    if norm == "none":
        return {}
    names = ("gamma", "beta", "stats", "running_mean", "running_var")
    return {name: torch.empty(N) for name in names} | {"batches": torch.zeros((), dtype=torch.int64)}


def values_of(settings: Settings, M: int, N: int, K: int, dtype: torch.dtype) -> dict:
    return settings.values(M, N, K, dtype.itemsize, counts=True)


def walk(launcher, tiles_of, settings: Settings, M: int, N: int, dtype: torch.dtype, gpu: Machine) -> None:
    """A forward or backward of z (M, N); all gradients of the latter."""
    z, columns = torch.empty((M, N), dtype=dtype), columns_of(settings.norm, N)
    shape = tiles_of(M, N, dtype.itemsize, gpu.multiprocessors)
    launches = launcher(values_of(settings, M, N, 0, dtype), shape)
    if launcher in (backward_columns, backward_split):
        gradients = {"dgamma": columns["gamma"], "dbeta": columns["beta"]} if columns else {}
        tensors = {"g": z, "dz": z, "dbias": torch.empty(N), **gradients}
    else:
        tensors = {"out": z}
    partials = None if settings.norm != "batch" and "out" in tensors else torch.empty(8)
    compile_all(launches, z=z, partials=partials, **columns, **tensors)


def train(tiles_of, forward, backward, M: int, N: int, dtype: torch.dtype, gpu: Machine) -> None:
    """Forward and backward with ReLU and dropout."""
    walk(forward, tiles_of, RELU, M, N, dtype, gpu)
    walk(backward, tiles_of, RELU, M, N, dtype, gpu)


train_by_columns = partial(train, tiles.columns_tiles, forward_columns, backward_columns)
train_by_split = partial(train, tiles.split_tiles, forward_split, backward_split)


def launch_columns(M: int, N: int, dtype: torch.dtype, gpu: Machine) -> None:
    train_by_columns(M, N, dtype, gpu)
    if M == 64:
        walk(forward_columns, tiles.columns_tiles, RELU._replace(momentum=None), M, N, dtype, gpu)
    if M == 1024 and N == 1024:
        walk(forward_columns, tiles.columns_tiles, Settings("batch", activation="relu"), M, N, dtype, gpu)
    if M > 1024:
        walk(backward_columns, tiles.columns_tiles, RELU._replace(norm="running"), M, N, dtype, gpu)
        walk(backward_columns, tiles.columns_tiles, GELU, M, N, dtype, gpu)


def launch_split(M: int, N: int, dtype: torch.dtype, gpu: Machine) -> None:
    train_by_split(M, N, dtype, gpu)
    if M > 100_000:
        for launcher in (forward_apply, backward_split):
            walk(launcher, tiles.split_tiles, RELU._replace(norm="running"), M, N, dtype, gpu)
            walk(launcher, tiles.split_tiles, GELU, M, N, dtype, gpu)
        launch_joined(M, N, dtype, gpu)


def launch_joined(M: int, N: int, dtype: torch.dtype, gpu: Machine) -> None:
    """What BatchNorm over several processes adds to the split plan."""
    shape = tiles.split_tiles(M, N, dtype.itemsize, gpu.multiprocessors)
    made = synchronised.launches(values_of(RELU, M, N, 0, dtype), shape, 64)
    z, columns, table = torch.empty((M, N), dtype=dtype), columns_of("batch", N), torch.empty(8)
    tables = dict.fromkeys(("partials", "row", "rows", "joined", "sums", "total"), table)
    tensors = {"g": z, "z": z, "dz": z, "dgamma": table, "dbeta": table, "dbias": table, **columns, **tables}
    named = [(made.pack, synchronised.PACK), (made.add_up, synchronised.ADD_UP), (made.dz, synchronised.DZ)]
    for launch, names in [*named, *((join, synchronised.JOIN) for join in made.join)]:
        launch.by_triton((*(tensors.get(name) for name in names[:-1]), 0), keep=False)


def operands(M: int, N: int, K: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {"x": torch.empty((M, K), dtype=dtype), "weight": torch.empty((N, K), dtype=dtype)}


def descriptors_serve(K: int, dtype: torch.dtype, gpu: Machine) -> bool:
    return gpu.copies_tiles and K * dtype.itemsize % tiles.ACCESS_BYTES == 0


def product(
    launcher, settings: Settings, shape, precision: str, M: int, N: int, K: int, dtype: torch.dtype,
    tensors: dict[str, torch.Tensor], keep_z: bool = True,
) -> None:  # fmt: skip
    """A forward with a product of ours: operands and bias in tensors."""
    out, made = torch.empty((M, N), dtype=dtype), getattr(shape, "product", shape)
    if made.descriptors:
        x, weight = descriptors(tensors["x"], tensors["weight"], made)
        tensors = tensors | {"x": x, "weight": weight}
    columns = columns_of(settings.norm, N)
    launches = launcher(values_of(settings, M, N, K, dtype), shape, precision)
    compile_all(launches, out=out, z=out if keep_z else None, partials=torch.empty(8), **columns, **tensors)


def launch_linear(M: int, N: int, K: int, dtype: torch.dtype, gpu: Machine) -> None:
    given, bias = operands(M, N, K, dtype), {"bias": torch.empty(N, dtype=dtype)}
    plain, folded = (
        tiles.linear_tiles(M, N, K, dtype.itemsize, fold, descriptors_serve(K, dtype, gpu), gpu.multiprocessors)
        for fold in (False, True)
    )
    for precision in PRECISIONS[dtype][: None if M * N * K <= plans.SPLIT_PRODUCT else 1]:
        relu = RELU._replace(norm="none")
        product(forward_linear, relu, plain, precision, M, N, K, dtype, given | bias)
        product(forward_linear, RELU._replace(norm="running"), folded, precision, M, N, K, dtype, given, False)


def launch_epilogue(M: int, N: int, K: int, dtype: torch.dtype, gpu: Machine) -> None:
    given = operands(M, N, K, dtype) | {"bias": torch.empty(N, dtype=dtype)}
    copied = descriptors_serve(K, dtype, gpu)
    for precision in PRECISIONS[dtype]:
        split = precision == "bf16x6"
        shape = tiles.linear_statistics_tiles(M, N, dtype.itemsize, split, copied, gpu.multiprocessors)
        product(forward_linear_statistics, RELU, shape, precision, M, N, K, dtype, given)


def gradients_of_product(
    tensors: dict[str, torch.Tensor], precision: str, M: int, N: int, K: int, dtype: torch.dtype
) -> None:
    """In the dtypes of the operands and the bias."""
    x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
    shape = tiles.linear_backward_tiles(weight.element_size())
    launches = backward_linear(values_of(GELU, M, N, K, dtype), shape, precision, True)
    dz = torch.empty((M, N), dtype=dtype)
    compile_all(launches, dz=dz, x=x, weight=weight, dx=x, dweight=weight, dz_sum=bias)


def launch_small(M: int, N: int, K: int, dtype: torch.dtype, gpu: Machine) -> None:
    given = operands(M, N, K, dtype) | {"bias": torch.empty(N, dtype=dtype)}
    for precision in PRECISIONS[dtype]:
        split = precision == "bf16x6"
        if tiles.whole_batch_rows(split) >= M:
            shape = tiles.whole_batch_tiles(M, K, dtype.itemsize, split)
            product(forward_whole_batch, RELU, shape, precision, M, N, K, dtype, given)
    if M == 64:
        for precision in PRECISIONS[dtype]:
            gradients_of_product(given, precision, M, N, K, dtype)


def launch_autocast(M: int, N: int, K: int, dtype: torch.dtype, gpu: Machine) -> None:
    """The same of a product computed in dtype: all operands fp32, as in a first layer, or the weight and bias alone."""
    given = operands(M, N, K, torch.float32) | {"bias": torch.empty(N)}
    for x in (given["x"], given["x"].to(dtype)):
        tensors = given | {"x": x}
        shape = tiles.whole_batch_tiles(M, K, x.element_size(), False)
        product(forward_whole_batch, RELU, shape, "ieee", M, N, K, dtype, tensors)
        if M == 512:
            continue  # the others' tiles are those of fewer rows
        for norm in ("none", "running"):
            shape = tiles.linear_tiles(M, N, K, 4, norm == "running", False, gpu.multiprocessors)
            settings = RELU._replace(norm=norm)
            product(forward_linear, settings, shape, "ieee", M, N, K, dtype, tensors, norm == "none")
        gradients_of_product(tensors, "ieee", M, N, K, dtype)


def launch_eval(M: int, N: int, K: int, dtype: torch.dtype, gpu: Machine) -> None:
    """BatchNorm folded into the GEMM; in fp32 by TF32, as without it the library's GEMM serves."""
    copied = descriptors_serve(K, dtype, gpu)
    shape = tiles.linear_tiles(M, N, K, dtype.itemsize, True, copied, gpu.multiprocessors)
    precision, settings = "tf32" if dtype == torch.float32 else "ieee", Settings("running", activation="relu")
    product(forward_linear, settings, shape, precision, M, N, K, dtype, operands(M, N, K, dtype), False)


def launch_every_activation(M: int, N: int, dtype: torch.dtype, gpu: Machine) -> None:
    """With a seed that is read from device memory, as under graph capture."""
    z, seed_ptr = torch.empty((M, N), dtype=dtype), torch.zeros((), dtype=torch.int64)
    shape = tiles.columns_tiles(M, N, dtype.itemsize, gpu.multiprocessors)
    for name in ACTIVATIONS:
        values = values_of(GELU._replace(activation=name), M, N, 0, dtype)
        compile_all(forward_apply(values, shape), z=z, out=z, seed_ptr=seed_ptr)
        compile_all(backward_columns(values, shape), g=z, z=z, dz=z, seed_ptr=seed_ptr)


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
