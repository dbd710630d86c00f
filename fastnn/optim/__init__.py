"""torch.optim's optimizers, each step in one launch for all parameters; every checkpoint stays torch's."""

from .adadelta import Adadelta
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .engine import MultiTensorOptimizer
from .nadam import NAdam
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = ["SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "MultiTensorOptimizer", "NAdam", "RMSprop"]
