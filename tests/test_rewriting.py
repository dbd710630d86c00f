"""Which runs the rewriting finds in Dynamo's graphs, in which layouts, and why not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fastnn import rewriting, tracing
from fastnn.rewriting import FIRST, LAST, ROWS

pytestmark = [
    pytest.mark.usefixtures("nothing_compiled"),
]


class Model(nn.Module):
    """What a function of (model, x) computes with these layers."""

    def __init__(self, forward):
        super().__init__()
        self.function = forward
        self.fc, self.fc2, self.bn, self.bn2 = nn.Linear(6, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.conv, self.conv2, self.bn5 = nn.Conv1d(6, 8, 1), nn.Conv1d(8, 8, 1), nn.BatchNorm1d(5)

    def forward(self, x):
        return self.function(self, x)


def rewritten(model, *inputs):
    """Candidates and graphs of the calls, and what the last one returns."""
    found, graphs = [], []

    def backend(graph, examples):
        found.extend(rewriting.rewrite(graph, alone=False))
        graphs.append(graph)
        return graph.forward

    call = tracing.compiled_call(model, backend, failed=pytest.fail)
    outs = [call(x) for x in inputs]
    return found, graphs, outs[-1]


def assert_equal_and_of_equal_strides(function, *inputs, fused=1):
    """The result, the gradients and the strides that Dynamo told the rest of the model; how many runs there are."""
    plain = Model(function)
    model = copy.deepcopy(plain)
    for x in inputs[:-1]:
        plain(x)
    found, graphs, out = rewritten(model, *inputs)
    expected = plain(inputs[-1])
    torch.testing.assert_close(out, expected)
    assert out.stride() == expected.stride()
    g = torch.randn_like(expected)
    out.backward(g), expected.backward(g)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=2e-5, msg=name)
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))
    assert sum(candidate.fused is not None for candidate in found) == fused * len(graphs)
    return [candidate.fused for candidate in found if candidate.fused is not None]


def settings_of(node):
    """Layouts in and out, and whether it copies."""
    return node.kwargs["enters"], node.kwargs["leaves"], node.kwargs.get("copies", False)


x2, x3 = torch.randn(10, 6), torch.randn(4, 5, 6)

LAYOUTS = {
    "(*, K) without BatchNorm": (lambda m, x: F.relu(m.fc(x)), x3, None),
    "flattened": (lambda m, x: F.relu(m.bn(m.fc(x).view(-1, 8))), x3, (LAST, ROWS, False)),
    "flattened and back": (lambda m, x: F.relu(m.bn(m.fc(x).flatten(0, 1)).view(4, 5, 8)), x3, (LAST, LAST, False)),
    "between transpositions": (
        lambda m, x: F.relu(m.bn(m.fc(x).transpose(1, 2)).transpose(-1, 1)) @ x.new_ones(8, 2),
        x3,
        (LAST, LAST, False),
    ),
    "between permutations": (
        lambda m, x: F.relu(m.bn(m.fc(x).permute(0, 2, 1)).permute([0, 2, 1])).sum(1),
        x3,
        (LAST, LAST, False),
    ),
    "a convolution": (lambda m, x: F.relu(m.bn(m.conv(x.mT))).amax(2), x3, (FIRST, FIRST, False)),
    "a returned convolution": (lambda m, x: F.relu(m.bn(m.conv(x.mT))), x3, (FIRST, FIRST, True)),
    "a convolution, transposed": (
        lambda m, x: F.relu(m.bn(m.conv(x.mT))).swapaxes(1, 2).sum(1),
        x3,
        (FIRST, LAST, False),
    ),
    "a viewed convolution": (lambda m, x: F.relu(m.bn(m.conv(x.mT))).view(4, -1), x3, (FIRST, FIRST, True)),
    "BatchNorm of transposed rows": (
        lambda m, x: F.relu(m.bn((m.fc(x) * 2).transpose(1, 2)).transpose(1, 2)) @ x.new_ones(8, 2),
        x3,
        (FIRST, LAST, False),
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts(case):
    """As of fixed sizes, and of symbols."""
    function, x, expected = LAYOUTS[case]
    wider = torch.cat([x, x]) if "back" not in case else x
    for node in assert_equal_and_of_equal_strides(function, x, wider):
        assert expected is None or settings_of(node) == expected


def test_chained_convolutions_copy_at_the_end_alone():
    nodes = assert_equal_and_of_equal_strides(
        lambda m, x: F.relu(m.bn2(m.conv2(F.relu(m.bn(m.conv(x.mT)))))), x3, fused=2
    )
    assert [settings_of(node)[2] for node in nodes] == [False, True]


@pytest.mark.parametrize("reentrant", [False, True])
def test_within_a_checkpoint(reentrant):
    """Buffers and counts too: torch's layers, run again for the backward, move and count them twice."""

    def function(m, x):
        x = checkpoint(lambda x: F.relu(m.bn(m.fc(x))), x, use_reentrant=reentrant)
        return F.relu(m.bn2(m.fc2(x)))

    assert_equal_and_of_equal_strides(function, x2.clone().requires_grad_(), fused=2)


