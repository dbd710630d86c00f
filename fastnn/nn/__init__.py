"""Drop-in torch.nn modules."""

from . import utils
from .blocks import MLP, LinearBatchNormReLUDropout
from .sequential import Sequential

__all__ = ["MLP", "LinearBatchNormReLUDropout", "Sequential", "utils"]
