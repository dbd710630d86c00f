"""Sequential is torch.nn.Sequential to everyone: values, keys, copies, hooks, tracers, slices."""

import copy
import io
import pickle

import pytest
import torch
from support.launched import kernels_launched
from support.numerics import judge
from torch import nn

import fastnn

RUN = ("whole_batch_forward_kernel",)


def layers(p=0.0, **settings):
    return [nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, **settings), nn.ReLU(), nn.Dropout(p), nn.Linear(8, 3)]


def pair(p=0.0, **settings):
    """The same layers, with the same weights, in fastnn's Sequential and in torch's."""
    ours = fastnn.nn.Sequential(*layers(p, **settings))
    return ours, nn.Sequential(*copy.deepcopy(list(ours)))


def launched(model, x):
    """Names of the kernels one forward launches."""
    with kernels_launched() as names:
        model(x)
    return tuple(names)


def assert_same_step(ours, theirs, x, dtype_tolerance=2e-5):
    """Output, gradients and buffers of one step with a random cotangent."""
    results = []
    g = None
    for model in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        g = torch.randn_like(out) if g is None else g
        out.backward(g)
        results.append((out, leaf.grad))
    torch.testing.assert_close(*results, rtol=dtype_tolerance, atol=dtype_tolerance)
    for (name, mine), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if mine.grad is None or their.grad is None:
            assert mine.grad is their.grad, name
        else:
            torch.testing.assert_close(mine.grad, their.grad, rtol=dtype_tolerance, atol=dtype_tolerance, msg=name)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


VARIANTS = {
    "default": {},
    "momentum None": {"momentum": None},
    "no running statistics": {"track_running_stats": False},
    "no affine": {"affine": False},
    "large eps": {"eps": 1e-1, "momentum": 0.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_then_eval_equals_torch(variant):
    ours, theirs = pair(**VARIANTS[variant])
    assert launched(ours, torch.randn(12, 6))[-1:] == RUN
    theirs.load_state_dict(ours.state_dict())
    for _ in range(3):
        assert_same_step(ours, theirs, torch.randn(20, 6))
    ours.eval(), theirs.eval()
    assert_same_step(ours, theirs, torch.randn(20, 6))
    with torch.no_grad():
        x = torch.randn(20, 6)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_mixed_modes_of_children():
    """A frozen BatchNorm in a training model, and dropout that drops in an eval one."""
    ours, theirs = pair()
    ours[1].eval(), theirs[1].eval()
    assert_same_step(ours, theirs, torch.randn(20, 6))
    only_dropout = fastnn.nn.Sequential(nn.ReLU(), nn.Dropout(0.5)).eval()
    only_dropout[1].train()
    assert (only_dropout(torch.ones(32, 32)) == 0).any()


AXES = {
    "x": "MK", "0.weight": "NK", "0.bias": "N", "1.weight": "N", "1.bias": "N", "4.weight": "ON", "4.bias": "O",
    "1.running_mean": "N", "1.running_var": "N",
}  # fmt: skip
MODULE_AXES = {"d" + name: letters for name, letters in AXES.items() if "running" not in name and name != "0.bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh])
def test_module_is_as_accurate_as_torchs(activation, dtype):
    """By the rule of support.numerics, on stored weights; smooth, as one flipped gate outweighs the rest."""

    def step(sequential):
        def run(inputs):
            kind = inputs["x"].dtype
            modules = [nn.Linear(6, 8), nn.BatchNorm1d(8), activation(), nn.Dropout(0.0), nn.Linear(8, 3)]
            model = sequential(*modules).to(kind)
            model.load_state_dict({name: inputs[name] for name in AXES if name != "x"}, strict=False)
            leaf = inputs["x"].requires_grad_()
            out = model(leaf)
            out.backward(inputs["g"])
            gradients = {f"d{name}": parameter.grad for name, parameter in model.named_parameters() if name != "0.bias"}
            buffers = {name: buffer for name, buffer in model.named_buffers() if "running" in name}
            return {"out": out.detach(), "dx": leaf.grad, **gradients, **buffers}

        return run

    def draw(generator):
        def normal(*shape):
            return torch.randn(shape, generator=generator)

        drawn = {"x": normal(40, 6), "g": normal(40, 3), "0.weight": normal(8, 6) / 2.5, "0.bias": normal(8)}
        drawn |= {
            "1.weight": 1 + normal(8) / 4,
            "1.bias": normal(8) / 2,
            "4.weight": normal(3, 8) / 3,
            "4.bias": normal(3),
        }
        drawn |= {"1.running_mean": normal(8), "1.running_var": normal(8).exp()}
        return {name: tensor.to(dtype) for name, tensor in drawn.items()}

    judge(step(fastnn.nn.Sequential), step(nn.Sequential), draw, AXES | MODULE_AXES | {"g": "MO", "out": "MO"})


def test_one_row_in_eval_and_the_error_in_training():
    ours, theirs = pair()
    before = copy.deepcopy(ours.state_dict())
    for model in (ours, theirs):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(torch.randn(1, 6))
    torch.testing.assert_close(dict(ours.state_dict()), dict(before))
    assert ours.eval()(torch.randn(1, 6)).shape == (1, 3)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything(p):
    ours, theirs = pair(p)
    assert_same_step(ours, theirs, torch.randn(20, 6))


def test_state_dict_keys_and_loading_both_ways():
    ours, theirs = pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for source, target in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            source[0].weight.normal_()
            source[1].running_mean.normal_()
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(dict(target.state_dict()), dict(source.state_dict()))


def through_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), through_file])
def test_copies_are_fused_and_equal(copied):
    ours, theirs = pair()
    other = copied(ours)
    assert type(other) is fastnn.nn.Sequential
    assert launched(copy.deepcopy(other), torch.randn(12, 6))[-1:] == RUN
    assert_same_step(other, theirs, torch.randn(20, 6))