def test_a_checkpoint_drops_the_same_elements_again():
    model = Model(lambda m, x: checkpoint(lambda x: F.dropout(m.fc(x), 0.5), x, use_reentrant=False))
    _, _, out = rewritten(model, x2[:1])
    out.sum().backward()
    assert torch.equal(out[0] != 0, model.fc.bias.grad != 0)


def test_a_checkpoint_keeps_the_generators_of_all_devices(monkeypatch):
    given = []
    monkeypatch.setattr(tracing, "checkpoint", lambda body, *marks, **settings: given.extend(marks))
    tracing._checkpoint(None, torch.ones(2, device="cpu"), torch.ones(2, device="meta"), 3)
    assert [mark.device.type for mark in given] == ["cpu", "meta"]


def test_a_checkpoint_that_selects_runs_as_it_is():
    def contexts():
        return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])

    def function(m, x):
        return checkpoint(lambda x: F.relu(m.bn(m.fc(x))), x, use_reentrant=False, context_fn=contexts)

    plain, failures = Model(function), []
    model = copy.deepcopy(plain)
    out = tracing.compiled_call(model, lambda graph, examples: graph.forward, failures.append)(x2)
    torch.testing.assert_close(out, plain(x2))
    assert [str(error.inner_exception) for error in failures] == ["a checkpoint that selects what to save"]


def test_the_counter_is_the_blocks():
    (candidate,), (graph,), _ = rewritten(Model(lambda m, x: F.relu(m.bn(m.fc(x)))), x2)
    assert not [node for node in graph.graph.nodes if node.target == "add_"]
    assert "num_batches_tracked" in candidate.fused.args[7].name


REFUSED = {
    "over another dimension": (lambda m, x: F.relu(m.bn5(m.fc(x))), x3, rewriting.OVER_DIMENSION_1),
    "used twice": (lambda m, x: F.relu(z := m.fc(x)) + z, x2, rewriting.SEVERAL_USES),
    "nothing beside it": (lambda m, x: m.fc(x).sin(), x2, rewriting.ALONE),
    "another activation": (lambda m, x: F.hardtanh(m.fc(x)), x2, rewriting.ALONE),
    "as the weight": (lambda m, x: F.linear(x[:8], m.fc(x)[:6].T), x2[:, :6], rewriting.ALONE),
    "grad mode": (lambda m, x: without_grad(lambda: m.fc(x), F.relu), x2, rewriting.DISTURBED),
    "overwritten through a view": (lambda m, x: overwritten(m, x), x2.clone(), rewriting.DISTURBED),
    "a statistic read through a view": (
        lambda m, x: viewed(m.bn.running_mean[:], m.bn(x @ x.new_ones(6, 8))),
        x2,
        rewriting.DISTURBED,
    ),
    "images": (lambda m, x: F.relu(F.batch_norm(x.mT[None], None, None, training=True)), x3, None),
    "a scaled elu_": (lambda m, x: F.elu_(m.fc(x), 1.5, 1.1), x2, rewriting.ALONE),
    "1-D": (lambda m, x: F.relu(m.fc(x)), x2[0], "its input is no strided tensor of two dimensions or more"),
    "a wide convolution": (lambda m, x: F.relu(F.conv1d(x, m.conv.weight.expand(8, 6, 3), padding=1)), x3.mT, None),
    "a strided convolution": (lambda m, x: F.relu(F.conv1d(x, m.conv.weight, stride=2)), x3.mT, None),
    "an unbatched convolution": (lambda m, x: F.relu(m.conv(x)), x3.mT[0], "its input is not batched"),
    "over channels": (lambda m, x: F.relu(m.bn(torch.stack([x[..., :2].sum(2)] * 8, 1))), x3, rewriting.TRANSPOSED),
}


def without_grad(first, second):
    with torch.no_grad():
        y = first()
    return second(y)


def overwritten(m, x):
    z = m.fc(x[:])
    x.add_(1)
    return F.relu(z)


def viewed(mean, y):
    total = mean.sum()
    return F.relu(y) + total


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    function, x, reason = REFUSED[case]
    found, _, _ = rewritten(Model(function), x)
    assert not [candidate for candidate in found if candidate.fused is not None]
    assert [candidate.reason for candidate in found[:1]] == ([reason] if reason else [])
