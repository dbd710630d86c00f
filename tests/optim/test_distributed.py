"""On two processes, each holding a part: DTensors and FSDP2, ZeroRedundancyOptimizer, DDP. What they train is torch's.

The processes run distributed_worker.py on the CPU, with the kernels in Triton's interpreter.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch.distributed with gloo is not available", allow_module_level=True)

from distributed_worker import PROCESSES, batch, groups, mlp, parameters
from support.workers import Workers

COUNTS = (".step", ".mu_product")  # plain tensors in torch, too
pytestmark = pytest.mark.usefixtures("on_host")


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    workers = Workers(tmp_path_factory.mktemp("rendezvous"), "distributed_worker", PROCESSES)
    yield workers
    workers.stop()


def both_libraries(workers: Workers, function: str, *args: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(with fastnn.optim, with torch.optim) for each process."""
    return list(zip(workers(function, "fastnn", *args), workers(function, "torch", *args), strict=True))


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in the Frobenius norm."""
    a, b = a.double(), b.double()
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp(min=1e-30))


def assert_near(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert mine.keys() == theirs.keys()
    far = {name: d for name in mine if not (d := distance(mine[name], theirs[name])) <= tolerance}
    assert not far


def assert_all_moved(result: dict[str, Any]) -> None:
    """Each parameter has come far enough that equality of two trainings says something."""
    still = {name for name, p in result["parameters"].items() if distance(p, result["initial"][name]) < 1e-3}
    assert not still


def assert_same_training(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Parameters, every entry of the state, and where its parts are.

    Means of gradients whose signs differ are small against the gradients, and their errors are not: 9e-6 of it has
    been seen, of an entry of one element.
    """
    assert_near(mine["parameters"], theirs["parameters"], 1e-6)
    assert_near(mine["state"], theirs["state"], 1e-4)
    assert mine["placements"] == theirs["placements"]


OPTIMIZERS = [
    pytest.param("Adam", {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}, id="Adam"),
    pytest.param("SGD", {"lr": 5e-2, "weight_decay": 0.1, "momentum": 0.9, "nesterov": True}, id="SGD"),
    pytest.param("NAdam", {"lr": 1e-2, "weight_decay": 0.1, "momentum_decay": 0.04}, id="NAdam"),
]
# Dampening is left out of the first step, so that one who takes over must know of the steps before.
DAMPENED = pytest.param("SGD", {"lr": 5e-2, "weight_decay": 0.1, "momentum": 0.9, "dampening": 0.5}, id="dampened SGD")


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_fsdp2_shards_train_as_with_torch(workers, name, options):
    """Uneven shards and empty ones among them; the state is distributed as the parameters are."""
    for mine, theirs in both_libraries(workers, "fsdp", name, options):
        assert_same_training(mine, theirs)
        assert_all_moved(mine)
        assert {place[0] for key, place in mine["placements"].items() if not key.endswith(COUNTS)} == {"DTensor"}


def test_fsdp2_shards_are_served_by_the_kernels_but_for_empty_ones(workers):
    empty = []
    for mine in workers("fsdp", "fastnn", "AdamW", {"lr": 1e-2}):
        assert mine["by torch"] == mine["empty"]
        assert sorted(mine["served"]) == sorted(mine["parameters"].keys() - mine["empty"])
        empty.append(mine["empty"])
    assert empty == [set(), {"6.weight", "6.bias"}]


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS[:2])
def test_fsdp2_clips_to_the_norm_over_all_processes(workers, name, options):
    """As torch.nn.utils.clip_grad_norm_ before torch's step; of the five norms some are above the limit."""
    limit = 1.2
    for mine, theirs in both_libraries(workers, "fsdp", name, {**options, "max_grad_norm": limit}):
        assert mine["norms"] == pytest.approx(theirs["norms"], rel=1e-6)
        assert min(mine["norms"]) < limit < max(mine["norms"])
        assert_same_training(mine, theirs)
        assert mine["by torch"] == mine["empty"]


