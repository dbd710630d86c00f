"""Fused Triton kernels as drop-in torch.nn modules and torch.optim optimizers.

``nn`` fuses Linear + BatchNorm + ReLU + Dropout, ``optim`` takes each step of an optimizer in one launch.

``explain`` says which runs of a model are fused, and by which plans of kernels; ``tune`` measures the plans on this GPU
and ``forced_plan`` fixes them.

``python -m fastnn`` reports the environment and checks every kernel on the device at hand.
"""

from . import functional, nn, optim
from .explanation import explain
from .fuse import fuse, unfuse
from .plans import forced_plan
from .tuning import tune

__all__ = ["__version__", "explain", "forced_plan", "functional", "fuse", "nn", "optim", "tune", "unfuse"]
__version__ = "0.1.0"
