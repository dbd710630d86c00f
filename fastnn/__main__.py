"""``python -m fastnn``: what fastnn finds on this machine, and every kernel checked against float64 on it.

Without a GPU the kernels run in Triton's interpreter. Exit status 1 if a row of the check fails.
"""

import functools
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastnn
from fastnn import dispatch, ops, plans, reference

ROWS, IN, OUT, P = 70, 19, 24, 0.3
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True}, "Adam": {"amsgrad": True}, "AdamW": {}, "NAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True}, "Adagrad": {}, "Adadelta": {},
}  # fmt: skip
STEPS, ELEMENTS = 3, 1100  # one block accessed 16 bytes at a time, and a rest
STREAMED_ROWS = 1100  # more than a column's register tile holds, so that both passes stream
TENSORS = ("out", "d input", "d weight", "d bias", "d gamma", "d beta", "running_mean", "running_var")


class Check(NamedTuple):
    """One kernel as a forced plan over a run: its rows M, whether it has a Linear, and BatchNorm's mode.

    Without `backward` no gradient is asked for, which is when BatchNorm folds into the GEMM's epilogue.
    """

    kernel: str
    plan: str
    rows: int
    linear: bool
    norm: str
    backward: bool = True


CHECKS = (
    Check("whole batch", "whole_batch", ROWS, True, "batch"),  # and, as in all small runs, the gradients in one launch
    Check("columns, in registers", "columns", ROWS, True, "batch"),
    Check("columns, streamed", "columns", STREAMED_ROWS, False, "batch"),
    Check("split", "split", STREAMED_ROWS, False, "batch"),
    Check("linear with statistics", "epilogue", ROWS, True, "batch"),
    Check("running statistics", "apply", ROWS, True, "running"),
    Check("activation and dropout", "split", ROWS, False, "none"),
    Check("linear with epilogue", "epilogue", ROWS, True, "none"),
    Check("BatchNorm in epilogue", "epilogue", ROWS, True, "running", backward=False),
)


