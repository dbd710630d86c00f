"""examples/recipe.py: what the examples train."""

import pytest
import recipe
import torch
from torch import nn


def test_parts_are_stratified_disjoint_and_standardised_by_the_training_part():
    data = recipe.load(0)
    parts = data.train, data.validation, data.test
    assert [len(x) for x, _ in parts] == [recipe.TRAIN, recipe.VALIDATION, recipe.TEST]
    (x, y), (x_val, _), _ = parts
    torch.testing.assert_close(x.mean(0), torch.zeros(64), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std(correction=0), torch.tensor(1.0))
    assert x_val.mean(0).abs().max() > 0.05  # of other images
    assert len(torch.cat([x for x, _ in parts]).unique(dim=0)) == 1797
    shares = torch.bincount(y) / len(y)
    torch.testing.assert_close(shares, torch.full((10,), 0.1), rtol=0, atol=0.005)


def test_a_shift_moves_images_and_noise_has_its_deviation():
    x, centre, generator = torch.zeros(500, 64), torch.zeros(64), torch.Generator().manual_seed(0)
    x[:, 3 * 8 + 4] = 1  # one lit pixel
    moved = recipe.augment(x, centre, 0, 2, generator).view(-1, 8, 8)
    assert torch.equal(moved.sum((1, 2)), torch.ones(500))
    rows, columns = moved.nonzero()[:, 1:].T
    assert set(rows.tolist()) == {1, 2, 3, 4, 5}
    assert set(columns.tolist()) == {2, 3, 4, 5, 6}
    noise = recipe.augment(x, centre, 0.3, 0, generator) - x
    torch.testing.assert_close(noise.std(), torch.tensor(0.3), rtol=0.02, atol=0)
    assert torch.equal(recipe.augment(x, centre, 0, 0, generator), x)


def test_a_shift_brings_in_the_background_of_standardised_images():
    data = recipe.load(0)
    moved = recipe.augment(data.train[0], data.centre, 0, 4, torch.Generator().manual_seed(0)) + data.centre
    assert moved.min() > -1e-5  # no pixel darker than a dark one
    assert (moved.abs() < 1e-5).float().mean() > ((data.train[0] + data.centre).abs() < 1e-5).float().mean()


@pytest.mark.parametrize("initialisation", recipe.INITIALISATIONS)
def test_initialisation_has_its_scale_and_no_bias(initialisation):
    model = recipe.build(nn.Sequential, [512], 0.1, "tanh", initialisation)
    weight = model[0].weight  # 512 x 64
    variance = 2 / 64 if initialisation.startswith("he") else 2 / (64 + 512)
    torch.testing.assert_close(weight.var(), torch.tensor(variance), rtol=0.03, atol=0)
    bound = (3 * variance) ** 0.5
    assert (weight.abs().max() <= bound) == initialisation.endswith("uniform")
    assert not model[-1].bias.any()


def test_blocks_have_the_order_and_widths_asked_for():
    model = recipe.build(nn.Sequential, recipe.pyramid(256, 3), 0.1, "sigmoid")
    assert [layer.out_features for layer in model if isinstance(layer, nn.Linear)] == [256, 128, 64, 10]
    assert [type(layer) for layer in model[:4]] == [nn.Linear, nn.BatchNorm1d, nn.Sigmoid, nn.Dropout]
    assert model[0].bias is None
    assert model[-1].bias is not None


@pytest.mark.parametrize("library", recipe.LIBRARIES)
@pytest.mark.parametrize("name", recipe.OPTIMIZERS)
def test_optimizers_are_the_librarys_with_changes(library, name):
    optimizer = recipe.make_optimizer([nn.Parameter(torch.ones(3))], library, name, lr=0.5)
    assert type(optimizer).__module__.split(".")[0] == library.split(".")[0]
    assert optimizer.param_groups[0]["lr"] == 0.5
    if name in ("sgd", "momentum", "nesterov"):
        group = optimizer.param_groups[0]
        assert (group["momentum"] > 0, group["nesterov"]) == (name != "sgd", name == "nesterov")
