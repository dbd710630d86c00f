"""Under Hugging Face Accelerate fastnn's modules and optimizers train what torch's do, and by the kernels."""

import pytest
import torch
from support import digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate", reason='Accelerate is missing: pip install -e ".[integration]"')
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

DTYPES = {"no": None, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _one_accelerator_after_another():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Training:
    """A loop as Accelerate's documentation has it. parts: those of the net and of the optimizer."""

    def __init__(self, parts, path, name="SGD", precision="no", accumulated=1):
        self.accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulated
        )
        model = digits.Net(parts, digits.SETTINGS[path].dropout)
        optimizer = digits.optimizer_class(parts, name)(model.parameters(), lr=0.5 if name == "SGD" else 0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16)
        loaders = (DataLoader(TensorDataset(*part), digits.BATCH) for part in digits.rows(path))
        self.model, self.optimizer, self.schedule, self.train, self.validation = self.accelerator.prepare(
            model, optimizer, schedule, *loaders
        )
        self.norms = []

    def epoch(self, clip=None):
        self.model.train()
        for index, (x, y) in enumerate(self.train):
            torch.manual_seed(index)  # the masks, as an epoch may be the first of a resumed training
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(nn.functional.cross_entropy(self.model(x), y))
                if self.accelerator.sync_gradients and clip is not None:
                    self.norms.append(self.accelerator.clip_grad_norm_(self.model.parameters(), clip))
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()

    def predictions(self):
        self.model.eval()
        with torch.inference_mode():
            return torch.cat([self.accelerator.gather_for_metrics(self.model(x)) for x, _ in self.validation])

    def weights(self):
        return self.accelerator.unwrap_model(self.model).state_dict()


@pytest.mark.parametrize("parts", digits.OURS)
@pytest.mark.parametrize("precision", DTYPES)
def test_accumulates_clips_and_schedules(precision, parts, path):
    def trained(parts, clip):
        training = Training(parts, path, precision=precision, accumulated=2)
        with digits.launches() as launches:
            training.epoch(clip), training.epoch(clip)
        assert type(training.accelerator.unwrap_model(training.model)) is digits.Net
        return [training.weights(), training.predictions(), training.norms], launches

    (ours, launches), (theirs, _), (unclipped, _) = trained(parts, 0.1), trained("torch", 0.1), trained("torch", None)
    digits.assert_same(path, ours, theirs, DTYPES[precision])
    with pytest.raises(AssertionError):
        digits.assert_same(path, ours[0], unclipped[0], DTYPES[precision])
    if path == "kernels":
        assert launches == digits.of_plain_training(parts, "SGD", 8, 4, DTYPES[precision])


@pytest.mark.parametrize(
    ("first", "second"), [("fastnn", "fastnn"), ("fuse", "fuse"), ("torch", "fastnn"), ("fastnn", "torch")]
)
def test_training_goes_on_from_a_saved_state(first, second, path, tmp_path):
    uninterrupted = Training("torch", path, "AdamW")
    uninterrupted.epoch(), uninterrupted.epoch()
    saved = Training(first, path, "AdamW")
    saved.epoch()
    saved.accelerator.save_state(tmp_path)
    training = Training(second, path, "AdamW")
    training.epoch(), training.epoch()  # what is loaded replaces other weights, moments and counts
    training.accelerator.load_state(tmp_path)
    training.epoch()
    digits.assert_same(path, training.weights(), uninterrupted.weights())
    digits.assert_same(path, training.schedule.get_last_lr(), uninterrupted.schedule.get_last_lr())
