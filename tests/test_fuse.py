"""fastnn.fuse on what models do beside calling their layers: the result is the unfused model's, and runs are fused."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from support.launched import kernels_launched
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import fastnn
from fastnn import tracing

pytestmark = [
    pytest.mark.usefixtures("nothing_compiled"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo's
]


class Net(nn.Module):
    """The network of the course, without dropout: masks differ from torch's."""

    def __init__(self, K=6, N=8):
        super().__init__()
        self.fc1, self.bn1 = nn.Linear(K, N), nn.BatchNorm1d(N)
        self.fc2, self.bn2 = nn.Linear(N, N), nn.BatchNorm1d(N)
        self.act, self.head = nn.ReLU(), nn.Linear(N, 3)

    def forward(self, x):
        x = F.relu(self.bn1(self.fc1(x)))
        return self.head(self.act(self.bn2(self.fc2(x))))


def pair(make=Net, *given):
    """A model and its fused copy."""
    plain = make(*given)
    return plain, fastnn.fuse(copy.deepcopy(plain))


def assert_same_steps(plain, fused, *batches, **tolerance):
    """Outputs, gradients and buffers of a step on each batch, of 20 rows by default."""
    for x in batches or (torch.randn(20, 6),):
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outs = [model(x) for model, x in zip((plain, fused), inputs, strict=True)]
        torch.testing.assert_close(outs[1], outs[0], **tolerance)
        g = torch.randn_like(outs[0])
        for model, out in zip((plain, fused), outs, strict=True):
            model.zero_grad()
            out.backward(g)
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)
        for (name, mine), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=2e-5, msg=name)
        for (name, mine), theirs in zip(fused.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)


def blocks(model, *inputs):
    """How many fused blocks a forward runs: a small batch's is one launch each."""
    model(*inputs)  # which compiles
    with kernels_launched() as names:
        model(*inputs)
    return len(names)


def with_hook(net, register="register_forward_hook", on="bn1", change=lambda *given: given[-1] * 2):
    getattr(getattr(net, on), register)(change)
    return net


def doubled_input(module, inputs):
    return (inputs[0] * 2,)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.5


class SharedNorm(Net):
    def forward(self, x):
        x = F.relu(self.bn1(self.fc1(x)))
        return self.head(F.relu(self.bn1(self.fc2(x))))


class TwoBranches(Net):
    """The second branch's Linear before the first one's BatchNorm, which is its own too."""

    def forward(self, x):
        a, b = self.fc1(x), self.fc1(x + 1)
        return self.head(F.relu(self.bn1(a)) - F.relu(self.bn1(b)))


class UsedTwice(Net):
    def forward(self, x):
        z = self.fc1(x)
        return self.head(F.relu(self.bn1(z)) + z)


class OverwritesInput(Net):
    """x is overwritten between a Linear and what follows it."""

    def forward(self, x):
        x = x + 0
        z = self.fc1(x)
        x.mul_(2)
        return self.head(F.relu(z)) + x.sum(1, keepdim=True)


class ReadsStatistics(Net):
    """Between BatchNorm and the activation someone reads what BatchNorm writes."""

    def forward(self, x):
        y = self.bn1(self.fc1(x))
        return self.head(F.relu(y)) + self.bn1.running_mean.sum() + self.bn1.num_batches_tracked


class Branches(Net):
    def forward(self, x):
        x = F.relu(self.bn1(self.fc1(x)))
        if x.sum() > 1e3:
            return self.head(x)
        return self.head(F.relu(self.bn2(self.fc2(x))))


