"""One Linear + BatchNorm1d + ReLU + Dropout training step, forward and backward: eager torch.nn beside fastnn.nn.

    pytest bench

Needs a CUDA GPU. Each row first checks that the two agree with dropout off, then is timed to the end of the device's
work. extra_info: GPU, versions, dtype, and the fewest bytes the block's plan moves of its [M, N] activation.
"""

import copy

import pytest
import torch
import triton
from torch import nn

import fastnn

# (M rows, K in, N out, p) of published blocks.
SHAPES = {
    "course notes": (64, 784, 100, 0.5),
    "recommender": (10_000, 500, 500, 0.2),
    "tabular, odd widths": (1024, 343, 501, 0.5),
    "graph head": (1024, 1024, 1024, 0.5),
    "tall": (380_000, 768, 512, 0.5),
}
COLUMNS_ACCESSES = 8

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="timing needs a CUDA GPU")


def layers(K: int, N: int, p: float) -> list[nn.Module]:
    return [nn.Linear(K, N, bias=False), nn.BatchNorm1d(N), nn.ReLU(), nn.Dropout(p)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", ["eager", "fastnn"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_training_step(benchmark, shape, implementation, dtype):
    M, K, N, p = SHAPES[shape]
    eager = nn.Sequential(*layers(K, N, p)).to("cuda", dtype)
    model = eager if implementation == "eager" else fastnn.nn.Sequential(*eager)
    x = torch.randn(M, K, device="cuda", dtype=dtype, requires_grad=True)
    g = torch.randn(M, N, device="cuda", dtype=dtype)
    check_agreement(copy.deepcopy(eager), copy.deepcopy(model), x)

    def step():
        model(x).backward(g)
        torch.cuda.synchronize()

    benchmark.extra_info |= {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": str(dtype),
        "bytes of [M, N], columns plan": COLUMNS_ACCESSES * M * N * g.element_size(),
    }
    benchmark(step)


def check_agreement(eager: nn.Module, model: nn.Module, x: torch.Tensor) -> None:
    tolerance = 4 * torch.finfo(x.dtype).eps ** 0.5 if x.dtype == torch.float32 else 0.1
    for layer in (eager[3], model[3]):
        layer.p = 0.0
    torch.testing.assert_close(model(x), eager(x), rtol=tolerance, atol=tolerance)
