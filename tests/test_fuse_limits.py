"""What a fused model does otherwise than the model it was: which calls are fused, and what becomes of copies."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.launched import kernels_launched
from torch import nn

import fastnn
from fastnn import dispatch, plans, rewriting
from fastnn.kernels import launch

pytestmark = [
    pytest.mark.usefixtures("nothing_compiled"),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.bn, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def encode(self, x):
        return F.relu(self.bn(self.fc(x)))

    def forward(self, x):
        return self.head(self.encode(x))


def blocks(call, *inputs):
    """How many fused blocks a call runs, when all is compiled."""
    call(*inputs)
    with kernels_launched() as names:
        call(*inputs)
    return names.count("whole_batch_forward_kernel")


x = torch.randn(20, 6)


def test_calls_of_the_model_alone_are_fused():
    model = fastnn.fuse(Net())
    assert [blocks(call, x) for call in (model, model.forward, model.encode)] == [1, 0, 0]
    encoder = fastnn.fuse(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()))
    assert blocks(encoder, x) == 1  # a submodule that a method calls


def test_copies_are_not_fused():
    model = fastnn.fuse(Net())
    assert blocks(model, x) == 1
    assert blocks(copy.deepcopy(model), x) == 0
    assert blocks(fastnn.fuse(copy.deepcopy(model)), x) == 1


def test_traces_and_exports_hold_torchs_layers():
    model = fastnn.fuse(Net()).eval()
    assert "fastnn" not in torch.fx.symbolic_trace(model).code
    assert "fastnn" not in torch.export.export(model, (x,)).graph_module.code
    assert "fastnn" not in str(torch.jit.trace(model, x).inlined_graph)


def test_torch_compile_compiles_the_layers():
    model = fastnn.fuse(Net())
    assert blocks(model, x) == 1
    assert blocks(torch.compile(model, backend="eager"), x) == 0
    assert blocks(model, x) == 1


def test_a_fused_model_is_not_scripted():
    plain = Net()
    torch.jit.script(plain)
    with pytest.raises(AssertionError, match="Unsupported annotation"):
        torch.jit.script(fastnn.fuse(plain))
    torch.jit.script(fastnn.unfuse(plain))


def test_replicas_would_call_the_model_they_are_of():
    """nn.DataParallel makes them on each GPU: unfuse the model before."""
    model = fastnn.fuse(Net())
    replica = model._replicate_for_data_parallel()
    assert replica._compiled_call_impl._model is model
    assert fastnn.unfuse(model)._replicate_for_data_parallel()._compiled_call_impl is None


def test_a_method_replaced_on_a_class_is_not_seen(monkeypatch):
    model, plain = fastnn.fuse(Net()), Net()
    plain.load_state_dict(model.state_dict())
    model(x), plain(x)
    monkeypatch.setattr(Net, "encode", lambda self, x: torch.zeros(len(x), 8))
    expected = plain(x)
    assert not torch.allclose(model(x), expected)
    torch.testing.assert_close(fastnn.fuse(fastnn.unfuse(model))(x), expected)


def test_the_first_call_of_each_kind_is_traced(monkeypatch):
    traced, rewrite = [], rewriting.rewrite
    monkeypatch.setattr(rewriting, "rewrite", lambda *given, **named: traced.append(1) or rewrite(*given, **named))
    model, counts = fastnn.fuse(Net()), []
    for train, rows in ((True, 20), (True, 20), (False, 20), (True, 9), (True, 7)):
        model.train(train)(x[:rows])
        counts.append(len(traced))
    assert counts == [1, 1, 2, 3, 3]  # the second batch size is a symbol, which stands for a third


class ReadsOnTheHost(Net):
    def encode(self, x):
        z = self.fc(x)
        if z.mean() > 1e6:
            z = -z
        return F.relu(self.bn(z))


class Cumulative(Net):
    def __init__(self):
        super().__init__()
        self.bn.momentum = None


@pytest.mark.parametrize(("make", "launches"), [(Net, 1), (ReadsOnTheHost, 0), (Cumulative, 0)])
def test_no_run_crosses_a_number_read_on_the_host(make, launches):
    """In fastnn.nn.Sequential a cumulative average is fused."""
    assert blocks(fastnn.fuse(make()), x) == launches
    model = make()
    assert blocks(fastnn.nn.Sequential(model.fc, model.bn, nn.ReLU()), x) == 1


def test_a_forced_eager_stance_unfuses():
    """As whatever else tells Dynamo not to trace."""
    model = fastnn.fuse(Net())
    assert blocks(model, x) == 1
    with torch.compiler.set_stance("force_eager"):
        assert blocks(model, x) == 0
    assert blocks(model, x) == 1


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_a_convolution_is_computed_by_the_precision_of_products(precision, monkeypatch):
    """torch's by that of convolutions, torch.backends.cudnn.conv."""
    taken, whole_batch = [], launch.forward_whole_batch
    monkeypatch.setattr(plans, "fp32_precision", lambda: precision)
    monkeypatch.setattr(launch, "forward_whole_batch", lambda *given: taken.append(given[-1]) or whole_batch(*given))

    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv1d(6, 8, 1), nn.BatchNorm1d(8)

        def forward(self, x):
            return F.relu(self.bn(self.conv(x.mT))).amax(2)

    fastnn.fuse(Convolution())(torch.randn(4, 5, 6))
    assert taken == [precision if dispatch.INTERPRETED or precision == "tf32" else "bf16x6"]
