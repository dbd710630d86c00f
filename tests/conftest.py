"""The kernels run in Triton's interpreter, or on a GPU (FASTNN_TEST_DEVICE=cuda), on NaN-filled memory."""

import os
from collections.abc import Iterator

DEVICE = os.environ.get("FASTNN_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest  # noqa: E402
import torch  # noqa: E402

from fastnn import memory, plans  # noqa: E402

if DEVICE == "cpu":
    from support.interpreter import without_waste

    without_waste()
else:
    from support.gpu import take_by_default

    take_by_default(DEVICE)
torch.set_num_threads(1)  # tests run in as many processes as there are cores


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture
def on_host() -> Iterator[None]:
    """Tensors lie on the CPU, as those of the processes of support.workers do."""
    with torch.device("cpu"):
        yield


@pytest.fixture
def interpreted() -> None:
    """Of what CPU tensors and kernels in Triton's interpreter alone can show."""
    if DEVICE != "cpu":
        pytest.skip("is seen in Triton's interpreter only")


@pytest.fixture
def recorded(interpreted: None) -> Iterator[None]:
    """torch.cuda's graphs are recordings, of CPU tensors and kernels in Triton's interpreter."""
    from support.recorded_graph import recorded_graphs  # and with it fastnn, which not every test needs

    with recorded_graphs():
        yield


@pytest.fixture(params=["recorded", "cuda"])
def graphs(request: pytest.FixtureRequest) -> None:
    """torch.cuda's graphs as they are, and as recordings."""
    if request.param == "recorded":
        request.getfixturevalue("recorded")
    elif DEVICE == "cpu":
        pytest.skip("real CUDA graphs need a GPU and FASTNN_TEST_DEVICE=cuda")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """torch.empty and its kin give NaN (integers: -1), so that reading what nobody wrote shows."""
    if "real_empty" in request.keywords:
        return

    def poison(function):
        def poisoned(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if tensor.numel() and tensor.device.type != "meta" and not torch.compiler.is_compiling():
                tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
            return tensor

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    allocator = memory.allocator
    monkeypatch.setattr(memory, "allocator", lambda device: poison(allocator(device)))


@pytest.fixture(autouse=True)
def nothing_settled() -> None:
    """Calls are settled anew in each test, as it may have put another rule or function in the place of ours."""
    plans.generation += 1


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """What other tests have let Dynamo compile, and how often, counts for nothing here, nor this in theirs."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