class OtherModes(Net):
    """Grad mode and autocast change between a Linear and what follows it."""

    def forward(self, x):
        with torch.no_grad():
            x = self.fc1(x)
        x = F.relu(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            x = self.fc2(x)
        return self.head(F.relu(x.float()))


class Normalises(nn.Module):
    """BatchNorm1d over dimension 1 of what a Linear gives along dimension 2."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(6, 8), nn.BatchNorm1d(5)

    def forward(self, x):
        return F.relu(self.bn(self.fc(x.unsqueeze(1).expand(-1, 5, -1)))).flatten(1)


def eval_inside_train(net):
    net.bn2.eval()
    return net


def frozen(net):
    net.fc2.requires_grad_(False)
    return net


def half_frozen(net):
    for module in (net.fc1, net.bn1):
        module.requires_grad_(False)
    return net


def cumulative(net):
    net.bn1.momentum = None
    return net


def replaced(net, name, module):
    setattr(net, name, module)
    return net


def patched(net):
    forward = net.bn1.forward
    net.bn1.forward = lambda x: forward(x) + 1
    return net


MODELS = {  # and how many blocks they run
    "as it is": (Net, 2),
    "a child's hook": (lambda: with_hook(Net()), 2),
    "a child's pre-hook": (lambda: with_hook(Net(), "register_forward_pre_hook", "bn1", doubled_input), 2),
    "the root's hook": (lambda: with_hook(nn.Sequential(Net()), on="0"), 2),
    "weight_norm": (lambda: replaced(Net(), "fc1", parametrizations.weight_norm(nn.Linear(6, 8))), 2),
    "spectral_norm": (lambda: replaced(Net(), "fc1", parametrizations.spectral_norm(nn.Linear(6, 8))), 2),
    "a shared BatchNorm": (SharedNorm, 2),
    "a shared BatchNorm of two branches": (TwoBranches, 2),
    "an intermediate used twice": (UsedTwice, 1),
    "an overwritten input": (lambda: half_frozen(OverwritesInput()), 0),
    "statistics read": (ReadsStatistics, 1),
    "control flow by data": (Branches, 2),
    "other modes": (lambda: frozen(OtherModes()), 1),  # fc2 alone, which needs no casts
    "another dimension": (Normalises, 0),
    "eval inside train": (lambda: eval_inside_train(Net()), 2),
    "half frozen": (lambda: half_frozen(Net()), 2),
    "a subclass of Linear": (lambda: replaced(Net(), "fc1", Scaled(6, 8)), 2),
    "a cumulative average": (lambda: cumulative(Net()), 1),
    "nn.Sequential": (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), 1),
    "fastnn.nn.Sequential inside": (lambda: nn.Sequential(fastnn.nn.Sequential(nn.Linear(6, 8), nn.Tanh()), Net(8)), 3),
}


@pytest.mark.parametrize("case", MODELS)
def test_results_and_blocks(case):
    make, count = MODELS[case]
    plain, fused = pair(make)
    assert_same_steps(plain, fused, torch.randn(20, 6), torch.randn(13, 6), torch.randn(20, 6))
    plain.eval(), fused.eval()
    assert_same_steps(plain, fused)
    assert blocks(fused.train(), torch.randn(20, 6)) == count


class Block(nn.Module):
    def __init__(self, width, breaks):
        super().__init__()
        self.fc, self.bn, self.back, self.breaks = (
            nn.Linear(6, width),
            nn.BatchNorm1d(width),
            nn.Linear(width, 6),
            breaks,
        )

    def forward(self, x):
        x = x + 0.1 * self.back(F.relu(self.bn(self.fc(x))))
        if self.breaks and x.sum() > 1e6:
            return -x
        return x


@pytest.mark.parametrize("breaks", [False, True])
def test_24_blocks_of_one_class_are_all_fused(breaks):
    plain, fused = pair(lambda: nn.Sequential(*(Block(width, breaks) for width in range(2, 26))))
    x = torch.randn(20, 6)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    assert blocks(fused, x) == 24


def test_24_fused_models_of_one_class_are_all_fused():
    models = [fastnn.fuse(Block(width, False)) for width in range(2, 26)]
    assert [blocks(model, torch.randn(20, 6)) for model in models] == [1] * 24


CHANGES = {
    "a hook": with_hook,
    "a pre-hook": lambda net: with_hook(net, "register_forward_pre_hook", "fc2", doubled_input),
    "the root's hook": lambda net: net.register_forward_hook(lambda *given: given[-1] + 1) and net,
    "a replaced BatchNorm": lambda net: replaced(net, "bn1", nn.Identity()),
    "another width": lambda net: replaced(replaced(net, "fc2", nn.Linear(8, 8, bias=False)), "bn1", nn.BatchNorm1d(8)),
    "a subclass": lambda net: replaced(net, "fc2", Scaled(8, 8)),
    "a patched forward": patched,
    "eps": lambda net: setattr(net.bn1, "eps", 0.1) or net,
    "momentum": lambda net: setattr(net.bn2, "momentum", 0.3) or net,
    "no statistics": lambda net: replaced(net, "bn2", nn.BatchNorm1d(8, track_running_stats=False)),
    "eval of one": eval_inside_train,
    "frozen": half_frozen,
    "double": lambda net: net.to(torch.float64),
    "weight_norm": lambda net: parametrizations.weight_norm(net.fc2) and net,
    "another activation": lambda net: replaced(net, "act", nn.Tanh()),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changes_after_fusing_are_seen(case):
    plain, fused = pair()
    assert_same_steps(plain, fused)
    for model in (plain, fused):
        torch.manual_seed(1)
        CHANGES[case](model)
    dtype = plain.head.weight.dtype
    assert_same_steps(plain, fused, torch.randn(20, 6, dtype=dtype), torch.randn(9, 6, dtype=dtype))


def test_a_forward_patched_before():
    plain, fused = Net(), Net()
    fused.load_state_dict(plain.state_dict())
    assert_same_steps(patched(plain), fastnn.fuse(patched(fused)))
    assert blocks(fused, torch.randn(20, 6)) == 2


def test_a_hook_that_is_removed_again():
    plain, fused = pair()
    handle = fused.bn1.register_forward_hook(lambda *given: given[-1] * 2)
    fused(torch.randn(20, 6))
    handle.remove()
    plain.load_state_dict(fused.state_dict())
    assert_same_steps(plain, fused)


def test_a_global_hook_and_a_patched_class_after_fusing(monkeypatch):
    plain, fused = pair()
    x = torch.randn(20, 6)
    fused(x), plain(x)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, out: out * 2 if isinstance(module, nn.BatchNorm1d) else None
    )
    try:
        torch.testing.assert_close(fused(x), plain(x))
    finally:
        handle.remove()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight))
    torch.testing.assert_close(fused(x), plain(x))


def saved_and_loaded(model, path):
    torch.save(model, path / "model.pt")
    return torch.load(path / "model.pt", weights_only=False)


class CopiesItself(Net):
    def __deepcopy__(self, memo):
        found = self.__class__.__new__(self.__class__)
        memo[id(self)] = found
        found.__dict__ = copy.deepcopy(self.__dict__, memo)
        return found


@pytest.mark.parametrize("make", [Net, CopiesItself])
@pytest.mark.parametrize(
    "copied",
    [
        lambda model, path: copy.deepcopy(model),
        lambda model, path: copy.copy(model),
        lambda model, path: pickle.loads(pickle.dumps(model)),
        saved_and_loaded,
    ],
    ids=["deepcopy", "copy", "pickle", "save"],
)
def test_a_copy_works_and_can_be_fused_again(make, copied, tmp_path):
    plain, fused = pair(make)
    x = torch.randn(20, 6)
    fused(x), plain(x)
    again = copied(fused, tmp_path)
    assert blocks(again.eval(), x) == 0
    assert type(again) is make
    again.train()
    assert_same_steps(plain, again)
    assert blocks(fastnn.fuse(again), x) == 2


def test_the_model_stays_what_it_was():
    plain, fused = pair()
    objects = {name: id(module) for name, module in fused.named_modules()}
    x = torch.randn(20, 6)
    fused(x), plain(x)
    assert {name: id(module) for name, module in fused.named_modules()} == objects
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert type(fused) is Net
    assert str(fused) == str(plain)
    assert fastnn.fuse(fused) is fused
    assert blocks(fastnn.unfuse(fused), x) == 0
    assert fastnn.unfuse(fused).__dict__.keys() == plain.__dict__.keys()


def test_a_fused_child_and_a_fused_parent():
    plain, fused = pair(lambda: nn.Sequential(Net(), nn.Linear(3, 6), Net()))
    fastnn.fuse(fused[0])
    assert_same_steps(plain, fused)
    assert_same_steps(plain[0], fused[0])
    assert blocks(fused, torch.randn(20, 6)) == 4
    assert blocks(fastnn.unfuse(fused), torch.randn(20, 6)) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    plain, fused = pair()
    x = torch.randn(20, 6)
    for _ in range(2):
        with mode():
            torch.testing.assert_close(fused(x), plain(x))
        assert_same_steps(plain, fused)


def test_tracers_see_the_layers():
    plain, fused = pair()
    plain.eval(), fused.eval()
    x = torch.randn(20, 6)
    expected = plain(x)
    for traced in (
        torch.jit.trace(fused, x),
        torch.fx.symbolic_trace(fused),
        torch.export.export(fused, (x,)).module(),
        torch.compile(fused, backend="eager", fullgraph=True),
    ):
        torch.testing.assert_close(traced(x), expected)
        torch.testing.assert_close(fused(x), expected)


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_call_within_a_dispatch_mode_unfuses_no_other(compiled):
    plain, fused = pair()
    x = torch.randn(20, 6)
    if compiled:
        fused(x), plain(x)
    with Mode():
        assert blocks(fused, x) == 0
    plain.load_state_dict(fused.state_dict())
    assert_same_steps(plain, fused)
    assert blocks(fused, x) == 2


def error_of(model, x):
    try:
        model(x)
    except Exception as error:
        return error
    raise AssertionError("it raised nothing")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [torch.randn(4, 5), torch.randn(1, 6), torch.randn(4, 6).double(), torch.ones(4, 6, dtype=torch.int64), "words"],
    ids=["width", "one row", "double", "integers", "no tensor"],
)
def test_wrong_input_raises_what_the_plain_model_raises(compiled, wrong, caplog):
    plain, fused = pair()
    x = torch.randn(20, 6)
    if compiled:
        fused(x), plain(x)
    for _ in range(tracing.RETRIES + 2):
        assert type(error_of(fused, wrong)) is type(error_of(plain, wrong))
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    if compiled:
        assert blocks(fused, x) == 2


def test_bad_models():
    with pytest.raises(TypeError, match=re.escape("model must be a torch.nn.Module, got function")):
        fastnn.fuse(pair)
    with pytest.raises(
        TypeError, match=re.escape("model must be as it was before torch.jit or torch.compile, got Opt")
    ):
        fastnn.fuse(torch.compile(Net()))
    compiled = Net()
    compiled.compile(backend="eager")
    for function in (fastnn.fuse, fastnn.unfuse):
        with pytest.raises(RuntimeError, match=re.escape("model must not be compiled, got one after model.compile()")):
            function(compiled)
    assert fastnn.unfuse(Net()).__dict__.keys() == Net().__dict__.keys()
