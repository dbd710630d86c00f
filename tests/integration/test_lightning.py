"""Under Lightning's Trainer fastnn's modules and optimizers train what torch's do, and by the kernels."""

import pytest
import torch
from support import digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning", reason='Lightning is missing: pip install -e ".[integration]"')
from lightning.pytorch import callbacks  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

pytestmark = [
    # Lightning 2.6 asks torch's pytrees in a way that torch 2.13 is about to drop.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    # It recommends worker processes to any loader, also of 256 rows in memory.
    pytest.mark.filterwarnings("ignore:.* does not have many workers:UserWarning"),
]
SGD = {"name": "SGD", "lr": 1.0, "momentum": 0.9}
DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def overflowing(test):
    """The remarks of torch on a schedule whose first step is skipped, and of numpy in Triton's interpreter on inf."""
    for message in ("Detected call of `lr_scheduler.step:UserWarning", "invalid value encountered:RuntimeWarning"):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return test


class Digits(lightning.LightningModule):
    def __init__(self, parts, path, name="AdamW", **settings):
        super().__init__()
        self.net = digits.Net(parts, digits.SETTINGS[path].dropout)
        self.make_optimizer = digits.optimizer_class(parts, name)
        self.settings = {"lr": 0.05} | settings

    def forward(self, x):
        return self.net(x)

    def on_train_batch_start(self, batch, index):
        torch.manual_seed(self.global_step)  # the masks: of a step, resumed or not

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, index):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters(), **self.settings)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.settings["lr"], total_steps=40, div_factor=2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loaders(path):
    train, validation = (TensorDataset(*part) for part in digits.rows(path))
    return DataLoader(train, digits.BATCH), DataLoader(validation, digits.BATCH)


def fitted(model, path, resume=None, **settings):
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = {"accelerator": "cpu", "max_epochs": 2, "enable_model_summary": False} | silent | settings
    trainer = lightning.Trainer(**settings)
    trainer.fit(model, *loaders(path), ckpt_path=resume)
    return trainer


def precision(name):
    """As Trainer(precision=name) on a GPU; on a CPU it would take bfloat16 for float16. The first step overflows."""
    if name != "16-mixed":
        return {"precision": name}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-25)
    return {"plugins": MixedPrecision(name, "cpu", scaler)}


@pytest.mark.parametrize("parts", digits.OURS)
def test_fit_validate_predict(parts, path):
    found = []
    for each in ("torch", parts):
        model = Digits(each, path)
        trainer = fitted(model, path)
        with digits.launches() as launches:
            predicted = trainer.predict(model, loaders(path)[1])
        found.append([model.state_dict(), *trainer.validate(model, loaders(path)[1], verbose=False), predicted])
    digits.assert_same(path, found[1], found[0])
    assert found[1][1]["loss"] < 1.5  # of ln 10 before the training
    if path == "kernels":
        assert launches == digits.of_plain_predictions(parts, [x for x, _ in loaders(path)[1]])


@overflowing
@pytest.mark.parametrize("parts", digits.OURS)
@pytest.mark.parametrize(("name", "algorithm"), [("32-true", "value"), ("bf16-mixed", "norm"), ("16-mixed", "norm")])
def test_clips_and_accumulates_gradients_in_mixed_precision(name, algorithm, parts, path):
    def trained(parts, clip):
        model, settings = Digits(parts, path, **SGD), precision(name)
        settings |= {"gradient_clip_val": clip, "gradient_clip_algorithm": algorithm, "accumulate_grad_batches": 2}
        with digits.launches() as launches:
            trainer = fitted(model, path, limit_val_batches=0, **settings)
        if name == "16-mixed":
            assert trainer.precision_plugin.scaler.get_scale() == 2.0**15  # of one overflow
        return model.state_dict(), launches

    clip = 0.1 if algorithm == "norm" else 0.005
    (ours, launches), (theirs, _), (unclipped, _) = trained(parts, clip), trained("torch", clip), trained("torch", None)
    digits.assert_same(path, ours, theirs, DTYPES[name])
    with pytest.raises(AssertionError):
        digits.assert_same(path, ours, unclipped, DTYPES[name])
    if path == "kernels":
        steps = 3 if name == "16-mixed" else 4
        assert launches == digits.of_plain_training(parts, "SGD", 8, steps, DTYPES[name])


