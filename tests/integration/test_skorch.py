"""In skorch's estimators, within scikit-learn's tools, fastnn's modules and optimizers train what torch's do."""

import copy
import pickle

import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from support import digits
from torch import nn

skorch = pytest.importorskip("skorch", reason='skorch is missing: pip install -e ".[integration]"')
from skorch import callbacks  # noqa: E402

HISTORY = ("train_loss", "valid_loss", "valid_acc", "train_loss_best", "valid_loss_best", "event_lr")


def rows(path):
    (x, y), _ = digits.rows(path)
    return x.numpy(), y.numpy()


def classifier(parts, path, name="SGD", **settings):
    return skorch.NeuralNetClassifier(
        digits.Net,
        module__parts=parts,
        module__dropout=digits.SETTINGS[path].dropout,
        criterion=nn.CrossEntropyLoss,
        optimizer=digits.optimizer_class(parts, name),
        **{"lr": 0.2 if name == "SGD" else 0.02, "max_epochs": 1, "batch_size": digits.BATCH, "verbose": 0} | settings,
    )


def trained(net, path, fit="fit"):
    """The masks and the shuffling of every training are the same."""
    torch.manual_seed(1)
    return getattr(net, fit)(*rows(path))


def results(net, path):
    """Weights, and all that was written down of the epochs but their durations."""
    history = [{key: value for key, value in epoch.items() if key in HISTORY} for epoch in net.history]
    return [net.module_.state_dict(), torch.tensor(net.predict_proba(rows(path)[0])), history]


@pytest.mark.parametrize("parts", digits.OURS)
def test_fit_with_callbacks(parts, path, tmp_path):
    """Clipping, a schedule, early stopping with the best weights, checkpoints of the best epoch and of the last."""
    found = []
    for each in ("torch", parts):
        best = callbacks.Checkpoint(dirname=tmp_path / each / "best", monitor="valid_loss_best")
        last = callbacks.TrainEndCheckpoint(dirname=tmp_path / each / "last")
        used = [
            ("clip", callbacks.GradientNormClipping(0.2)),
            ("schedule", callbacks.LRScheduler(policy="StepLR", step_size=2, gamma=0.5)),
            ("stop", callbacks.EarlyStopping(patience=2, threshold=0.2, load_best=True)),
            ("best", best),
            ("last", last),
        ]
        net = trained(classifier(each, path, "Adam", max_epochs=9, callbacks=used), path)
        assert 2 < len(net.history) < 9
        found.append(results(net, path))
        for checkpoint in (best, last.checkpoint_):
            net = classifier(each, path, "Adam").initialize()
            net.load_params(checkpoint=checkpoint)
            found[-1] += results(net, path)
    digits.assert_same(path, found[1], found[0])


@pytest.mark.parametrize("parts", digits.OURS)
def test_the_kernels_train_and_predict(parts):
    net = classifier(parts, "kernels", train_split=None)
    with digits.launches() as launches:
        trained(net, "kernels")
    assert launches == digits.of_plain_training(parts, "SGD", 4, 4)
    x = rows("kernels")[0]
    with digits.launches() as launches:
        net.predict_proba(x)
    assert launches == digits.of_plain_predictions(parts, torch.tensor(x).split(digits.BATCH))


def test_grid_search_of_a_pipeline(path):
    grid = {"net__lr": [0.02, 0.2], "net__module__hidden": [6, 12]}
    found = []
    for each in ("torch", "fastnn"):
        pipeline = Pipeline([("scale", StandardScaler()), ("net", classifier(each, path, train_split=None))])
        search = trained(GridSearchCV(pipeline, grid, cv=2, scoring="neg_log_loss", error_score="raise"), path)
        assert type(search.best_estimator_["net"].optimizer_) is digits.optimizer_class(each, "SGD")
        scores, probabilities = search.cv_results_["mean_test_score"], search.predict_proba(rows(path)[0])
        found.append([search.best_params_, torch.tensor(scores), torch.tensor(probabilities)])
    digits.assert_same(path, found[1], found[0])
    assert found[0][1].unique().numel() == 4


@pytest.mark.parametrize(
    ("first", "second", "how"),
    [
        ("fastnn", "fastnn", "pickle"),
        ("fuse", "fuse", "pickle"),
        ("fastnn", "fastnn", "deepcopy"),
        ("fuse", "fuse", "deepcopy"),
        ("torch", "fastnn", "params"),
        ("fastnn", "torch", "params"),
    ],
)
def test_training_goes_on_in_a_copy(first, second, how, path, tmp_path):
    uninterrupted = trained(trained(classifier("torch", path, "Adam"), path), path, "partial_fit")
    net = trained(classifier(first, path, "Adam"), path)
    if how == "pickle":
        net = pickle.loads(pickle.dumps(net))
    elif how == "deepcopy":
        net = copy.deepcopy(net)
    else:
        files = {f"f_{part}": tmp_path / part for part in ("params", "optimizer", "history")}
        net.save_params(**files)
        net = classifier(second, path, "Adam").initialize()
        net.load_params(**files)
    trained(net, path, "partial_fit")
    digits.assert_same(path, results(net, path), results(uninterrupted, path))


def test_parameters_that_are_set_between_two_trainings(path):
    found = []
    for each in ("torch", "fastnn"):
        net = trained(classifier(each, path, optimizer__momentum=0.9), path)
        net.set_params(lr=0.02, optimizer__weight_decay=0.1)  # of the optimizer that there is
        trained(net, path, "partial_fit")
        found.append(results(net, path))
        net.set_params(module__hidden=7)  # which makes module and optimizer anew
        trained(net, path, "partial_fit")
        found[-1] += results(net, path)
        found[-1] += results(trained(clone(net), path), path)
    digits.assert_same(path, found[1], found[0])


@pytest.mark.parametrize("parts", digits.OURS)
def test_groups_of_parameters_and_frozen_layers(parts, path):
    found = []
    for each in ("torch", parts):
        groups = [("layers.*.bias", {"lr": 0.5, "weight_decay": 0.01})]
        frozen = [callbacks.Freezer("layers.0.*"), callbacks.Unfreezer("layers.0.*", at=2)]
        net = classifier(each, path, optimizer__param_groups=groups, callbacks=frozen, max_epochs=2)
        found.append(results(trained(net, path), path))
    digits.assert_same(path, found[1], found[0])


def test_the_optimizer_clips_where_torch_needs_a_callback(path):
    """Set anew between two trainings: as the optimizer's attribute, for skorch would write it to the groups."""

    def twice(parts, clip, **settings):
        net = trained(classifier(parts, path, **settings), path)
        clip(net)
        return results(trained(net, path, "partial_fit"), path)

    ours = twice("fastnn", lambda net: setattr(net.optimizer_, "max_grad_norm", 0.02), optimizer__max_grad_norm=0.1)
    callback = {"callbacks": [("clip", callbacks.GradientNormClipping(0.1))]}
    theirs = twice("torch", lambda net: net.set_params(callbacks__clip__gradient_clip_value=0.02), **callback)
    once = twice("torch", lambda net: None, **callback)
    # On the eager path the norm itself is rounded otherwise: of the norms of all tensors, in another order.
    digits.assert_same("kernels", ours, theirs)
    with pytest.raises(AssertionError):
        digits.assert_same("kernels", ours, once)
