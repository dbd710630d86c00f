"""Sequential under grad modes, torch.func, hooks on what is saved, anomaly mode and threads is torch's Sequential."""

import copy
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.sequential_pair import assert_same, cost, drawn, pair, stack, state_of
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from triton.runtime.interpreter import GridExecutor

# Grad modes


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_training_goes_on_after_a_mode_without_gradients(mode, path):
    """The same tensors: in training mode, where statistics move on, and in eval; each twice, as calls are settled."""

    def scenario(model):
        x, seen = drawn(path, 12, 4).requires_grad_(), []
        for train in (True, False, True, False):
            cost(model.train()(x)).backward()
            with mode():
                seen.append(model.train(train)(x).clone())
            assert not seen[-1].requires_grad
            assert seen[-1].is_inference() == (mode is torch.inference_mode)
        cost(model(x)).backward()
        return seen, x.grad

    assert_same(path, scenario)


@pytest.mark.parametrize("settled", [True, False])
def test_what_inference_mode_made_is_refused_as_torch_refuses_it(settled, path):
    for model in pair(path, stack()):
        x = drawn(path, 12, 5)
        if settled:
            model[7](x), model.eval()(drawn(path, 12, 4))
        with torch.inference_mode():
            out = model[:7].eval()(drawn(path, 12, 4))
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            model[7](out)
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
            out.add_(1)
        cost(model[7](out.clone())).backward()


# torch.func: our Function takes part in none of its transforms, which see torch's own ops.

SMOOTH = [nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Tanh(), nn.Dropout(0.0), nn.Linear(3, 2)]


def called(model, parameters, x):
    return functional_call(model, parameters, (x,))


def by_parameters(model, x):
    """The model's cost as a function of its parameters, and these."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return lambda values: cost(called(model, values, x)), parameters


TRANSFORMS = {
    "grad": lambda f, p: grad(f)(p),
    "grad of grad": lambda f, p: grad(lambda q: sum(g.square().sum() for g in grad(f)(q).values()))(p),
    "vjp": lambda f, p: vjp(f, p)[1](torch.tensor(2.0, dtype=p["0.weight"].dtype)),
    "jvp": lambda f, p: jvp(f, (p,), ({name: t.cos() for name, t in p.items()},)),
    "jacrev": lambda f, p: jacrev(f)(p),
    "hessian": lambda f, p: hessian(lambda w: f({**p, "0.weight": w}))(p["0.weight"]),
    "vmap": lambda f, p: vmap(f)({name: torch.stack([t, t.sin(), -t]) for name, t in p.items()}),
    "vmap of grad": lambda f, p: vmap(grad(f))({name: torch.stack([t, t.sin()]) for name, t in p.items()}),
}


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_by_parameters(transform, settled, path):
    def scenario(model):
        x = drawn(path, 12, 4)
        if settled:
            model(x)
        return TRANSFORMS[transform](*by_parameters(model, x))

    # Second derivatives cancel more.
    loose = 5e-4 if path != "float64" and transform in ("hessian", "grad of grad") else None
    assert_same(path, scenario, copy.deepcopy(SMOOTH), loose)


@pytest.mark.parametrize("path", ["kernels", "float64"])
def test_transforms_by_the_input_in_eval(path):
    def scenario(model):
        x = drawn(path, 3, 12, 4)
        model.eval()(x[0])
        each = vmap(jacrev(lambda row: model(row[None])[0]))(x[0])
        return vmap(model)(x), each, grad(lambda rows: cost(model(rows)))(x[0])

    assert_same(path, scenario)


def test_functional_call_moves_the_buffers_it_is_given(path):
    def scenario(model):
        given = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        leaves = {name: given[name].requires_grad_() for name, _ in model.named_parameters()}
        out = called(model, given, drawn(path, 12, 4))
        return out, torch.autograd.grad(cost(out), list(leaves.values())), given

    assert_same(path, scenario)


def test_a_model_held_by_a_transform_is_differentiated_outside_it(path):
    """None of its tensors is the transform's: what autograd records of it is the caller's."""

    def scenario(model):
        x = drawn(path, 12, 4)
        model(x)
        found = grad(lambda s: s * cost(model(x)))(torch.ones((), dtype=x.dtype))
        found.backward()
        return found, vmap(lambda s: s * model(x))(torch.arange(2, dtype=x.dtype))

    assert_same(path, scenario, copy.deepcopy(SMOOTH))


def test_vmap_over_dropout_draws_as_it_is_told(path):
    model, _ = pair(path, [nn.Linear(4, 30), nn.Sigmoid(), nn.Dropout(0.5)])
    x = drawn(path, 20, 4)
    model(x)
    for randomness, alike in (("same", True), ("different", False)):
        for function, over in ((lambda _: model(x), torch.arange(2)), (model, torch.stack([x, x]))):
            first, second = vmap(function, randomness=randomness)(over) != 0
            assert torch.equal(first, second) == alike
    with pytest.raises(RuntimeError, match="random operation while in randomness error mode"):
        vmap(model)(torch.stack([x, x]))


REFUSED = {
    "grad": (lambda model, x: grad(lambda p: cost(called(model, p, x)))(dict(model.named_parameters())), "in-place"),
    "vmap": (lambda model, x: vmap(model)(torch.stack([x, x])), "Batch norm got a batched tensor"),
}


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("transform", REFUSED)
def test_statistics_that_a_transform_may_not_move_are_torchs_error(transform, settled, path):
    run, message = REFUSED[transform]
    for model in pair(path, stack()):
        x = drawn(path, 12, 4)
        if settled:
            model(x)
        with pytest.raises(RuntimeError, match=message):
            run(model, x)


# What is saved, and checks of gradients


def test_saved_tensors_may_wait_elsewhere(path):
    def scenario(model):
        x = drawn(path, 12, 4).requires_grad_()
        with torch.autograd.graph.save_on_cpu():
            out = model(x)
        cost(out).backward()
        return x.grad

    assert_same(path, scenario)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode_changes_nothing_and_names_what_made_nan(path):
    def scenario(model):
        x = drawn(path, 12, 4).requires_grad_()
        with torch.autograd.detect_anomaly():
            cost(model(x)).backward()
        return x.grad

    assert_same(path, scenario)


@pytest.mark.filterwarnings("ignore:(Anomaly Detection has been enabled|Error detected in)")
def test_anomaly_mode_stops_at_nan(path):
    for model in pair(path, [nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Tanh()]):
        out = model(drawn(path, 12, 4).requires_grad_())
        with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="returned nan values"):
            out.backward(torch.full_like(out, torch.nan))


@pytest.mark.parametrize("path", ["float64"])
@pytest.mark.parametrize("train", [True, False])
def test_gradcheck_in_float64(path, train):
    """Against differences, backward, forward and batched; and the second derivatives."""
    model, _ = pair(path, [nn.Linear(3, 2), nn.BatchNorm1d(2), nn.GELU(), nn.Dropout(0.0)])
    model.train(train)
    inputs = (drawn(path, 5, 3).requires_grad_(), *model.parameters())

    def function(x, *values):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        names = [name for name, _ in model.named_parameters()]
        return called(model, dict(zip(names, values, strict=True)) | buffers, x)

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=not train)
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-4)


# Threads


@pytest.fixture
def one_launch_at_a_time(monkeypatch):
    """Triton's interpreter, unlike a GPU, keeps the program it is at in one place for all threads."""
    launch, lock = GridExecutor.__call__, threading.RLock()

    def locked(*arguments, **settings):
        with lock:
            return launch(*arguments, **settings)

    monkeypatch.setattr(GridExecutor, "__call__", locked)