@pytest.mark.parametrize("libraries", [["fastnn", "torch", "fastnn"], ["torch", "fastnn", "torch"]], ids="-".join)
@pytest.mark.parametrize(("name", "options"), [OPTIMIZERS[0], DAMPENED, OPTIMIZERS[2]])
def test_fsdp2_checkpoints_pass_between_libraries_in_mid_training(workers, name, options, libraries, tmp_path):
    """By torch.distributed.checkpoint: to disk, then by full state dicts. The same as torch's training in one go."""
    legs = [(library, 2) for library in libraries]
    handed_over = workers("fsdp_checkpoints", legs, name, options, str(tmp_path))
    in_one_go = workers("fsdp_checkpoints", [("torch", 6)], name, options, str(tmp_path))
    for mine, theirs in zip(handed_over, in_one_go, strict=True):
        assert_same_training(mine, theirs)
        if libraries[-1] == "fastnn":
            assert mine["by torch"] == mine["empty"]


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_dtensor_parameters_without_fsdp_train_as_with_torch(workers, name, options):
    """Rows, columns or copies on each process."""
    for mine, theirs in both_libraries(workers, "dtensors", name, options, False):
        assert_same_training(mine, theirs)
        assert not mine["by torch"]


def test_a_gradient_placed_otherwise_than_its_parameter_is_left_to_torch(workers):
    """A sum over processes that is still to be made; the kernels would take one summand for it."""
    for mine, theirs in both_libraries(workers, "dtensors", "Adam", {"lr": 1e-2}, True):
        assert_near(mine["parameters"], theirs["parameters"], 1e-6)
        assert mine["by torch"] == {"copies"}
        assert sorted(mine["served"]) == ["columns", "rows", "vector"]


def on_one_process(options: dict[str, Any], steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """torch.optim.AdamW on the batches of all processes together, by a schedule for the first six steps."""
    model = mlp()
    optimizer = torch.optim.AdamW(groups(model, options), **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        if step < 6:
            schedule.step()
    return model, optimizer


@pytest.mark.parametrize("bucket_view", [False, True])
def test_zero_redundancy_optimizer_trains_as_one_process_on_the_joined_batch(workers, bucket_view, tmp_path):
    """With DDP and a schedule of the learning rate; and its gathered state is that of the one process."""
    options = {"lr": 1e-2, "weight_decay": 0.1}
    results = workers("zero", "fastnn", options, bucket_view, str(tmp_path))
    model, optimizer = on_one_process(options, 6)
    later, _ = on_one_process(options, 8)
    for mine in results:
        assert_near(mine["parameters"], parameters(model), 1e-5)
        assert_near(mine["trained on"], parameters(later), 1e-5)
        assert mine["served"] > 0
        assert not mine["by torch"]
    assert sum(mine["served"] for mine in results) == len(parameters(model))

    gathered, expected = torch.load(tmp_path / "zero.pt"), optimizer.state_dict()
    for mine, theirs in zip(gathered["param_groups"], expected["param_groups"], strict=True):
        assert (mine["lr"], mine["params"]) == (pytest.approx(theirs["lr"]), theirs["params"])
    assert gathered["state"].keys() == expected["state"].keys()
    for index, entry in expected["state"].items():
        assert_near(gathered["state"][index], entry, 1e-4)


@pytest.mark.parametrize("library", ["fastnn", "torch"])
def test_zero_redundancy_optimizer_takes_up_a_checkpoint_in_mid_training(workers, library, tmp_path):
    """ZeRO puts what it loads into the local optimizer's state by itself, past its load_state_dict."""
    for mine in workers("zero", library, {"lr": 1e-2, "weight_decay": 0.1}, False, str(tmp_path)):
        assert_near(mine["from the checkpoint"], mine["trained on"], 1e-6)


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_ddp_gradients_that_are_views_of_buckets_train_as_with_torch(workers, name, options):
    """Some are not aligned to 16 bytes; those of a branch that no process uses are missing in some steps."""
    for mine, theirs in both_libraries(workers, "ddp", name, options):
        assert_same_training(mine, theirs)
        assert_all_moved(mine)
        assert not mine["by torch"]
        assert mine["shared"] > 0
        assert mine["unaligned"] > 0


def test_ddp_gradients_that_are_views_of_buckets_are_clipped_as_by_torch(workers):
    for mine, theirs in both_libraries(workers, "ddp", "AdamW", {"lr": 1e-2, "max_grad_norm": 0.7}):
        assert mine["norms"] == pytest.approx(theirs["norms"], rel=1e-6)
        assert max(mine["norms"]) > 0.7
        assert_same_training(mine, theirs)
        assert mine["unaligned"] > 0