@overflowing
def test_a_fused_optimizer_under_a_scaler_clips_in_its_step(path):
    """Lightning refuses to clip what unscales in its step, torch's fused optimizers and ours; ours clips there, too."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fitted(Digits("fastnn", path, fused=True, **SGD), path, gradient_clip_val=0.1, **precision("16-mixed"))
    ours, theirs = Digits("fastnn", path, fused=True, max_grad_norm=0.1, **SGD), Digits("torch", path, **SGD)
    fitted(ours, path, **precision("16-mixed"))
    fitted(theirs, path, gradient_clip_val=0.1, **precision("16-mixed"))
    # On the eager path the norm itself is rounded otherwise: that of scaled gradients, and of each tensor's norm.
    digits.assert_same("kernels", ours.state_dict(), theirs.state_dict(), torch.float16 if path == "kernels" else None)


@pytest.mark.parametrize(
    ("first", "second"), [("fastnn", "fastnn"), ("fuse", "fuse"), ("torch", "fastnn"), ("fastnn", "torch")]
)
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(first, second, path, tmp_path):
    uninterrupted = Digits("torch", path)
    fitted(uninterrupted, path)
    checkpoint = tmp_path / "half.ckpt"
    fitted(Digits(first, path), path, max_epochs=1).save_checkpoint(checkpoint)
    resumed = Digits(second, path)
    assert fitted(resumed, path, resume=checkpoint).global_step == 2 * len(loaders(path)[0])
    digits.assert_same(path, resumed.state_dict(), uninterrupted.state_dict())


def test_early_stopping_and_the_best_checkpoint(path, tmp_path):
    found = []
    for each in ("torch", "fastnn"):
        stop = callbacks.EarlyStopping("loss", patience=1, min_delta=0.3)
        best = callbacks.ModelCheckpoint(tmp_path / each, monitor="loss")
        trainer = fitted(Digits(each, path), path, max_epochs=9, callbacks=[stop, best], enable_checkpointing=True)
        saved = torch.load(best.best_model_path)["state_dict"]
        found.append([trainer.current_epoch, stop.stopped_epoch, stop.best_score, best.best_model_score, saved])
    assert 0 < found[0][1] < 8
    digits.assert_same(path, found[1], found[0])


class TwoOptimizers(Digits):
    """Manual optimisation: the block's optimizer and the head's take turns."""

    automatic_optimization = False

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.lr_schedulers().step()

    def configure_optimizers(self):
        block, head = self.net.layers[:4], self.net.layers[4:]
        optimizers = [self.make_optimizer(part.parameters(), **self.settings) for part in (block, head)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizers[0], 0.9)]


@pytest.mark.parametrize("parts", digits.OURS)
def test_manual_optimisation_of_two_optimizers(parts, path):
    ours, theirs = (TwoOptimizers(each, path) for each in (parts, "torch"))
    for model in (ours, theirs):
        fitted(model, path)
    digits.assert_same(path, ours.state_dict(), theirs.state_dict())


class WithoutSchedule(Digits):
    def configure_optimizers(self):
        return super().configure_optimizers()["optimizer"]


@pytest.mark.parametrize("parts", digits.OURS)
def test_stochastic_weight_averaging(parts, path):
    """Its last epoch only makes statistics: it sets momentum=None in each BatchNorm1d, and then back."""
    found = []
    for each in ("torch", parts):
        model = WithoutSchedule(each, path)
        average = callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
        fitted(model, path, max_epochs=4, callbacks=[average])
        assert average.n_averaged == 4
        found.append(model.state_dict())
    digits.assert_same(path, found[1], found[0])