def test_apply_init_to_and_freezing():
    ours, theirs = pair()

    def init(module):
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=torch.Generator().manual_seed(3))

    for model in (ours, theirs):
        model.apply(init)
        model[0].weight.requires_grad_(False)
        model[1].bias.requires_grad_(False)
    assert_same_step(ours, theirs, torch.randn(20, 6))
    for dtype, tolerance in ((torch.bfloat16, 6e-2), (torch.float16, 1e-2), (torch.float64, 1e-7)):
        mine, their = copy.deepcopy(ours).to(dtype), copy.deepcopy(theirs).to(dtype)
        x = torch.randn(20, 6, dtype=dtype)
        torch.testing.assert_close(mine(x), their(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("child", range(5))
def test_hook_on_a_child_fires_and_the_rest_stays_fused(child):
    ours, theirs = pair()
    fired = []
    for model in (ours, theirs):
        model[child].register_forward_hook(lambda module, inputs, out: fired.append(module))
    assert_same_step(ours, theirs, torch.randn(20, 6))
    assert fired == [ours[child], theirs[child]]


def test_hook_that_replaces_an_output_is_obeyed():
    ours, theirs = pair()
    for model in (ours, theirs):
        model[2].register_forward_hook(lambda module, inputs, out: out * 2)
    assert_same_step(ours, theirs, torch.randn(20, 6))


def test_global_hook_sees_every_child():
    ours, _ = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *rest: seen.append(module))
    try:
        ours(torch.randn(20, 6))
    finally:
        handle.remove()
    assert seen == [*ours, ours]


def test_a_patched_forward_is_called():
    """As Accelerate does it: on the instance, leaving class and hooks alone."""
    ours, _ = pair()
    called = []
    original = ours[1].forward
    ours[1].forward = lambda x: called.append(x.shape) or original(x)
    ours(torch.randn(20, 6))
    assert called == [(20, 8)]


def test_a_patched_class_is_called(monkeypatch):
    ours, _ = pair()
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x * 0)
    assert torch.equal(ours[:4](torch.randn(20, 6)), torch.zeros(20, 8))


def test_slices_and_indices():
    ours, _ = pair()
    assert type(ours[:4]) is fastnn.nn.Sequential
    assert launched(ours[:4], torch.randn(12, 6)) == RUN
    assert list(ours[1:3].state_dict()) == ["1.weight", "1.bias", "1.running_mean", "1.running_var",
                                            "1.num_batches_tracked"]  # fmt: skip
    assert ours[-1] is list(ours)[-1]
    block = fastnn.nn.LinearBatchNormReLUDropout(6, 8)
    assert type(block[:2]) is fastnn.nn.Sequential


@pytest.mark.parametrize("train", [True, False])
def test_a_converted_sync_batch_norm_of_one_process_is_fused_as_before(train):
    ours, theirs = (model.train(train) for model in pair())
    converted, x = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(ours)), torch.randn(20, 6)
    assert type(converted) is fastnn.nn.Sequential
    assert launched(copy.deepcopy(converted), x) == launched(ours, x)
    assert_same_step(converted, theirs, x)


def test_sums_and_multiples_are_fused():
    """Of their layers, as torch's are; a torch.nn.Sequential on the left makes one of its kind."""
    ours, theirs = pair()
    for found, expected in ((ours + ours, theirs + theirs), (ours * 2, theirs * 2), (2 * ours, 2 * theirs)):
        assert type(found) is fastnn.nn.Sequential
        assert list(found.state_dict()) == list(expected.state_dict())
        assert list(found) == [*ours, *ours]
    assert list(ours + theirs) == [*ours, *theirs]
    assert type(theirs + ours) is nn.Sequential


def test_three_dimensional_input_is_torchs():
    ours = fastnn.nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(4), nn.ReLU())  # BatchNorm over dimension 1
    theirs = nn.Sequential(*copy.deepcopy(list(ours)))
    assert_same_step(ours, theirs, torch.randn(5, 4, 6))


@pytest.mark.parametrize("wrong", [torch.randn(4, 5), torch.randn(4, 6).double(), torch.ones(4, 6, dtype=torch.int64)])
def test_wrong_input_raises_what_torch_raises(wrong):
    ours, theirs = pair()
    for model in (ours, theirs):
        with pytest.raises(RuntimeError):
            model(wrong)


def test_tracers_see_the_single_layers():
    ours, theirs = pair()
    ours.eval(), theirs.eval()
    x = torch.randn(20, 6)
    expected = theirs(x)
    graph = torch.fx.symbolic_trace(ours)
    assert len([node for node in graph.graph.nodes if node.op == "call_module"]) == 5
    torch.testing.assert_close(graph(x), expected)
    torch.testing.assert_close(torch.jit.trace(ours, x)(x), expected)
    torch.testing.assert_close(torch.jit.script(ours)(x), expected)
    exported = torch.export.export(ours, (x,))
    assert "fastnn" not in exported.graph_module.code
    torch.testing.assert_close(exported.module()(x), expected)


def test_nested_and_empty():
    inner = fastnn.nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model = fastnn.nn.Sequential(inner, nn.Sequential(nn.Linear(6, 4), nn.Tanh()), fastnn.nn.Sequential())
    theirs = nn.Sequential(*copy.deepcopy(list(model)))
    assert_same_step(model, theirs, torch.randn(7, 6))
    assert launched(model, torch.randn(7, 6)) == ("linear_forward_kernel",)


def test_training_for_20_steps_stays_with_torch():
    ours, theirs = pair()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (ours, theirs)]
    for _ in range(20):
        x = torch.randn(32, 6)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - x[:, :3]).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-4, atol=1e-5)
