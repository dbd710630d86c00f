"""SyncBatchNorm in fused runs, on two processes, beside torch's BatchNorm1d in float64 on their batches together.

torch's own SyncBatchNorm runs on GPUs only.
"""

from collections.abc import Iterator

import pytest
import torch
from support.workers import Workers
from torch import Tensor, nn

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch.distributed with gloo is not available", allow_module_level=True)

from sync_batch_norm_worker import CASES, PROCESSES, Case, N

FORWARD = ["split_statistics_kernel", "pack_statistics_kernel", "join_statistics_kernel", "apply_kernel"]
BACKWARD = ["split_sums_kernel", "add_up_sums_kernel", "split_dz_kernel"]

pytestmark = pytest.mark.usefixtures("on_host")


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    workers = Workers(tmp_path_factory.mktemp("rendezvous"), "sync_batch_norm_worker", PROCESSES)
    yield workers
    workers.stop()


def exact_of(case: Case, outs: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same in float64 in one process: joint output and input's gradient; gradients and buffers by name.

    outs: of the processes, which say what dropout kept.
    """
    layers = nn.Sequential(*case.layers(nn.BatchNorm1d)[:-1]).to(case.dtype).double()
    x, grad = (tensor.to(case.dtype).double() for tensor in case.batch())
    x.requires_grad_()
    kept = torch.cat(outs) != 0
    out = layers(x) * (kept / (1 - case.p) if case.p else 1.0)
    out.backward(grad)
    assert x.grad is not None
    found = {"out": out.detach(), "x": x.grad} | dict(layers[int(case.linear)].named_buffers())
    if case.norm.get("track_running_stats", True):  # else each process takes its own rows', as torch's does
        found["eval"] = layers.eval()(x).detach()
    return found, {name: p.grad for name, p in layers.named_parameters() if p.grad is not None}


def assert_near(mine: Tensor, exact: Tensor, case: Case, distance: float = 0.0) -> None:
    """distance: of what is normalised from zero, whose mean is stored in fp32."""
    eps = torch.finfo(case.dtype).eps
    error, exact = (mine.double() - exact.double()).norm(), exact.double()
    assert error <= 8 * eps * exact.norm() + eps * distance * exact.numel() ** 0.5, (error, exact.norm())


@pytest.mark.parametrize("name", CASES)
def test_the_joint_batch_is_normalised(workers, name):
    case, found = CASES[name], workers("one_step", name)
    exact, _ = exact_of(case, [one["out"] for one in found])
    for key in {"out", "x", "eval"} & exact.keys():
        assert_near(torch.cat([one[key] for one in found]), exact[key], case, case.mean)
    if case.p:
        assert 0.3 < (exact["out"] == 0).double().mean() < 0.7


@pytest.mark.parametrize("name", CASES)
def test_each_process_keeps_the_joint_statistics(workers, name):
    case, found = CASES[name], workers("one_step", name)
    exact, _ = exact_of(case, [one["out"] for one in found])
    for key in {"running_mean", "running_var", "num_batches_tracked"} & exact.keys():
        assert_near(found[0][key], exact[key], case)
        assert torch.equal(found[0][key], found[1][key])  # to the bit, whatever their tiles


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_processes_add_up_to_the_joint_ones(workers, name):
    case, found = CASES[name], workers("one_step", name)
    _, exact = exact_of(case, [one["out"] for one in found])
    for key, gradient in exact.items():
        parts = [one["gradients"][key] for one in found]
        if key == "0.bias" and case.linear:
            # Zero together, by rounding, though not on a process: shifting its rows alone would change the others'.
            assert sum(parts).norm() <= 1e-5
            assert parts[1].norm() > 0.1 or not case.rows[0]
        else:
            assert_near(sum(parts), gradient, case, case.mean)


@pytest.mark.parametrize("name", CASES)
def test_one_collective_each_way_between_the_fused_kernels(workers, name):
    case, processes = CASES[name], workers("one_step", name)
    for rank, found in enumerate(processes):
        assert found["collectives"] == processes[0]["collectives"]
        assert [size for _, size in found["collectives"]] == [4 * N, 2 * N]
        ours = [kernel for kernel in found["kernels"] if kernel in {*FORWARD, *BACKWARD}]
        assert ours == ([*FORWARD, *BACKWARD] if case.rows[rank] else ["join_statistics_kernel"])


def test_three_steps_train_what_one_process_trains_on_the_joint_batch(workers):
    layers = [*Case().layers(nn.BatchNorm1d), nn.Linear(N, N), nn.BatchNorm1d(N), nn.ReLU()]
    model = nn.Sequential(*layers).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = (tensor.double() for tensor in Case().batch())
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - y).square().sum().backward()
        optimizer.step()
    for exact, *mine in zip(model.state_dict().values(), *workers("steps_together"), strict=True):
        assert torch.equal(*mine)
        torch.testing.assert_close(mine[0].double(), exact.detach().double(), rtol=1e-4, atol=1e-5)


def test_what_is_not_fused_is_torchs_and_no_process_waits(workers):
    for found in workers("raised"):
        for case in ("float64", "hook"):
            assert found[case].startswith("ValueError: SyncBatchNorm expected input tensor to be on")
        assert found["features"] == "RuntimeError: input must be (*, K) = (*, 5), got (4, 6)"
        assert found["second derivative"].startswith("RuntimeError: SyncBatchNorm has no second derivative")
        assert found["explained"] == "True split split + grouped 10"
        assert found["collectives"] == "[]"  # in eval, and in a group of one process
