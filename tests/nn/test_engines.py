"""Sequential under autograd's engines (checkpoints, double backward, hooks, partial graphs) is torch's Sequential."""

import copy
import functools
import itertools

import pytest
import torch
from support.sequential_pair import assert_same, cost, drawn, dtype_of, pair, stack, state_of
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

# Checkpoints


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_recomputes_the_mask_of_its_forward(reentrant, path):
    """Each output is one input through rising functions: where it was kept, and only there, there is a gradient."""
    model, _ = pair(path, [nn.Linear(40, 40), nn.BatchNorm1d(40), nn.Sigmoid(), nn.Dropout(0.5)])
    nn.init.eye_(model[0].weight)
    model[1].eval()
    x = drawn(path, 32, 40).requires_grad_()
    out = checkpoint(model, x, use_reentrant=reentrant, preserve_rng_state=True)
    after_forward = torch.get_rng_state()
    out.backward(torch.ones_like(out))
    assert torch.equal(x.grad != 0, out != 0)
    assert 0.4 < (out != 0).double().mean() < 0.6
    assert torch.equal(torch.get_rng_state(), after_forward)


def checkpointed(model, x, part, reentrant):
    whole = functools.partial(checkpoint, use_reentrant=reentrant, preserve_rng_state=True)
    if part == "model":
        return whole(model, x)
    if part == "first":
        return model[4:](whole(model[:4], x))
    return whole(model[4:], model[:4](x))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("part", ["model", "first", "last"])
def test_a_checkpoint_leaves_gradients_as_they_are_with_dropout(part, reentrant, path):
    model, _ = pair(path, stack(0.5))
    other = copy.deepcopy(model)
    leaves = [drawn(path, 12, 4).requires_grad_() for _ in range(2)]
    torch.manual_seed(7)
    cost(checkpointed(model, leaves[0], part, reentrant)).backward()
    torch.manual_seed(7)
    cost(other(leaves[1])).backward()
    assert leaves[1].grad.any()
    torch.testing.assert_close(*((leaf.grad, state_of(m)[0]) for leaf, m in zip(leaves, (model, other), strict=True)))


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("part", ["model", "first", "last"])
def test_a_checkpoint_moves_and_counts_statistics_as_often_as_torchs(part, reentrant, early_stop, path):
    def scenario(model):
        x = drawn(path, 12, 4).requires_grad_()
        with set_checkpoint_early_stop(early_stop):
            cost(checkpointed(model, x, part, reentrant)).backward()
        return x.grad

    assert_same(path, scenario)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("end", [2, 3, 4])
def test_a_checkpoint_that_ends_within_a_run_counts_as_torchs(end, reentrant, path):
    """Early stop leaves off right behind the last tensor that is saved, which here is BatchNorm's or GELU's."""

    def scenario(model):
        x = drawn(path, 12, 4).requires_grad_()
        cost(checkpoint(model[:end], x, use_reentrant=reentrant)).backward()
        return x.grad

    assert_same(path, scenario)


# Double backward


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("path", ["kernels", "float64"])
def test_a_gradient_penalty_is_float64s(path, train):
    """WGAN-GP: |d critic / d input| pulled to 1, beside the critic's own loss, by all parameters."""
    found = []
    for model, dtype in zip(pair(path, stack()), (dtype_of(path), torch.float64), strict=True):
        model = model.to(dtype).train(train)
        x = drawn("float64", 12, 4).float().to(dtype).requires_grad_()
        out = model(x)
        (gradient,) = torch.autograd.grad(out, x, drawn("float64", 12, 3, seed=3).to(dtype), create_graph=True)
        penalty = (gradient.norm(2, 1) - 1).square().mean()
        (penalty + cost(out)).backward()
        grads, state = state_of(model)
        found.append([t.double() for t in (penalty, gradient, x.grad, *grads.values(), *state.values())])
    # Second derivatives cancel: as the functional's own test of them.
    tolerance = {"kernels": (2e-4, 2e-5), "float64": (1e-11, 1e-12)}[path]
    torch.testing.assert_close(*found, rtol=tolerance[0], atol=tolerance[1])


