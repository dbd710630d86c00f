"""The stand-in for a CUDA graph, where it must refuse, and where a replay must show what a capture got wrong."""

from operator import methodcaller

import pytest
import torch

import fastnn

pytestmark = pytest.mark.usefixtures("recorded")


def capture(step):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


@pytest.mark.parametrize(
    "read",
    [
        bool, float, torch.nonzero, lambda x: x[x > 0], lambda x: torch.equal(x, x),
        *map(methodcaller, ("item", "cpu", "tolist", "numpy")),
    ],
)  # fmt: skip
def test_reading_on_the_host_raises(read):
    x = torch.ones(1)
    with pytest.raises(RuntimeError, match="on the host"):
        capture(lambda: read(x * 2))
    read(x)


def test_a_replay_works_on_the_memory_of_the_capture():
    x, total, positions = torch.ones(3), torch.zeros(3), torch.tensor([2, 0])
    graph, last = capture(lambda: total.add_(x)[positions] + 0)
    assert torch.equal(total, torch.zeros(3))
    assert last.isnan().all()
    x.data = torch.full((3,), 5.0)  # elsewhere
    graph.replay()
    assert torch.equal(total, torch.ones(3))
    total.copy_(torch.arange(3.0))
    graph.replay()
    assert torch.equal(last, torch.tensor([3.0, 1.0]))


def test_a_number_of_the_host_is_baked_in():
    count, found = [0], torch.zeros(())

    def step():
        count[0] += 1
        found.fill_(count[0])

    graph, _ = capture(step)
    graph.replay()
    graph.replay()
    assert (count[0], found.item()) == (1, 1)


def test_a_capture_leaves_what_kernels_write_as_it_was():
    layers = torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.ReLU()
    model, x = fastnn.nn.Sequential(*layers), torch.randn(6, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph, out = capture(lambda: model(x).detach())
    assert graph.launches == ["whole_batch_forward_kernel"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    graph.replay()
    assert model[1].num_batches_tracked == 1
    torch.testing.assert_close(out, torch.relu(torch.nn.functional.batch_norm(layers[0](x), None, None, training=True)))


def test_state_made_in_a_capture_is_made_again_by_each_replay():
    """Why a step is warmed up: an optimizer makes its state in the first."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = fastnn.optim.Adam([param], capturable=True)
    param.grad = torch.ones(3)
    graph, _ = capture(optimizer.step)
    for _ in range(3):
        graph.replay()
    assert optimizer.state[param]["step"] == 1
