"""State and checkpoints are torch's: both ways in mid-training, copies, pickles, flags, dtypes and counts."""

import copy
import io
import pickle

import pytest
import torch
from support.optimizers import HAS_FUSED, SEVEN, copies, ours, parameters, set_gradients, state_tensors, theirs

SHAPES = [(3, 5), (40,), (7,)]


def train(optimizer, params, start, steps):
    for step in range(start, start + steps):
        set_gradients(step, params)
        optimizer.step()


def assert_close(a, b, rtol=2e-6, atol=1e-7):
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        torch.testing.assert_close(tensor, b[key], rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("direction", ["from torch to ours", "from ours to torch"])
@pytest.mark.parametrize("name", SEVEN)
def test_training_goes_on_from_the_others_checkpoint(name, direction):
    """Three steps by one, a checkpoint through a file, three by the other: as six by torch."""
    flags = {"momentum": 0.9, "dampening": 0.2} if name == "SGD" else {}
    before, after = (theirs, ours) if direction == "from torch to ours" else (ours, theirs)
    params = parameters(SHAPES)
    whole, first = copies(params), copies(params)
    reference = theirs(name)(whole, lr=0.1, **flags)
    train(reference, whole, 0, 6)
    optimizer = before(name)(first, lr=0.1, **flags)
    train(optimizer, first, 0, 3)
    second = copies(first)
    resumed = after(name)(second, lr=0.5)  # which the checkpoint overrides
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    train(resumed, second, 3, 3)
    assert_close(state_tensors(resumed, second), state_tensors(reference, whole))
    assert resumed.state_dict()["param_groups"] == reference.state_dict()["param_groups"]


@pytest.mark.parametrize("name", SEVEN)
def test_state_dict_is_what_torch_writes(name):
    """Keys, key order, shapes, dtypes, devices and groups."""
    params = parameters(SHAPES)
    mine, plain = copies(params), copies(params)
    with torch.device("cpu"):  # torch leaves the place of most counts to the default device
        optimizer, reference = ours(name)(mine), theirs(name)(plain)
        train(optimizer, mine, 0, 2)
        train(reference, plain, 0, 2)
    found, expected = optimizer.state_dict(), reference.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert list(found["state"]) == list(expected["state"])
    for index, entry in expected["state"].items():
        assert list(found["state"][index]) == list(entry)
        for key, value in entry.items():
            tensor = found["state"][index][key]
            assert (tensor.shape, tensor.dtype, tensor.device) == (value.shape, value.dtype, value.device), key


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", SEVEN)
def test_copies_go_on_alike_and_apart(name, how):
    params = parameters(SHAPES)
    extras = {"max_grad_norm": 1.0, "l1": 0.01}
    optimizer = ours(name)(params, lr=0.1, **extras)
    train(optimizer, params, 0, 2)
    both = (optimizer, params)
    twin, twins = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    train(optimizer, params, 2, 3)
    halfway = {key: tensor.clone() for key, tensor in state_tensors(twin, twins).items()}
    train(twin, twins, 2, 3)
    assert (twin.max_grad_norm, twin.l1) == (1.0, 0.01)
    for key, tensor in state_tensors(twin, twins).items():
        assert torch.equal(tensor, state_tensors(optimizer, params)[key]), key
        assert not torch.equal(tensor, halfway[key]), key  # the twin had not moved with the first


@pytest.mark.parametrize("name", HAS_FUSED)
def test_copies_keep_the_gradscaler_protocol(name):
    """torch's deepcopy loses _step_supports_amp_scaling, and a copied fused optimizer is unscaled twice."""
    params = parameters(SHAPES)
    assert copy.deepcopy(ours(name)(params, fused=True))._step_supports_amp_scaling
    assert not hasattr(copy.deepcopy(ours(name)(params)), "_step_supports_amp_scaling")


@pytest.mark.parametrize("name", HAS_FUSED)
def test_loading_keeps_the_constructors_flags(name):
    """torch's load_state_dict takes fused, foreach and capturable from the checkpoint; the resumed run then is slow."""
    params = parameters(SHAPES)
    slow = theirs(name)(copies(params), foreach=False)
    train(slow, slow.param_groups[0]["params"], 0, 2)
    optimizer = ours(name)(params, fused=True)
    optimizer.load_state_dict(slow.state_dict())
    assert optimizer.param_groups[0]["fused"] is True
    assert optimizer.param_groups[0]["foreach"] is None
    train(optimizer, params, 2, 1)
    if name != "SGD":
        assert all(state["step"].item() == 3 for state in optimizer.state.values())


@pytest.mark.parametrize("name", SEVEN)
def test_loading_shares_no_count_with_the_checkpoint(name):
    """torch shares CPU step tensors with what it loads: two optimizers then count together, once per parameter."""
    params = parameters(SHAPES)
    optimizer = ours(name)(params)
    train(optimizer, params, 0, 2)
    twins = copies(params)
    twin = ours(name)(twins)
    twin.load_state_dict(optimizer.state_dict())
    train(twin, twins, 2, 2)
    for state in optimizer.state.values():
        assert "step" not in state or state["step"].item() == 2
    for state in twin.state.values():
        assert "step" not in state or state["step"].item() == 4


@pytest.mark.parametrize("shared", [False, True])
def test_a_step_tensor_shared_by_all_parameters_counts_once(shared):
    """Checkpoints of older torch hold one; torch then counts once per parameter."""
    params = parameters(SHAPES)
    optimizer = ours("Adam")(params)
    train(optimizer, params, 0, 1)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    step = torch.tensor(1.0)
    for state in checkpoint["state"].values():
        state["step"] = step if shared else 1.0  # or a number, as in the oldest ones
    optimizer.load_state_dict(checkpoint)
    train(optimizer, params, 1, 4)
    assert [state["step"].item() for state in optimizer.state.values()] == [5.0] * 3


def test_bf16_parameters_keep_nadams_product_in_fp32():
    """torch's load casts mu_product to the parameter's dtype, and its digits are gone."""
    params = parameters(SHAPES, torch.bfloat16)
    optimizer = ours("NAdam")(params)
    train(optimizer, params, 0, 3)
    product = optimizer.state[params[0]]["mu_product"].clone()
    assert product.item() != product.bfloat16().item()
    twin = ours("NAdam")(params)
    twin.load_state_dict(optimizer.state_dict())
    assert torch.equal(twin.state[params[0]]["mu_product"], product)


@pytest.mark.parametrize("name", SEVEN)
def test_fp32_state_of_bf16_parameters_survives_a_checkpoint(name):
    flags = {"momentum": 0.9} if name == "SGD" else {}
    params = parameters(SHAPES, torch.bfloat16)
    optimizer = ours(name)(params, state_dtype=torch.float32, **flags)
    train(optimizer, params, 0, 3)
    twins = copies(params)
    twin = ours(name)(twins, state_dtype=torch.float32, **flags)
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    for key, tensor in state_tensors(optimizer, params).items():
        assert torch.equal(tensor, state_tensors(twin, twins)[key]), key
        assert tensor.dtype == torch.float32 or key.isdigit()
    train(optimizer, params, 3, 2)
    train(twin, twins, 3, 2)
    for key, tensor in state_tensors(optimizer, params).items():
        assert torch.equal(tensor, state_tensors(twin, twins)[key]), key
    plain = theirs(name)(copies(params), **flags)
    plain.load_state_dict(optimizer.state_dict())  # torch takes it up in its own dtype
    train(plain, plain.param_groups[0]["params"], 5, 1)


def test_loading_a_wrong_checkpoint_changes_nothing():
    params = parameters(SHAPES)
    optimizer = ours("Adam")(params)
    train(optimizer, params, 0, 1)
    before = {key: tensor.clone() for key, tensor in state_tensors(optimizer, params).items()}
    wrong = ours("Adam")(parameters(SHAPES[:2])).state_dict()
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(wrong)
    for key, tensor in state_tensors(optimizer, params).items():
        assert torch.equal(tensor, before[key])