# Accumulation and hooks


@pytest.mark.parametrize("at_once", [True, False])
def test_three_micro_batches_accumulate(at_once, path):
    """One backward after each forward, or one after all of them."""

    def scenario(model):
        losses = (cost(model(drawn(path, 12, 4, seed=seed)), seed) / 3 for seed in range(3))
        if at_once:
            sum(losses).backward()
        else:
            for loss in losses:
                loss.backward()

    assert_same(path, scenario)


@pytest.mark.parametrize("train", [True, False])
def test_a_retained_graph_gives_its_gradients_twice(train, path):
    def scenario(model):
        x = drawn(path, 12, 4).requires_grad_()
        loss = cost(model.train(train)(x))
        loss.backward(retain_graph=True)
        once = [x.grad.clone(), *(parameter.grad.clone() for parameter in model.parameters())]
        loss.backward()
        torch.testing.assert_close([t * 2 for t in once], [x.grad, *(p.grad for p in model.parameters())])
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
        return x.grad

    assert_same(path, scenario)


def test_hooks_see_and_change_gradients(path):
    """On parameters, on what goes from one run to the next, after accumulation, and what retain_grad keeps."""

    def scenario(model):
        seen = []

        def triple(parameter):
            seen.append(parameter.grad.clone())
            parameter.grad.mul_(3)

        model[0].weight.register_hook(lambda g: g * 2)
        model[1].weight.register_hook(lambda g: seen.append(g.clone()))
        model[4].weight.register_post_accumulate_grad_hook(triple)
        hidden = model[:4](drawn(path, 12, 4))
        hidden.retain_grad()
        hidden.register_hook(lambda g: g * 5)
        cost(model[4:](hidden)).backward()
        return hidden.grad, seen

    assert_same(path, scenario)


# Partial graphs


@pytest.mark.parametrize("train", [True, False])
def test_each_subset_of_leaves_has_its_gradients(train, path):
    for wanted in itertools.product([False, True], repeat=5):

        def scenario(model, wanted=wanted):
            x = drawn(path, 6, 4)
            leaves = [x, *model.train(train).parameters()]
            for leaf, needed in zip(leaves, wanted, strict=True):
                leaf.requires_grad_(needed)
            out = model(x)
            assert out.requires_grad == any(wanted)
            if any(wanted):
                cost(out).backward()
            assert [leaf.grad is not None for leaf in leaves] == list(wanted)
            return out, x.grad

        assert_same(path, scenario, [nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()])


@pytest.mark.parametrize("settings", [{"allow_unused": True}, {"materialize_grads": True}, {}], ids=str)
def test_gradients_by_what_is_between_runs(settings, path):
    def scenario(model):
        hidden = model[:4](drawn(path, 12, 4))
        loss = cost(model[4:](hidden))
        wanted = [hidden, model[4].weight, *([model[0].weight.clone()] if settings else [])]
        return torch.autograd.grad(loss, wanted, **settings)

    assert_same(path, scenario)


def test_an_unused_parameter_is_torchs_error(path):
    for model in pair(path, stack()):
        out = model[:4](drawn(path, 12, 4))
        with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
            torch.autograd.grad(cost(out), [model[0].weight, model[4].weight])


@pytest.mark.parametrize("frozen", ["all", "first", "last"])
def test_frozen_parts_pass_gradients_on(frozen, path):
    def scenario(model):
        parts = {"all": model, "first": model[:4], "last": model[4:]}
        parts[frozen].requires_grad_(False)
        x = drawn(path, 12, 4).requires_grad_()
        cost(model(x)).backward()
        assert not any(p.grad is not None for p in parts[frozen].parameters())
        return x.grad

    assert_same(path, scenario)


def test_detach_between_runs_ends_the_graph(path):
    def scenario(model):
        x = drawn(path, 12, 4).requires_grad_()
        cost(model[4:](model[:4](x).detach())).backward()
        assert x.grad is None
        assert model[0].weight.grad is None
        assert model[4].weight.grad.any()

    assert_same(path, scenario)
