"""Bytes that a stack of layers keeps for its backward, ours and eager PyTorch's, on meta tensors."""

import torch
from torch import Tensor, nn

import fastnn
from bench.workloads import WORKLOADS, Workload
from support.figures import Row, counted
from support.ops_log import ops_of_a_gpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def saved_bytes(model: nn.Module, batch: int, features: int, dtype: torch.dtype) -> int:
    """Of the distinct storages that a training forward saves, its input among them; not of parameters and buffers."""
    model.to("meta", dtype)
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with ops_of_a_gpu(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(torch.empty((batch, features), dtype=dtype, device="meta"))
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in own)


def of_both(workload: Workload, batch: int, dtype: torch.dtype) -> tuple[int, int]:
    """(ours, eager's); parameters and BatchNorm are of the same dtype as the input."""
    kinds = (fastnn.nn.Sequential, nn.Sequential)
    ours, theirs = (saved_bytes(kind(*workload.layers()), batch, workload.widths[0], dtype) for kind in kinds)
    return ours, theirs


def rows() -> list[Row]:
    found = []
    for workload in WORKLOADS.values():
        for batch in workload.batches:
            for name, dtype in DTYPES.items():
                ours, theirs = of_both(workload, batch, dtype)
                figure = "bytes saved for the backward"
                found += counted(figure, f"{workload.name}, {batch}, {name}", "bytes", ours, theirs)
    return found