def trained(model, path, seed, meet):
    """Three steps, and the gradients of each; `meet` stands between forward and backward."""
    optimizer, seen = torch.optim.SGD(model.parameters(), 0.1), []
    for step in range(3):
        optimizer.zero_grad()
        x = drawn(path, 12, 4, seed=10 * seed + step).requires_grad_()
        loss = cost(model(x), seed)
        meet()
        loss.backward()
        seen.append([x.grad, copy.deepcopy(state_of(model))])
        optimizer.step()
    return seen


@pytest.mark.usefixtures("one_launch_at_a_time")
def test_two_threads_train_their_copies_as_one_after_the_other(path):
    """Both forwards come before both backwards, in calls of one form, which share what is settled."""
    model, _ = pair(path, stack())
    alone = [trained(copy.deepcopy(model), path, seed, lambda: None) for seed in (0, 1)]
    copies, barrier = [copy.deepcopy(model) for _ in alone], threading.Barrier(2)

    def train(index):
        return trained(copies[index], path, index, lambda: barrier.wait(60))

    with ThreadPoolExecutor(2) as pool:
        torch.testing.assert_close(list(pool.map(train, (0, 1))), alone, rtol=0, atol=0)


@pytest.mark.usefixtures("one_launch_at_a_time")
def test_threads_share_a_model_in_eval(path):
    """Of several shapes and modes, so that calls are settled while others are looked up."""
    model, theirs = (m.eval() for m in pair(path, stack()))
    start = threading.Barrier(3)

    def infer(mode):
        start.wait(60)
        found = []
        for rows in (3, 4, 5, 3, 4):
            with mode():
                found.append(model(drawn(path, rows, 4, seed=rows)).detach())
        return found

    with ThreadPoolExecutor(3) as pool:
        each = list(pool.map(infer, (torch.inference_mode, torch.no_grad, torch.enable_grad)))
    expected = [theirs(drawn(path, rows, 4, seed=rows)).detach() for rows in (3, 4, 5, 3, 4)]
    for found, want in zip(itertools.chain(*each), expected * 3, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