def describe_environment(device: torch.device) -> Iterator[str]:
    triton_version = "not usable"
    if dispatch.HAS_KERNELS:
        import triton

        triton_version = triton.__version__
    path = dispatch.device_path(device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    yield f"fastnn {fastnn.__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield f"torch {torch.__version__}, Triton {triton_version}, GPU {gpu}"
    yield f"path of {device.type} tensors: {path.name}" + (f" ({path.reason})" if path.reason else "")


def draw_tensors(check: Check, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"input": (check.rows, IN if check.linear else OUT), "grad": (check.rows, OUT)}
    if check.linear:
        shapes |= {"weight": (OUT, IN), "bias": (OUT,)}
    if check.norm != "none":
        shapes |= {"gamma": (OUT,), "beta": (OUT,), "mean": (OUT,)}
    drawn = {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}
    if check.norm != "none":
        drawn["var"] = torch.rand(OUT, generator=generator).add_(0.5).to(device, dtype)
    return drawn


def run_block(tensors: dict[str, Tensor], check: Check, compute: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Forward and backward of a block; `compute` takes (input, weight, bias, BatchNorm or None)."""
    names = ("input", "weight", "bias", "gamma", "beta")
    leaves = [tensors[n].clone().requires_grad_(check.backward) if n in tensors else None for n in names]
    input, weight, bias, gamma, beta = leaves
    mean, var = (tensors[n].clone() if n in tensors else None for n in ("mean", "var"))
    batch_norm = None
    if check.norm != "none":
        batch_norm = reference.BatchNorm(mean, var, gamma, beta, training=check.norm == "batch")
    out = compute(input, weight, bias, batch_norm)
    if check.backward:
        out.backward(tensors["grad"])
    found = (out, *(None if leaf is None else leaf.grad for leaf in leaves), mean, var)
    result = {name: tensor.detach() for name, tensor in zip(TENSORS, found, strict=True) if tensor is not None}
    if check.norm == "batch":
        result.pop("d bias", None)  # zero in mathematics: no relative error
    return result


def block_errors(check: Check, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, float, float]]:
    """(tensor, the kernels' relative error, eager's) against float64."""
    tensors = draw_tensors(check, dtype, device)
    key = torch.tensor(0x5EED, dtype=torch.int64)
    multiplier = reference.dropout_multiplier(key, check.rows, OUT, P).to(device)

    def eager(input: Tensor, weight: Tensor, bias: Tensor, norm: fastnn.functional.BatchNorm) -> Tensor:
        y = reference.block(input, weight, bias, norm, "relu", 0.0, 0.0, 0.0)
        return (y * multiplier).to(y.dtype)

    def fused(input: Tensor, weight: Tensor, bias: Tensor, norm: fastnn.functional.BatchNorm) -> Tensor:
        return ops.block(input, weight, bias, norm, key, "relu", 0.0, 0.0, P)

    with plans.forced_plan(check.plan):
        ours = run_block(tensors, check, fused)
    theirs = run_block(tensors, check, eager)
    exact = run_block({name: t.double() for name, t in tensors.items()}, check, eager)
    yield from compare(ours, theirs, exact)


def compare(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor]
) -> Iterator[tuple[str, float, float]]:
    for name, truth in exact.items():
        norm = truth.double().norm().item() or 1.0
        yield name, *((result[name].double() - truth).norm().item() / norm for result in (ours, theirs))


def optimizer_errors(name: str, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, float, float]]:
    """The same of parameters and state after a few steps; eager is torch.optim's for-loop."""
    eps = {} if name == "SGD" else {"eps": 1e-3 if dtype == torch.float16 else 1e-8}  # which float16 does not hold

    def train(module: Any, dtype: torch.dtype, **settings: Any) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn((STEPS + 1, ELEMENTS), generator=generator).to(device, narrow)
        param = torch.nn.Parameter(drawn[0].to(dtype, copy=True))
        optimizer = getattr(module, name)([param], lr=0.1, **settings, **OPTIMIZERS[name], **eps)
        for grad in drawn[1:]:
            param.grad = grad.to(dtype)
            optimizer.step()
        state = {key: value for key, value in optimizer.state[param].items() if value.shape == param.shape}
        return {"param": param.detach(), **state}

    narrow = dtype
    exact = train(torch.optim, torch.float64, foreach=False)
    yield from compare(train(fastnn.optim, dtype), train(torch.optim, dtype, foreach=False), exact)


def clip_errors(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, float, float]]:
    """The same of gradients and their norm."""
    grad = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    def clip(function: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        param = torch.nn.Parameter(torch.zeros(ELEMENTS, dtype=dtype, device=device))
        param.grad = grad.to(dtype, copy=True)
        return {"norm": function(param, 1.0), "grad": param.grad}

    ours, theirs = fastnn.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_norm_
    yield from compare(clip(ours, dtype), clip(theirs, dtype), clip(theirs, torch.float64))


def all_checks() -> Iterator[tuple[str, Callable[..., Iterator[tuple[str, float, float]]]]]:
    yield from ((check.kernel, functools.partial(block_errors, check)) for check in CHECKS)
    yield from ((f"{name} step", functools.partial(optimizer_errors, name)) for name in OPTIMIZERS)
    yield "clip_grad_norm_", clip_errors


def check_kernels(device: torch.device) -> bool:
    """Prints a row per kernel and dtype with its worst tensor; true if all hold."""
    print(f"{'kernel':<26}{'dtype':<10}{'worst tensor':<16}{'error':>10}{'eager':>10}")
    all_hold = True
    for kernel, errors in all_checks():
        for dtype in dispatch.KERNEL_DTYPES:
            eps = torch.finfo(dtype).eps
            # The bound on one draw: four times what eager loses, and a rounding of the result itself.
            rows = [(ours / (4 * theirs + eps), name, ours, theirs) for name, ours, theirs in errors(dtype, device)]
            worst, name, ours, theirs = max(rows)
            holds = worst <= 1 and all(row[0] == row[0] for row in rows)
            all_hold &= holds
            print(f"{kernel:<26}{str(dtype)[6:]:<10}{name:<16}{ours:>10.1e}{theirs:>10.1e}"
                  f"  {'ok' if holds else 'FAILED'}")  # fmt: skip
    return all_hold


def self_check(device: torch.device) -> int:
    """The exit status of the check in this process, which must have imported the kernels for that device."""
    if dispatch.NO_KERNELS:
        print(f"no kernel checked, every call runs torch's own ops: {dispatch.NO_KERNELS}")
        return 0 if dispatch.NO_KERNELS == dispatch.NOT_INSTALLED else 1
    return 0 if check_kernels(device) else 1


def main() -> int:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    for line in describe_environment(device):
        print(line, flush=True)
    if device.type == "cuda" or dispatch.INTERPRETED or dispatch.NO_KERNELS:
        return self_check(device)
    print("self-check in Triton's interpreter, which is chosen when the kernels are imported:", flush=True)
    code = "import sys, torch; from fastnn.__main__ import self_check; sys.exit(self_check(torch.device('cpu')))"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
